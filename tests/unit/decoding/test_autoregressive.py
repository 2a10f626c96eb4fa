"""Decoding by replays leaves nothing at work behind it."""

from __future__ import annotations

import pytest
from torch import Tensor

from spdbench.decoding.autoregressive import CapturedDecoding, decode
from spdbench.models.cuda.captured_function import Readback
from spdbench.models.decoder import Decoder
from tests import tiny


@pytest.mark.parametrize("how", ["end of sequence", "closed"])
def test_the_newest_step_is_waited_for_though_nobody_wants_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    decoding = CapturedDecoding(decoder, 64)
    given: list[int] = []
    read: list[int] = []
    start, read_one = Readback.start, Readback.read

    def started(self: Readback, numbers: Tensor) -> int:
        given.append(start(self, numbers))
        return given[-1]

    def read_too(self: Readback, copy_index: int) -> list[int]:
        read.append(copy_index)
        return read_one(self, copy_index)

    monkeypatch.setattr(Readback, "start", started)
    monkeypatch.setattr(Readback, "read", read_too)
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 3)))
    ends = {answer[2]} if how == "end of sequence" else set()
    tokens = decoding.decode(tiny.greedy(tiny.PROMPT, 20, frozenset(ends)))
    found = [next(tokens) for _ in range(3)]
    assert found == answer
    assert len(given) == len(read) + 1, "the next step is at work"
    if ends:
        assert list(tokens) == []
    tokens.close()  # type: ignore[attr-defined]
    assert read == given
