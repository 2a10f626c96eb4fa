"""Scores from the command line to the table, on a tiny model that knows nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from spdbench.errors import NotRunError
from spdbench.judge.results.schema import Result, read_result
from spdbench.judge.score import Scorer
from tests.cli.run_helpers import Said, spdbench, write_suite

SUMS = [{"id": f"s{i}", "category": "maths", "turns": [f"Say {i}."], "reference": str(i)} for i in range(3)]
CODE = [{"id": "c0", "category": "code", "turns": ["Write f."], "reference": "assert f() == 1"}]
BOTH = {"maths": "gsm8k", "code": "humaneval"}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setenv("COLUMNS", "160")


class Runs:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder

    def __call__(self, rows: Sequence[Mapping[str, object]], score: object, *words: str) -> Said:
        suite = write_suite(self.folder, prompts={"source": [{"inline": [dict(row) for row in rows]}]}, score=score)
        common = ("-m", self.model, "--dtype", "float32", "--results", self.folder / "results", "--threads", "1")
        return spdbench("run", suite, *common, *words)

    def result(self, label: str) -> Result:
        return read_result(self.folder / f"results/mini__{label}__{self.model.name}.json")


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_model, tmp_path)


def scores(result: Result) -> list[float | None]:
    return [entry.score for entry in result.runs]


def test_lossless_backends_score_alike_answer_by_answer(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "__call__", lambda *args: float(len(args[3]) % 2))
    said = run(SUMS, "gsm8k", "-b", "vanilla", "-b", "spd", "-o", "spd.executor=inline", "--drafter", "oracle:0.5")
    assert said.code == 0, said.err
    assert scores(run.result("vanilla")) == scores(run.result("spd")) != [None] * 3
    vanilla, spd = (run.result(label).summary.overall for label in ("vanilla", "spd"))
    assert (vanilla["score"], vanilla["score_ci"]) == (spd["score"], spd["score_ci"])
    assert vanilla["num_scored"] == 3
    detailed = " ".join(spdbench("compare", run.folder / "results", "--details").out.split())
    assert "score: the mean over the answers that have one (3 of 3)" in detailed


def test_answers_without_a_number_score_nothing(run: Runs) -> None:
    said = run(SUMS, "gsm8k", "-b", "vanilla", "--max-new-tokens", "1")
    assert said.code == 0, said.err
    assert scores(run.result("vanilla")) == [0.0] * 3
    assert "0.00 [0.00, 0.00]" in spdbench("compare", run.folder / "results", "--details").out


def test_code_is_left_unscored_with_a_note_unless_it_is_allowed(run: Runs) -> None:
    said = run([*SUMS, *CODE], BOTH, "-b", "vanilla")
    assert "NOTE: answers to 1 prompt for code are not scored" in said.err
    assert "--allow-code-execution" in said.err
    assert scores(run.result("vanilla"))[3] is None
    said = run([*SUMS, *CODE], BOTH, "-b", "vanilla", "--allow-code-execution")
    assert said.code == 0, said.err
    assert "NOTE: answers that are code are run, each by itself;" in said.err
    assert scores(run.result("vanilla"))[3] == 0.0


def test_code_that_could_not_be_run_is_left_unscored_with_a_note(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> bool:
        raise NotRunError("Python does not start")

    monkeypatch.setattr("spdbench.cli.run.command.passes", fail)
    said = run(CODE, "humaneval", "-b", "vanilla", "--allow-code-execution")
    assert said.code == 0, said.err
    assert "NOTE: an answer has no score: Python does not start" in said.err
    assert scores(run.result("vanilla")) == [None]


def test_resuming_with_other_rules_for_scores_is_refused(run: Runs) -> None:
    run(CODE, "humaneval", "-b", "vanilla")
    said = run(CODE, "humaneval", "-b", "vanilla", "--allow-code-execution", "--resume")
    assert said.code == 2
    assert "is a finished run with other settings" in said.err


def test_suite_without_references_is_refused_before_anything_is_loaded(run: Runs) -> None:
    bare = [{key: value for key, value in row.items() if key != "reference"} for row in SUMS]
    said = run(bare, "gsm8k", "-b", "vanilla")
    assert said.code == 2
    assert "score: gsm8k needs a reference for each prompt, and there is none. Name what holds them" in said.err
    assert "Traceback" not in said.err
