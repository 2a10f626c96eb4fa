"""Measured costs are kept once, for a model, a dtype and a machine, and read by every later run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from spdbench.decoding import stored_costs
from spdbench.decoding.stored_costs import StoredCosts
from spdbench.models.target import Target
from tests import tiny

KEYS = ["forward rows=1", "forward rows=2"]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


def never() -> Sequence[float]:
    raise AssertionError("measured although the costs are stored")


def test_what_was_measured_once_is_read(target: Target) -> None:
    assert StoredCosts(target, 1).seconds(KEYS, lambda: [1.0, 2.0]) == [1.0, 2.0]
    assert StoredCosts(target, 1).seconds(KEYS[::-1], never) == [2.0, 1.0]


def test_a_missing_cost_is_added_and_the_others_stay(target: Target) -> None:
    StoredCosts(target, 1).seconds(KEYS[:1], lambda: [1.0])
    assert StoredCosts(target, 1).seconds(KEYS, lambda: [8.0, 9.0]) == [1.0, 9.0]


def test_another_number_of_threads_has_its_own_costs(target: Target) -> None:
    StoredCosts(target, 1).seconds(KEYS, lambda: [1.0, 2.0])
    assert StoredCosts(target, 2).seconds(KEYS, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_another_machine_has_its_own_costs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    StoredCosts(target, 1).seconds(KEYS, lambda: [1.0, 2.0])
    monkeypatch.setattr(stored_costs, "cpu_model", lambda: "another processor")
    assert StoredCosts(target, 1).seconds(KEYS, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_another_dtype_has_its_own_costs(target: Target, tiny_model: Path) -> None:
    StoredCosts(target, 1).seconds(KEYS, lambda: [1.0, 2.0])
    assert StoredCosts(tiny.load(tiny_model, "bfloat16"), 1).seconds(KEYS, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_after_forgetting_everything_is_measured_anew(target: Target) -> None:
    stored = StoredCosts(target, 1)
    stored.forget()
    stored.seconds(KEYS, lambda: [1.0, 2.0])
    stored.forget()
    assert stored.seconds(KEYS, lambda: [3.0, 4.0]) == [3.0, 4.0]


def test_a_damaged_profile_is_replaced(target: Target) -> None:
    stored = StoredCosts(target, 1)
    stored.path.parent.mkdir(parents=True)
    stored.path.write_text('{"schema": "spdbench.profile/1"')
    assert stored.seconds(KEYS, lambda: [1.0, 2.0]) == [1.0, 2.0]
    assert stored.seconds(KEYS, never) == [1.0, 2.0]


def test_a_folder_that_cannot_be_written_is_reported_and_does_no_harm(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPDBENCH_PROFILES", str(tmp_path / "file" / "profiles"))
    assert StoredCosts(target, 1).seconds(KEYS, lambda: [1.0, 2.0]) == [1.0, 2.0]
    assert "measured costs cannot be kept" in capsys.readouterr().err


def test_of_two_at_once_one_measures_and_the_other_reads(target: Target) -> None:
    begun, other_asks, calls = threading.Event(), threading.Event(), list[None]()

    def measure() -> Sequence[float]:
        calls.append(None)
        begun.set()
        other_asks.wait(10)
        return [float(len(calls)), 2.0]

    found: list[list[float]] = []
    first = threading.Thread(target=lambda: found.append(StoredCosts(target, 1).seconds(KEYS, measure)))
    second = threading.Thread(target=lambda: found.append(StoredCosts(target, 1).seconds(KEYS, measure)))
    first.start()
    assert begun.wait(10)
    second.start()
    second.join(0.5)
    assert second.is_alive()  # it waits for the first, or would have measured by itself
    other_asks.set()
    for thread in (first, second):
        thread.join(20)
    assert found == [[1.0, 2.0]] * 2


def test_a_profile_says_what_it_is_of(target: Target) -> None:
    found = StoredCosts(target, 1).read()
    assert (found.model.sha256, found.model.num_layers, found.model.dtype) == (target.files.sha256, 6, "float32")
    assert found.origin == "measured"
    assert found.seconds == {}
