"""Medusa's heads against the method written out in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench.models.decoder import Decoder
from spdbench_backends.medusa.drafter import build_medusa
from spdbench_backends.medusa.formats import MedusaFile
from tests import tiny
from tests.unit.draft_verify.medusa_files import heads

IDS = (200, 3, 7, 261, 0, 99)


def loud(num_blocks: int, linears: int, ids: tuple[int, ...] | None, bias: bool) -> MedusaFile:
    """Four heads with weights large enough to tell things apart."""
    return heads(4, num_blocks, linears, ids, bias)


def reference(file: MedusaFile, target: Decoder, state_M: Tensor, k: int) -> Tensor:
    """Head k's logits over the draft vocabulary."""
    tensors, num_blocks = file.tensors, file.counts[1]
    for j in range(num_blocks):
        weight_MM, bias_M = (tensors.get(f"{k}.{j}.linear.{part}") for part in ("weight", "bias"))
        assert weight_MM is not None
        inner_M = weight_MM @ state_M + (0.0 if bias_M is None else bias_M)
        state_M = state_M + inner_M * torch.sigmoid(inner_M)
    own = tensors.get("lm_head.weight", tensors.get(f"{k}.{num_blocks}.weight"))
    if own is not None:
        return linear(state_M, own)
    ids = file.config.draft_token_ids
    assert target.head is not None
    rows = target.head.plain()
    return linear(state_M, rows if ids is None else rows[list(ids)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("linears", [0, 1, 4])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_logits_are_the_methods_own(
    decoder: Decoder, num_blocks: int, linears: int, ids: tuple[int, ...] | None, bias: bool
) -> None:
    file = loud(num_blocks, linears, ids, bias)
    weights = build_medusa(file, decoder)
    state_1M = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    for used in (1, 3, 4):
        expected = torch.stack([reference(file, decoder, state_1M[0], k) for k in range(used)])
        torch.testing.assert_close(weights.logits(state_1M, used), expected, atol=1e-4, rtol=1e-5)


def test_draft_indices_become_token_ids(decoder: Decoder) -> None:
    some, every = (build_medusa(loud(1, 0, ids, True), decoder) for ids in (IDS, None))
    indices = torch.tensor([[0, 5], [1, 1]])
    assert some.vocabulary.to_target(indices).tolist() == [[200, 99], [3, 3]]
    assert every.vocabulary.to_target(indices).tolist() == indices.tolist()


def test_bytes_are_those_of_blocks_and_linear_layers(decoder: Decoder) -> None:
    assert build_medusa(loud(2, 4, None, True), decoder).nbytes == 4 * (4 * 2 * (32 * 32 + 32) + 4 * 262 * 32)
    assert build_medusa(loud(1, 0, IDS, False), decoder).nbytes == 4 * (4 * 32 * 32 + len(IDS) * 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_heads_take_the_targets_dtype(tiny_model: Path, dtype: str) -> None:
    target = tiny.load(tiny_model, dtype).own_decoder
    weights = build_medusa(loud(1, 1, IDS, True), target)
    assert weights.logits(torch.ones(1, 32, dtype=target.dtype), 2).dtype == target.dtype
