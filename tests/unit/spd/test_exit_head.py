"""PPSD's exit head: drafts from stage 0's output as a decoder of its own would, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_evenly
from spdbench.pipeline.schedule import Cycle
from spdbench.types import Step
from spdbench_backends.spd.drafter import ExitDrafter
from spdbench_backends.spd.exit_formats import build_exit, random_exit, read_exit
from tests import tiny
from tests.unit.spd.inline import generate

STAGES = split_evenly(6, 3)


class Noted(ExitDrafter):
    """Keeps what it read and what it said: (all ids before the draft, the draft)."""

    def __init__(self, head: Decoder) -> None:
        super().__init__(head, STAGES[0].stop)
        self.said: list[tuple[list[int], int]] = []
        self._ids = list(tiny.PROMPT)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        newest = cycle.newest
        assert newest is not None
        self._ids[newest.position :] = [newest.token_id]
        draft = super().draft(cycle, sampler)
        self.said.append((list(self._ids), draft.token_id))
        return draft


def run(decoder: Decoder, drafter: Noted) -> list[Step]:
    """The steps of one answer, which is the target's own."""
    request = tiny.greedy(tiny.PROMPT, 30)
    steps = list(generate(decoder, STAGES, drafter, request))
    assert [token for step in steps for token in step.token_ids] == list(decode(decoder, request))
    return steps


def test_the_rest_of_the_target_as_a_head_is_always_right(decoder: Decoder) -> None:
    shifted = {index: decoder.weights[index + 2] for index in range(4)}
    steps = run(decoder, Noted(replace(decoder, layers=range(4), weights=shifted, embeddings_VM=None)))
    assert sum(step.accepted for step in steps) == sum(step.judged for step in steps) == 29


def test_cached_drafts_equal_drafts_from_scratch(decoder: Decoder) -> None:
    drafter = Noted(build_exit(random_exit(decoder, STAGES, 3), decoder, STAGES))
    steps = run(decoder, drafter)
    assert sum(step.accepted for step in steps) < 20  # so there were many a roll back
    assert len(drafter.said) > 40
    for ids, token in drafter.said:
        assert token == alone(decoder, drafter._head, ids)


def alone(decoder: Decoder, head: Decoder, ids: list[int]) -> int:
    """The head's word on the next token, everything computed anew."""
    below = decoder.new_cache(len(ids), STAGES[0])
    rows_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids)), 0, below, STAGES[0])
    rows_SM, _ = head.forward(rows_SM, 0, head.new_cache(len(ids)))
    return int(head.logits(rows_SM[-1:])[0].argmax())


def written(decoder: Decoder, path: Path, tensors: Mapping[str, Tensor | None] | None = None, **config: Any) -> Path:
    """A folder with a random head, changed as asked; None takes something out."""
    file = random_exit(decoder, STAGES, 7)
    content = {**file.tensors, **(tensors or {})}
    path.mkdir()
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path / "model.safetensors")
    told = {**file.config.model_dump(), "method": "ppsd", **config}
    (path / "config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return path


def test_a_folder_there_and_back(decoder: Decoder, tmp_path: Path) -> None:
    own = {"norm.weight": torch.full((32,), 2.0), "lm_head.weight": torch.randn(262, 32)}
    file = read_exit(written(decoder, tmp_path / "head", own, trained_tokens=5, num_stages=3))
    assert (file.config.trained_tokens, file.config.num_stages, len(file.sha256)) == (5, 3, 64)
    head = build_exit(file, decoder, STAGES)
    assert head.final_norm is not None
    assert torch.equal(head.final_norm.weight_M, own["norm.weight"])
    assert build_exit(random_exit(decoder, STAGES, 7), decoder, STAGES).head is decoder.head


def test_head_norms_belong_to_the_layer_where_the_file_has_them(decoder: Decoder, tmp_path: Path) -> None:
    size = decoder.config.head_dim
    norms = {f"layers.0.self_attn.{name}_norm.weight": torch.ones(size) for name in "qk"}
    assert build_exit(read_exit(written(decoder, tmp_path / "a", norms)), decoder, STAGES).weights[0].head_norms
    half = {"layers.0.self_attn.q_norm.weight": torch.ones(size)}
    with pytest.raises(InputError, match=r"k_norm\.weight is missing"):
        build_exit(read_exit(written(decoder, tmp_path / "b", half)), decoder, STAGES)


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        ({"layers.0.mlp.up_proj.weight": None}, {}, r"tensor layers\.0\.mlp\.up_proj\.weight is missing"),
        ({"layers.0.mlp.up_proj.weight": torch.zeros(1, 2)}, {}, r"has shape \[1, 2\], expected \[\d+, 32\]"),
        ({"fc.weight": torch.zeros(1)}, {}, r"unknown tensor fc\.weight"),
        ({}, {"hidden_size": 64}, r"config\.hidden_size is 64, but here it is 32"),
        ({}, {"exit_layer": 3}, r"config\.exit_layer is 3, but here it is 2: give ppsd\.stages"),
        ({}, {"num_layers": 2}, r"tensor layers\.1\."),
        ({}, {"method": "spd"}, "is a drafter for 'spd', not for ppsd"),
        ({}, {"method": None}, "is not a PPSD drafter: its config names no method"),
    ],
)
def test_what_does_not_fit_is_refused(
    decoder: Decoder, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        build_exit(read_exit(written(decoder, tmp_path / "head", tensors, **config)), decoder, STAGES)
