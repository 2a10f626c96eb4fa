"""Acceptance length as others print it: the worked example of docs/metrics.md, and what sets the dialects apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.metrics.dialects import DIALECTS, metric_name
from spdbench.judge.results.schema import BackendRecord, Run
from tests.builders import (
    chunk_steps,
    failed_run,
    make_backend,
    make_result,
    make_run,
    make_steps,
    pipeline_steps,
    summarise,
    vanilla_steps,
)

EAGLE, SPD = make_backend("draft_verify"), make_backend("pipeline")


def in_dialects(runs: Sequence[Run], backend: BackendRecord = EAGLE) -> dict[str, float | None]:
    [table] = compare([load(make_result(runs, backend), "a.json")], dialects=list(DIALECTS))
    return {name: table.rows[0].metrics[metric_name(name)] for name in DIALECTS}


def test_the_worked_example_has_the_value_that_each_dialect_prints() -> None:
    found = in_dialects([make_run(chunk_steps([1, 4, 3, 4, 2]))])
    assert {name: None if value is None else round(value, 2) for name, value in found.items()} == {
        "spdbench": 3.25,
        "vllm": 3.25,
        "spec-bench": 3.25,
        "sglang": 3.50,
        "nvidia": 2.80,
        "specforge": 3.50,
        "aiperf": 3.25,
        "eagle": 4.33,
        "spd": None,
    }


def test_macro_dialects_weigh_requests_alike_and_micro_ones_by_their_steps() -> None:
    runs = [make_run(chunk_steps([1, 4])), make_run(chunk_steps([1, *[1] * 10]), prompt="p1")]
    found = in_dialects(runs)
    assert found["spdbench"] == found["spec-bench"] == pytest.approx((4 + 10) / 11)
    assert found["sglang"] == pytest.approx((5 + 11) / 11)
    assert found["eagle"] == pytest.approx((4 + 10) / (0 + 9))
    assert found["nvidia"] == pytest.approx((5 / 2 + 11 / 11) / 2)
    assert found["specforge"] == pytest.approx((5 / 1 + 11 / 10) / 2)
    assert found["aiperf"] == pytest.approx((4 + 1) / 2)


def test_what_was_accepted_past_the_cut_counts_where_steps_are_counted_whole() -> None:
    steps = make_steps([1, 4, 2], drafted=[0, 4, 4], judged=[0, 4, 4], accepted=[0, 3, 4])
    found = in_dialects([make_run(steps)])
    assert found["vllm"] == found["spec-bench"] == (4 + 5) / 2
    assert found["sglang"] == 7 / 2
    assert found["nvidia"] == pytest.approx(7 / 3)


def test_pipelines_have_the_spd_papers_length_and_no_other() -> None:
    full, refilled = pipeline_steps([True] * 8, 3), pipeline_steps([False, True], 3)
    found = in_dialects([make_run(full), make_run(refilled, prompt="p1")], SPD)
    assert found.pop("spd") == pytest.approx(3 * (9 / 10 + 3 / 6) / 2)
    assert set(found.values()) == {None}


def test_uneven_stages_count_by_the_largest() -> None:
    backend = make_backend("pipeline", stage_layers=[12, 10, 8])
    assert in_dialects([make_run(pipeline_steps([True] * 8, 3))], backend)["spd"] == pytest.approx(30 / 12 * 9 / 10)


def test_vanilla_and_failures_have_no_acceptance_length_in_any_dialect() -> None:
    assert set(in_dialects([make_run(vanilla_steps(9))], make_backend()).values()) == {None}
    assert set(in_dialects([failed_run()]).values()) == {None}


def test_one_verify_step_has_no_length_in_eagles_words() -> None:
    assert in_dialects([make_run(chunk_steps([1, 4]))])["eagle"] is None


def test_the_default_lists_no_dialect_and_result_files_hold_none() -> None:
    run = make_run(chunk_steps([1, 4, 3]))
    names = {metric_name(name) for name in DIALECTS}
    [table] = compare([load(make_result([run], EAGLE), "a.json")])
    assert names.isdisjoint(table.rows[0].metrics)
    assert table.dialects == ()
    assert names.isdisjoint(summarise([run], EAGLE, None).overall)


def test_asking_for_one_dialect_works_out_no_other_metric() -> None:
    entry = load(make_result([make_run(chunk_steps([1, 4, 3]))], EAGLE), "a.json")
    [table] = compare([entry], dialects=["nvidia"])
    assert table.rows[0].metrics["acceptance_length_nvidia"] == pytest.approx(8 / 3)
    assert list(table.rows[0].metrics).count("acceptance_length_nvidia") == 1
    assert "acceptance_length_vllm" not in list(table.rows[0].metrics)
