"""Divergence by class: ties, near ties, real differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.decoding.audit import classify_difference
from spdbench.decoding.autoregressive import decode
from spdbench.models.decoder import Decoder
from spdbench.models.layers import LayerWeights
from spdbench.models.rotary import Rotary
from tests import tiny

PROMPT = tuple(range(60, 70))


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return tiny.load(tiny_model).decoder


def test_equal_outputs_are_identical(decoder: Decoder) -> None:
    assert classify_difference(decoder, PROMPT, [1, 2], [1, 2], 1) == "identical"


def test_another_token_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    wrong = [*ids[:5], (ids[5] + 1) % 262, *ids[6:]]
    assert classify_difference(decoder, PROMPT, ids, wrong, 4) == "real"


def test_an_output_that_ends_early_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    assert classify_difference(decoder, PROMPT, ids, ids[:6], 1) == "real"


def test_equal_logits_are_a_tie(decoder: Decoder) -> None:
    assert decoder.head_VM is not None
    ids = list(decode(decoder, tiny.greedy(PROMPT, 3)))
    head = decoder.head_VM.clone()
    twin = (ids[2] + 1) % 262
    head[twin] = head[ids[2]]
    tied = dataclasses.replace(decoder, head_VM=head)
    assert classify_difference(tied, PROMPT, ids, [*ids[:2], twin], 1) == "tie"


def test_a_gap_below_the_noise_floor_is_a_near_tie(decoder: Decoder) -> None:
    """In bfloat16, four tokens at a time give logits that differ from one at a time; a gap within that is no fault."""
    low = _bfloat16(decoder)
    assert low.head_VM is not None
    ids = list(decode(low, tiny.greedy(PROMPT, 6)))
    twin = (ids[5] + 1) % 262
    head = low.head_VM.clone()
    head[twin] = head[ids[5]]
    head[twin, 0] += 2.0**-9  # about one unit in the last place of one weight
    near = dataclasses.replace(low, head_VM=head)
    found = classify_difference(near, PROMPT, ids, [*ids[:5], twin], 4)
    assert found in ("tie", "near_tie")
    assert classify_difference(near, PROMPT, ids, [*ids[:5], (twin + 7) % 262], 4) == "real"


def _bfloat16(decoder: Decoder) -> Decoder:
    def lower(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(torch.bfloat16)

    def lower_layer(layer: LayerWeights) -> LayerWeights:
        values: dict[str, Any] = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
        values.update({name: lower(value) for name, value in values.items() if isinstance(value, Tensor)})
        return LayerWeights(**values)

    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 8, 2) / 8))
    return dataclasses.replace(
        decoder,
        weights={index: lower_layer(layer) for index, layer in decoder.weights.items()},
        rotary=Rotary(frequencies, 1.0, torch.bfloat16, decoder.device),
        embeddings_VM=lower(decoder.embeddings_VM),
        final_norm_M=lower(decoder.final_norm_M),
        head_VM=lower(decoder.head_VM),
        dtype=torch.bfloat16,
    )
