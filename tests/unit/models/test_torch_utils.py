"""Work is timed round by round, with the threads asked for and no others afterwards."""

from __future__ import annotations

import pytest
import torch

from spdbench.models.torch_utils import median_seconds


def test_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = [0.0], iter((9.0, 1.0, 2.0))
    monkeypatch.setattr("spdbench.models.torch_utils.perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(durations)

    assert median_seconds(work, rounds=3) == 2.0


def test_what_comes_between_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = [0.0], list[str]()
    monkeypatch.setattr("spdbench.models.torch_utils.perf_counter", lambda: now[0])

    def takes(name: str, seconds: float) -> None:
        done.append(name)
        now[0] += seconds

    assert median_seconds(lambda: takes("work", 1.0), rounds=2, between=lambda: takes("between", 5.0)) == 1.0
    assert done == ["between", "work"] * 2


def test_threads_are_lent() -> None:
    before, seen = torch.get_num_threads(), set[int]()

    def work() -> None:
        seen.add(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        median_seconds(work, threads=before + 1)
    assert seen == {before + 1}
    assert torch.get_num_threads() == before
