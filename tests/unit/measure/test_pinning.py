"""Threads that are kept apart for a while, and let go again."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from spdbench.measure import pinning
from spdbench.measure.pinning import cores_first, pinned


def burn(seconds: float = 0.02) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_busiest_thread_is_pinned_and_let_go_again() -> None:
    allowed = os.sched_getaffinity(0)
    with pinned(burn, 1):
        assert os.sched_getaffinity(0) == {cores_first(sorted(allowed))[0]}
    assert os.sched_getaffinity(0) == allowed


def test_thread_that_sleeps_is_left_alone() -> None:
    allowed, done = os.sched_getaffinity(0), threading.Event()
    sleeper = threading.Thread(target=done.wait)
    sleeper.start()
    try:
        with pinned(burn, 1):
            assert os.sched_getaffinity(sleeper.native_id or 0) == allowed
    finally:
        done.set()
        sleeper.join()


def test_an_error_inside_lets_the_threads_go() -> None:
    allowed = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), pinned(burn, 1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == allowed


def test_where_threads_cannot_be_pinned_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    allowed = os.sched_getaffinity(0)
    with pinned(burn, 1):
        assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        (["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"], [0, 1, 2, 3, 4, 5, 6, 7]),
        (["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"], [0, 2, 4, 6, 1, 3, 5, 7]),
        ([str(processor) for processor in range(8)], list(range(8))),
    ],
)
def test_one_processor_of_each_core_comes_first(
    siblings: list[str], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processor, text in enumerate(siblings):
        (tmp_path / f"{processor}").write_text(text + "\n", encoding="ascii")
    monkeypatch.setattr(pinning, "SIBLINGS", f"{tmp_path}/{{}}")
    assert cores_first(range(8)) == expected


def test_processor_whose_sibling_is_not_ours_counts_as_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processor in range(4):
        (tmp_path / f"{processor}").write_text("0-1" if processor < 2 else "2-3", encoding="ascii")
    monkeypatch.setattr(pinning, "SIBLINGS", f"{tmp_path}/{{}}")
    assert cores_first([1, 2, 3]) == [1, 2, 3]


def test_processors_that_linux_measures_nothing_of_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "SIBLINGS", f"{tmp_path}/{{}}")
    assert cores_first([3, 5]) == [3, 5]


def test_nothing_is_pinned_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    with pinned(lambda: None, 1):
        pass
