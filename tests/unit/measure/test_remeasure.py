"""`--remeasure`: what the machine disturbed is measured again, bounded, and every measurement is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.results.machine_load import MachineLoad
from spdbench.judge.results.schema import Run
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.request_turn import Gauges
from spdbench.measure.runner import Candidate, Runner
from spdbench.types import GenerationRequest, Step
from tests.builders import make_load
from tests.mock_backend import MockBackend, Watcher, WordChat, one_by_one
from tests.unit.measure.test_runner import PROMPTS, never, workload

IDLE, BUSY, BUSIER = (make_load(others) for others in (0.01, 0.3, 0.6))


class Killed(BaseException):
    pass


class FakeWatch:
    """A machine whose load is known beforehand; after the last one the process is killed."""

    def __init__(self, *loads: MachineLoad) -> None:
        self._loads = list(loads)

    def read(self) -> dict[str, int]:
        return {}

    def load(self, *_: Any) -> MachineLoad:
        if not self._loads:
            raise Killed
        return self._loads.pop(0)


def measured(
    path: Path, remeasure: int, *loads: MachineLoad, script: Any = one_by_one, resume: bool = False
) -> tuple[Journal, MockBackend]:
    """One prompt on a machine with these `loads`, one a measurement."""
    prompts = PROMPTS[1:2]
    journal = resume_journal(path, {}) if resume else create_journal(path, "now", {})
    backend = MockBackend(script)
    gauges = replace(Gauges(), watch=FakeWatch(*loads))  # type: ignore[arg-type]
    facts = workload(prompts=prompts, remeasure=remeasure)
    try:
        Runner(facts, [Candidate("first", backend, journal, gauges)], WordChat(), never, Watcher()).run()
    except Killed:
        journal.close()
        raise
    return journal, backend


def only_run(path: Path, remeasure: int, *loads: MachineLoad, **more: Any) -> Run:
    [run] = measured(path, remeasure, *loads, **more)[0].runs()
    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "j.journal.jsonl"


def test_without_the_option_a_disturbed_request_is_measured_once_and_says_so(path: Path) -> None:
    run = only_run(path, 0, BUSY)
    assert run.machine == BUSY
    assert run.set_aside == []
    assert b"set_aside" not in path.read_bytes().splitlines()[0]


def test_a_quiet_machine_is_measured_once(path: Path) -> None:
    assert only_run(path, 3, IDLE).set_aside == []


@pytest.mark.parametrize(
    ("loads", "counts", "aside"),
    [
        ([BUSY, IDLE], IDLE, [BUSY]),
        ([BUSIER, BUSY, IDLE], IDLE, [BUSIER, BUSY]),
        ([BUSY, BUSIER, BUSIER], BUSY, [BUSIER, BUSIER]),
    ],
)
def test_the_least_disturbed_measurement_counts_and_the_others_are_kept(
    path: Path, loads: Sequence[MachineLoad], counts: MachineLoad, aside: Sequence[MachineLoad]
) -> None:
    run = only_run(path, 2, *loads)
    assert run.machine == counts
    assert [each.machine for each in run.set_aside] == aside
    assert all(each.decode_s is not None for each in run.set_aside)


def test_both_measurements_stay_in_the_journal(path: Path) -> None:
    journal, backend = measured(path, 1, BUSY, IDLE)
    journal.close()
    lines = path.read_bytes().splitlines()
    assert [line[:12] for line in lines[1:]] == [b'{"set_aside"', b'{"run":{"pro']
    assert len(backend.requests) == 2
    assert backend.requests[0] == backend.requests[1]


def test_a_kill_loses_no_measurement_and_gives_no_further_ones(path: Path) -> None:
    with pytest.raises(Killed):
        measured(path, 2, BUSY)
    run = only_run(path, 2, BUSIER, BUSIER, resume=True)
    assert run.machine == BUSY
    assert [each.machine for each in run.set_aside] == [BUSIER, BUSIER]


def test_a_failure_is_never_measured_away(path: Path) -> None:
    calls = []

    def crash_later(request: GenerationRequest) -> Sequence[Step]:
        calls.append(request)
        if len(calls) == 2:
            raise OSError("gone")
        return one_by_one(request)

    run = only_run(path, 3, BUSY, IDLE, IDLE, script=crash_later)
    assert run.error == "OSError: gone"
    assert len(calls) == 2
