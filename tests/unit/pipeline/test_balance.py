"""Stages are cut by what was measured, with the head in the last and the drafter beside the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spdbench.models.decoder import Decoder
from spdbench.pipeline import balance
from spdbench.pipeline.balance import balanced_stages


@pytest.mark.parametrize(
    ("head_s", "drafting_s", "counts"),
    [(0.0, 0.0, [3, 3]), (2.0, 0.0, [4, 2]), (9.0, 0.0, [5, 1]), (0.0, 4.0, [1, 5]), (2.0, 2.0, [3, 3])],
)
def test_the_cut_follows_the_times(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, head_s: float, drafting_s: float, counts: list[int]
) -> None:
    """A layer takes a second here."""
    asked = []

    def timed(work: Callable[[], Any], *, threads: int) -> float:
        work()
        asked.append(threads)
        return 6.0 if len(asked) == 1 else head_s

    monkeypatch.setattr(balance, "median_seconds", timed)
    assert [len(stage) for stage in balanced_stages(decoder, 2, 5, drafting_s)] == counts
    assert asked == [5, 5]


def test_measured_for_real_all_layers_are_there(decoder: Decoder) -> None:
    stages = balanced_stages(decoder, 3, 1)
    assert [layer for stage in stages for layer in stage] == list(range(6))
