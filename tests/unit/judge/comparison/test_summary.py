"""A summary over suites: which tables it joins, and its two means with their intervals."""

from __future__ import annotations

import io
import json
from math import exp, log, sqrt
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.comparison.summary import LabelSummary, mean_interval, summaries
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.results.schema import Run
from spdbench.render.table import FORMATS, render
from tests.builders import MS, TRAINED, chunk_steps, make_backend, make_result, make_run, vanilla_steps

STEP = {"quick": 20, "gsm8k": 30}
"""Milliseconds of plain decoding's steps."""


def runs(steps: Any, count: int = 10) -> list[Run]:
    return [make_run(steps, prompt=f"p{i}") for i in range(count)]


def results(suite: str, labels: tuple[str, ...] = ("eagle",), count: int = 10, **more: Any) -> list[LoadedResult]:
    plain = make_result(runs(vanilla_steps(9, step_ns=STEP[suite] * MS), count), suite=suite, **more)
    drafted = [
        make_result(
            runs(chunk_steps([1, 4, 4], step_ns=50 * MS), count),
            make_backend("draft_verify", label=label),
            drafter=TRAINED,
            suite=suite,
            **more,
        )
        for label in labels
    ]
    return [load(result, f"{suite}__{result.backend.label}.json") for result in (plain, *drafted)]


def both(**more: Any) -> list[Table]:
    return compare([*results("quick", **more), *results("gsm8k", **more)])


def eagle(tables: list[Table]) -> LabelSummary:
    (summary,) = summaries(tables)
    return next(found for found in summary.labels if found.label == "eagle")


def test_both_means_are_of_the_suites_speedups() -> None:
    tables = both()
    found = eagle(tables)
    speedups = [next(row.metrics["speedup"] for row in table.rows if row.label == "eagle") for table in tables]
    assert [each.speedup for each in found.suites] == speedups
    assert speedups[0] != pytest.approx(speedups[1])
    assert found.mean == pytest.approx(exp((log(speedups[0]) + log(speedups[1])) / 2))
    assert found.arithmetic_mean == pytest.approx(sum(speedups) / 2)
    assert found.mean is not None
    assert found.interval is not None
    assert found.interval[0] <= found.mean <= found.interval[1]
    (summary,) = summaries(tables)
    assert summary.suites == ("quick", "gsm8k")
    assert [each.label for each in summary.labels] == ["vanilla", "eagle"]
    plain = summary.labels[0]
    assert (plain.is_baseline, plain.mean, plain.interval) == (True, None, None)


def test_an_interval_adds_its_distances_as_standard_errors_do() -> None:
    low, high = mean_interval([1.0, 2.0], [(0.7, 1.1), (1.6, 2.3)])
    assert low == pytest.approx(1.5 - sqrt(0.3**2 + 0.4**2) / 2)
    assert high == pytest.approx(1.5 + sqrt(0.1**2 + 0.3**2) / 2)


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    rng, truth, held = np.random.default_rng(1), np.array([1.2, 0.9, 1.6]), 0
    for _ in range(4000):
        spread = np.array([0.05, 0.02, 0.2])
        values = truth + spread * rng.standard_normal(3)
        intervals = [(value - 1.96 * each, value + 1.96 * each) for value, each in zip(values, spread, strict=True)]
        low, high = mean_interval(list(values), intervals)
        held += low <= truth.mean() <= high
    assert 0.94 < held / 4000 < 0.96


def test_a_label_that_lacks_a_suite_has_no_mean() -> None:
    tables = compare([*results("quick", ("eagle", "medusa")), *results("gsm8k")])
    (summary,) = summaries(tables)
    medusa = summary.labels[-1]
    assert medusa.label == "medusa"
    assert medusa.suites[1].speedup is None
    assert (medusa.mean, medusa.arithmetic_mean, medusa.interval) == (None, None, None)
    assert eagle(tables).mean is not None


def test_one_conversation_gives_means_without_intervals() -> None:
    found = eagle(both(count=1))
    assert found.mean is not None
    assert (found.interval, found.arithmetic_interval) == (None, None)


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"temperature": 1.0}, {"machine": "machine-b"}])
def test_other_work_is_not_joined(other: dict[str, Any]) -> None:
    assert summaries(compare([*results("quick"), *results("gsm8k", **other)])) == []


def test_one_suite_has_no_summary() -> None:
    assert summaries(compare(results("quick"))) == []
    assert "over 1" not in render(compare(results("quick")), "table", Console(file=io.StringIO()))


def test_every_format_shows_it() -> None:
    tables = both()
    found = eagle(tables)
    assert found.interval is not None
    shown = {form: render(tables, form, Console(file=io.StringIO(), width=80)) for form in FORMATS}  # type: ignore[arg-type]
    mean = f"{found.mean:.2f} [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
    for form in ("table", "github", "latex"):
        assert "over 2 suites | smollm2 | float32" in shown[form].replace("\\", "")
        assert mean in shown[form]
        assert "average over tasks" in " ".join(shown[form].split())
    (kept,) = json.loads(shown["json"])["summaries"]
    assert (kept["suites"], kept["baseline"]) == (["quick", "gsm8k"], "vanilla")
    assert kept["labels"][1]["mean"] == pytest.approx(found.mean)
    assert len(shown["csv"].splitlines()) == 5
    assert all(len(line) <= 80 for line in shown["table"].splitlines())
