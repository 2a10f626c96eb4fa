"""What a token's forward pass gives does not hang on who is beside it: alone, in a chain, on a branch of a tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdbench.decoding.tree import from_paths
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import has_cpu_kernels
from spdbench.models.target import load_target
from tests import tiny

PROMPT = list(range(30, 41))
TREE = from_paths([(0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (1, 1, 0), (0, 0, 0), (0, 0, 0, 0)])
IDS = [50, 61, 62, 63, 64, 65, 66, 67, 68, 69]


@pytest.fixture(autouse=True)
def _compiled_steps_only() -> None:
    if not has_cpu_kernels(torch.float32, torch.device("cpu")):
        pytest.skip("numba is not installed: torch's own attention makes no such promise")


@torch.inference_mode()
def read(decoder: Decoder, prompt: list[int], chunks: list[list[int]]) -> Tensor:
    """Logits `[S, V]` of all rows behind the prompt, forwarded in chunks."""
    cache, found = decoder.new_cache(len(prompt) + 64), []
    decoder.forward(decoder.embed(decoder.ids(prompt)), 0, cache)
    for chunk in chunks:
        hidden, _ = decoder.forward(decoder.embed(decoder.ids(chunk)), cache.length, cache)
        found.append(decoder.logits(hidden).clone())
    return torch.cat(found)


@torch.inference_mode()
def check(decoder: Decoder, prompt: list[int]) -> None:
    alone = read(decoder, prompt, [[token] for token in IDS])
    for chunks in ([IDS], [IDS[:3], IDS[3:]], [IDS[:1], IDS[1:6], IDS[6:8], IDS[8:]]):
        assert torch.equal(read(decoder, prompt, chunks), alone)
    cache = decoder.new_cache(len(prompt) + 64)
    decoder.forward(decoder.embed(decoder.ids(prompt)), 0, cache)
    hidden, _ = decoder.forward(decoder.embed(decoder.ids(IDS)), len(prompt), cache, tree=TREE.rows)
    in_tree = decoder.logits(hidden)
    for node, sees in enumerate(TREE.rows.visible_SW):
        branch = [IDS[other] for other in sees.nonzero()[:, 0].tolist()]
        assert torch.equal(read(decoder, prompt, [[token] for token in branch])[-1], in_tree[node])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "qwen3_moe"])
def test_tiny_models(family: str, dtype: str, tmp_path: Path, own_cache: Path) -> None:  # noqa: ARG001
    folder = tiny.make_model(tmp_path, family)
    check(load_target(str(folder), dtype, "cpu").own_decoder, PROMPT)


@pytest.mark.embedded
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model(dtype: str) -> None:
    check(load_target("smollm2", dtype, "cpu").own_decoder, [100 + i for i in range(180)])
