"""Data from targets on transformers' layers: one conversation at a time, with plain decoding's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.cli.distill.filling import new_slots
from spdbench.training.distill.batched import SingleSlot
from spdbench.training.distill.continuous import Batch
from tests import tiny
from tests.unit.training.distill.test_batched import LIMITS, PROMPTS, scripts, vanilla


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "phi3"])
def test_greedy_rows_are_vanillas_token_for_token(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = tiny.load(tiny.make_model(tmp_path, family)).decoder
    (slot,) = new_slots(decoder, 128, 1000, 128, 2)
    assert isinstance(slot, SingleSlot)
    assert "one conversation at a time" in capsys.readouterr().err
    found = dict(filter(None, Batch(slot, scripts()).results()))
    expected = [vanilla(decoder, *pair) for pair in zip(PROMPTS, LIMITS, strict=True)]
    assert [found[number] for number in range(len(PROMPTS))] == expected
