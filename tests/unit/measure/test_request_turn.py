"""From a backend's spans to the figures of a run: asked for after each request, kept by the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.results.lanes import BubbleParts
from spdbench.judge.results.schema import Run
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.runner import Candidate, Runner
from spdbench.types import GenerationRequest, Span, Step
from tests.builders import make_backend, summarise
from tests.mock_backend import MS, FakeTime, MockBackend, MockPipelineSpans, MockSpans, Watcher, WordChat
from tests.unit.measure.test_runner import never, workload

DRAFT_VERIFY = {"useful": 0.6, "draft": 0.2, "verify": 0.1, "host": 0.05, "unattributed": 0.05}


@pytest.fixture(autouse=True)
def _fake_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdbench.measure.clock.time", MockSpans.time)


def journal_of(backend: MockBackend, path: Path, *, resume: bool = False, max_new_tokens: int = 9) -> Journal:
    journal = resume_journal(path, {}) if resume else create_journal(path, "now", {})
    candidate = Candidate("first", backend, journal)
    try:
        Runner(workload(max_new_tokens=max_new_tokens), [candidate], WordChat(), never, Watcher()).run()
    except BaseException:
        journal.close()
        raise
    return journal


def runs_of(backend: MockBackend, folder: Path, max_new_tokens: int = 9) -> list[Run]:
    return list(journal_of(backend, folder / "a.journal.jsonl", max_new_tokens=max_new_tokens).runs())


def nonzero(parts: BubbleParts | None) -> dict[str, Any]:
    assert parts is not None
    return {name: pytest.approx(share) for name, share in parts if share}


def test_a_drafting_backend_has_the_parts_of_its_decode_time_but_no_cycles(tmp_path: Path) -> None:
    runs = runs_of(MockSpans(), tmp_path)
    assert len(runs) == 4
    for run in runs:
        assert nonzero(run.bubble) == DRAFT_VERIFY
        assert run.full_cycles is None
        assert run.cycles_by_fill is None
        assert run.decode_s == pytest.approx(0.4)


def test_a_pipeline_has_the_parts_over_all_lanes_and_its_full_cycles(tmp_path: Path) -> None:
    run = runs_of(MockPipelineSpans(), tmp_path, max_new_tokens=5)[0]
    # six cycles: lanes are at work for 50, 130 and four times 190, wait for the slowest and for the host
    lanes_ms = 3 * 600
    fill, work, imbalance = 200 + 100, 50 + 130 + 4 * 190, 30 + 4 * (30 + 20)
    host = 16 + 2 * 16 + 4 * 3 * 16
    parts = {"useful": work, "fill": fill, "imbalance": imbalance, "host": host}
    parts["unattributed"] = lanes_ms - sum(parts.values())
    assert nonzero(run.bubble) == {name: ms / lanes_ms for name, ms in parts.items()}
    assert run.full_cycles is not None
    assert run.full_cycles.model_dump() == pytest.approx({"num": 4, "stage_s": 0.32, "wall_s": 0.4})
    assert run.cycles_by_fill is not None
    assert run.cycles_by_fill.num == [0, 1, 1, 4]
    assert run.cycles_by_fill.wall_s == pytest.approx([0, 0.1, 0.1, 0.4])
    assert run.cycles_by_fill.stage_s == pytest.approx([0, 0.05, 0.08, 0.32])
    assert run.cycles_by_fill.drafts == [0] * 4
    assert run.parts is not None
    assert run.parts.layer is not None
    assert run.parts.layer.s == pytest.approx(work / 1000)
    overall = summarise([run], make_backend("pipeline"), None).overall
    assert overall["cycle_efficiency"] == pytest.approx(0.8)
    assert overall["control_s_per_cycle"] == pytest.approx(0.02)


def test_work_past_the_last_token_that_counts_does_not_count(tmp_path: Path) -> None:
    for run in runs_of(MockSpans(), tmp_path, max_new_tokens=2):
        assert nonzero(run.bubble) == DRAFT_VERIFY


def test_a_backend_without_spans_has_no_figures(tmp_path: Path) -> None:
    assert {run.bubble for run in runs_of(MockBackend(), tmp_path)} == {None}


def test_one_token_takes_no_decode_time_to_divide(tmp_path: Path) -> None:
    assert {run.bubble for run in runs_of(MockSpans(), tmp_path, max_new_tokens=1)} == {None}


class Broken(MockSpans):
    """Its spans overlap on its lane."""

    def spans(self) -> Sequence[Span]:
        return [Span(0, "target", 0, 10, 0, kept=True), Span(0, "head", 5, 15, 0, kept=True)]


def test_spans_that_cannot_be_fail_the_prompt(tmp_path: Path) -> None:
    errors = [run.error or "" for run in runs_of(Broken(), tmp_path)]
    assert errors[-1].startswith("ValueError: spans: head on lane 0 from 5 to 15 ns begins before the work")


class Asked(MockSpans):
    """Notes when its spans are asked for."""

    def spans(self) -> Sequence[Span]:
        self.time.spend(500 * MS)
        self.log.append("spans")
        return super().spans()

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.log.append("generate")
        return super().generate(request)


def test_spans_are_asked_for_after_the_clock_has_stopped(tmp_path: Path) -> None:
    backend = Asked()
    runs = runs_of(backend, tmp_path)
    assert backend.log == ["prepare", "generate", "spans"] * 4
    assert [run.decode_s for run in runs] == pytest.approx([0.4] * 4)


class DiesOnTheThird(MockSpans):
    class Killed(BaseException):
        pass

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        if len(self.requests) == 2:
            raise self.Killed
        return super().generate(request)


def test_figures_of_what_was_finished_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "a.journal.jsonl"
    with pytest.raises(DiesOnTheThird.Killed):
        journal_of(DiesOnTheThird(), path)
    left = path.read_bytes()
    journal = journal_of(MockSpans(), path, resume=True)
    assert path.read_bytes().startswith(left)
    assert [nonzero(run.bubble) for run in journal.runs()] == [DRAFT_VERIFY] * 4


def test_the_fake_clock_stands_still_by_itself() -> None:
    clock = FakeTime()
    assert clock.perf_counter_ns() == clock.perf_counter_ns()
    assert clock.spend(5) == (1_000_000_000, 1_000_000_005)
