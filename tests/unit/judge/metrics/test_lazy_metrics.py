"""Metrics are worked out when they are asked for, and are the same whatever else was asked for before."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.metrics import stats
from spdbench.judge.metrics.metrics import Metrics
from spdbench.judge.metrics.steps import percentiles
from spdbench.judge.results.schema import BackendRecord, Run
from spdbench.judge.results.table import degenerate, is_degenerate, join_tables, table_from
from tests.builders import (
    chunk_steps,
    failed_run,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    summarise,
    vanilla_steps,
)

EAGLE = make_backend("draft_verify")
RUNS = [
    *(make_run(chunk_steps([1, *[1 + i % 4] * (9 + i)]), prompt=f"p{i}", category="ab"[i % 2]) for i in range(12)),
    make_run(chunk_steps([1, 3]), prompt="p0", category="a", repeat=1),
    failed_run("p12"),
]


def metrics(runs: Sequence[Run], backend: BackendRecord = EAGLE, batch_size: int = 100) -> Metrics:
    parts = [table_from(runs[start : start + batch_size]) for start in range(0, len(runs), batch_size)]
    return Metrics(join_tables(parts), backend, None)


def test_a_table_resamples_only_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--format csv` and result files hold every interval, and take the time for it."""
    entry = load(make_result(RUNS, EAGLE), "a.json")
    assert entry.flags, "they need the interval of the speed, which is known from here on"
    asked: list[int] = []
    original = stats.resample_sums

    def counting(cells: Any, sums: Any, *more: Any) -> Any:
        asked.append(sums.shape[1])
        return original(cells, sums, *more)

    monkeypatch.setattr(stats, "resample_sums", counting)
    [table] = compare([entry])
    assert table.rows[0].metrics["ttft_s"] == pytest.approx(0.05)
    assert asked == []
    assert table.rows[0].metrics["ttft_s_ci"] is not None
    assert table.rows[0].metrics["tokens_per_s_ci"] is not None
    assert len(asked) == 1


def test_any_metric_is_the_same_alone_and_among_all() -> None:
    everything = summarise(RUNS, EAGLE, None).overall
    for name, value in everything.items():
        assert metrics(RUNS)[name] == (value if value is None else pytest.approx(value, rel=1e-12)), name
    assert list(metrics(RUNS)) == list(everything)
    assert len(metrics(RUNS)) == len(everything)


@pytest.mark.parametrize("kind", ["autoregressive", "draft_verify", "pipeline"])
def test_any_size_of_batches_gives_the_same_metrics(kind: Any) -> None:
    backend = make_backend(kind)
    pipelines = [make_run(pipeline_steps([i % 3 > 0, i % 2 > 0, True, False], 3), prompt=f"q{i}") for i in range(9)]
    runs = [*RUNS, failed_run("x"), *pipelines]
    whole = dict(metrics(runs, backend))
    assert dict(metrics(runs, backend, 1)) == dict(metrics(runs, backend, 4)) == whole


def test_metrics_without_degenerate_outputs_are_there_only_with_some() -> None:
    assert "acceptance_rate_without_degenerate" not in metrics(RUNS)
    loop = make_run(chunk_steps([1, *[5] * 8]), prompt="loop", output_ids=[7] * 41)
    assert "acceptance_rate_without_degenerate" in metrics([*RUNS, loop])


def test_metrics_go_from_process_to_process() -> None:
    found = metrics(RUNS)
    assert found["decode_tokens_per_s_ci"] is not None
    assert dict(pickle.loads(pickle.dumps(found))) == dict(metrics(RUNS))


@given(st.lists(st.lists(st.integers(-1, 2), max_size=90), max_size=6))
def test_outputs_are_found_degenerate_together_as_alone(outputs: list[list[int]]) -> None:
    texts = [",".join(map(str, ids)).encode() for ids in outputs]
    assert degenerate(texts).tolist() == [is_degenerate(ids) for ids in outputs]


@given(st.lists(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), max_size=12), max_size=6))
def test_percentiles_of_many_runs_are_those_of_each(runs: list[list[tuple[int, int]]]) -> None:
    pairs = [np.array(run, dtype=np.int64).reshape(-1, 2) for run in runs]
    together = np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])
    counts = np.array([len(run) for run in runs], dtype=np.int64)
    found = percentiles(together[:, 0].astype(np.float64), together[:, 1], counts)
    for row, own in zip(found, pairs, strict=True):
        [alone] = percentiles(own[:, 0].astype(np.float64), own[:, 1], [len(own)])
        assert np.array_equal(row, alone, equal_nan=True)
        assert np.isnan(row).all() == (not len(own))


def test_remembered_draws_are_those_that_would_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, sums = np.repeat(np.arange(20), 2), np.random.default_rng(0).random((40, 3))
    remembered = stats.resample_sums(cells, sums)
    monkeypatch.setattr(stats, "MAX_DRAWS_REMEMBERED", 0)
    assert np.allclose(remembered, stats.resample_sums(cells, sums), rtol=1e-12)


def test_vanilla_steps_have_no_verdicts() -> None:
    assert metrics([make_run(vanilla_steps(5))], make_backend())["acceptance_by_position"] is None
