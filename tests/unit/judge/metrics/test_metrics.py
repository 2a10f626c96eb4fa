"""The arithmetic of docs/metrics.md, on hand-made runs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spdbench.judge.metrics.steps import percentiles, token_intervals
from spdbench.judge.results.schema import BackendRecord, Run
from spdbench.judge.results.table import table_from
from tests.builders import (
    MS,
    READ_BANDWIDTH,
    chunk_steps,
    failed_run,
    make_backend,
    make_run,
    make_steps,
    pipeline_steps,
    summarise,
    vanilla_steps,
)

VANILLA, EAGLE, SPD = make_backend(), make_backend("draft_verify"), make_backend("pipeline")


def overall(runs: Sequence[Run], backend: BackendRecord, read_bandwidth: float | None = None) -> dict[str, Any]:
    return summarise(iter(runs), backend, read_bandwidth).overall


def test_worked_example_has_acceptance_length_three_and_a_quarter() -> None:
    found = overall([make_run(chunk_steps([1, 4, 3, 4, 2]))], EAGLE)
    assert found["acceptance_length"] == 3.25
    assert found["ideal_speedup"] == 3.25
    assert found["num_new_tokens"] == 14
    assert found["num_steps"] == 4


def test_acceptance_rate_counts_only_drafts_that_got_a_verdict() -> None:
    steps = make_steps([1, 3, 1, 5], drafted=[0, 4, 4, 4], judged=[0, 3, 1, 4], accepted=[0, 2, 0, 4])
    found = overall([make_run(steps)], EAGLE)
    assert found["acceptance_rate"] == 6 / 8
    assert found["acceptance_by_position"] == [2 / 3, 2 / 2, 1 / 2, 1 / 1]
    assert (found["num_accepted"], found["num_judged"]) == (6, 8)


def test_accepted_drafts_past_the_end_of_sequence_count_for_tau_but_not_as_tokens() -> None:
    steps = make_steps([1, 4, 2], drafted=[0, 4, 4], judged=[0, 4, 4], accepted=[0, 3, 4])
    found = overall([make_run(steps)], EAGLE)
    assert found["acceptance_length"] == 1 + 7 / 2
    assert found["num_new_tokens"] == 7
    assert found["decode_tokens_per_s"] == pytest.approx(6 / 0.020)


def test_rates_are_totals_over_totals_and_macro_is_the_mean_of_runs() -> None:
    fast, slow = make_run(vanilla_steps(11)), make_run(vanilla_steps(5, step_ns=50 * MS), prompt="p1")
    found = overall([fast, slow], VANILLA)
    assert found["decode_tokens_per_s"] == pytest.approx(14 / 0.3)
    assert found["decode_tokens_per_s_macro"] == pytest.approx((100 + 20) / 2)
    assert found["tpot_s"] == pytest.approx(0.3 / 14)
    assert found["tokens_per_s"] == pytest.approx(16 / 0.4)
    assert (found["ttft_s"], found["decode_s"], found["total_s"]) == pytest.approx((0.05, 0.15, 0.2))


def test_one_token_has_no_decode_rate() -> None:
    found = overall([make_run(vanilla_steps(1))], EAGLE)
    nulls = ["decode_tokens_per_s", "tokens_per_s", "tpot_s", "itl_p50_s", "acceptance_rate", "acceptance_length"]
    assert {name: found[name] for name in nulls} == dict.fromkeys(nulls)
    assert found["ttft_s"] == pytest.approx(0.05)
    assert found["num_new_tokens"] == 1


def test_one_token_run_counts_in_totals_but_not_in_the_mean_of_rates() -> None:
    found = overall([make_run(vanilla_steps(1)), make_run(vanilla_steps(5), prompt="p1")], VANILLA)
    assert found["tokens_per_s"] == pytest.approx(6 / (0.05 + 0.09))
    assert found["tokens_per_s_macro"] == pytest.approx(5 / 0.09)


def test_vanilla_has_no_acceptance_and_an_acceptance_length_of_one() -> None:
    found = overall([make_run()], VANILLA)
    assert found["acceptance_rate"] is None
    assert found["acceptance_by_position"] is None
    assert found["acceptance_length"] == found["ideal_speedup"] == found["token_efficiency"] == 1


def test_roofline_share_is_vanillas_alone_and_needs_a_measured_bandwidth() -> None:
    found = overall([make_run()], VANILLA, READ_BANDWIDTH)
    assert found["roofline_share"] == pytest.approx(200e6 * 100 / 20e9)
    assert overall([make_run()], VANILLA, None)["roofline_share"] is None
    assert overall([make_run(chunk_steps([1, 2]))], EAGLE, READ_BANDWIDTH)["roofline_share"] is None


def test_device_seconds_count_every_device() -> None:
    found = overall([make_run()], make_backend("pipeline", num_devices=4))
    assert found["device_s_per_token"] == pytest.approx(4 * 0.010)


def test_token_efficiency_charges_rejected_tree_nodes() -> None:
    found = overall([make_run(chunk_steps([1, 4, 3, 4, 2], depth=4))], EAGLE)
    assert found["token_efficiency"] == 13 / (4 * 5)


def test_peak_memory_is_the_largest_and_null_when_unknown() -> None:
    runs = [make_run(peak_memory_bytes=5), make_run(prompt="p1", peak_memory_bytes=7), make_run(prompt="p2")]
    assert overall(runs, VANILLA)["peak_memory_bytes"] == 7
    assert overall([make_run()], VANILLA)["peak_memory_bytes"] is None


def test_score_is_the_mean_of_judged_runs_with_its_interval() -> None:
    runs = [make_run(prompt=f"p{index}", score=float(index % 2)) for index in range(20)]
    found = overall([*runs, make_run(prompt="unjudged")], VANILLA)
    assert found["score"] == 0.5
    assert found["score_ci"][0] < 0.5 < found["score_ci"][1]
    assert overall([make_run()], VANILLA)["score"] is None
    one_judged = overall([make_run(score=0.0), make_run(prompt="unjudged")], VANILLA)
    assert (one_judged["score"], one_judged["score_ci"]) == (0.0, None)
    assert one_judged["ttft_s_ci"] is not None


def test_failed_runs_count_only_as_failed() -> None:
    found = overall([make_run(), failed_run("p1")], VANILLA)
    assert (found["num_runs"], found["num_failed"], found["num_prompts"]) == (1, 1, 1)
    assert found["ttft_s"] == pytest.approx(0.05)


def test_no_run_at_all_gives_nulls_not_an_error() -> None:
    found = overall([failed_run()], SPD)
    assert found["num_runs"] == 0
    assert all(value is None for name, value in found.items() if not name.startswith("num_"))


def test_categories_have_their_own_metrics() -> None:
    runs = [
        make_run(vanilla_steps(3)),
        make_run(vanilla_steps(9), prompt="p1", category="code"),
        failed_run("p2", "odd"),
    ]
    found = summarise(runs, VANILLA, None)
    assert {name: part["num_new_tokens"] for name, part in found.by_category.items()} == {
        "code": 9,
        "math": 3,
        "odd": 0,
    }
    assert found.overall["num_new_tokens"] == 12


def test_interval_needs_two_conversations() -> None:
    assert overall([make_run(), make_run(turn=1)], VANILLA)["ttft_s_ci"] is None
    assert overall([make_run(), make_run(prompt="p1")], VANILLA)["ttft_s_ci"] is not None


def test_acceptance_is_also_given_without_degenerate_outputs() -> None:
    loop = make_run(chunk_steps([1, *[5] * 8]), prompt="loop", output_ids=[7] * 41)
    sane = make_run(chunk_steps([1, *[2] * 20]), prompt="sane")
    found = overall([loop, sane], EAGLE)
    assert found["num_degenerate"] == 1
    assert found["acceptance_rate"] > found["acceptance_rate_without_degenerate"] == 20 / 40
    assert found["acceptance_length_without_degenerate"] == 2
    assert "acceptance_rate_without_degenerate" not in overall([sane], EAGLE)


# Pipelines


@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=60), num_stages=st.integers(1, 8))
def test_cycles_are_verdicts_and_fills(verdicts: list[bool], num_stages: int) -> None:
    rejections_before_last = verdicts[:-1].count(False)
    steps = pipeline_steps(verdicts, num_stages)
    assert len(steps.t_ns) - 1 == len(verdicts) + (num_stages - 1) * (1 + rejections_before_last)
    assert sum(steps.emitted) - 1 == len(verdicts)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accepted_of_ten", [0, 5, 8, 9])
def test_steady_acceptance_gives_the_textbook_tokens_per_cycle(num_stages: int, accepted_of_ten: int) -> None:
    verdicts = ([True] * accepted_of_ten + [False] * (10 - accepted_of_ten)) * 5
    backend = make_backend("pipeline", stage_layers=[10] * num_stages, lane_bytes=[100] * num_stages)
    found = overall([make_run(pipeline_steps(verdicts, num_stages))], backend)
    a = Fraction(accepted_of_ten, 10)
    assert found["acceptance_rate"] == float(a)
    assert found["tokens_per_cycle"] == pytest.approx(float(1 / (a + (1 - a) * num_stages)))
    assert found["equivalent_acceptance_length"] == pytest.approx(num_stages * found["tokens_per_cycle"])
    assert found["acceptance_length"] is None


def test_ideal_speedup_of_a_pipeline_charges_the_heaviest_stage_with_the_head() -> None:
    found = overall([make_run(pipeline_steps([True] * 10, 3))], SPD)
    assert found["num_cycles"] == 12
    assert found["tokens_per_cycle"] == 10 / 12
    assert found["equivalent_acceptance_length"] == pytest.approx(10 / 12 * 30 / 10)
    assert found["ideal_speedup"] == pytest.approx(10 / 12 * 200 / 80)


def test_position_in_a_pipeline_counts_verdicts_since_the_last_flush() -> None:
    found = overall([make_run(pipeline_steps([True, True, False, True, False, False], 3))], SPD)
    assert found["acceptance_by_position"] == [2 / 3, 1 / 2, 0 / 1]


def test_only_a_pipeline_has_cycles() -> None:
    found = overall([make_run(chunk_steps([1, 2]))], EAGLE)
    assert found["num_cycles"] is found["tokens_per_cycle"] is found["equivalent_acceptance_length"] is None


# Inter-token latency


def intervals(run: Run) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    seconds, tokens, _ = token_intervals(table_from([run]), np.ones(1, dtype=np.bool_))
    return seconds, tokens


def test_chunk_of_k_tokens_counts_k_times_its_share_of_the_wait() -> None:
    seconds, tokens = intervals(make_run(make_steps([1, 4, 1], step_ns=20 * MS)))
    assert seconds.tolist() == pytest.approx([0.005, 0.020])
    assert tokens.tolist() == [4, 1]
    found = overall([make_run(make_steps([1, 4, 1], step_ns=20 * MS))], EAGLE)
    assert found["itl_p50_s"] == pytest.approx(0.005)
    assert found["itl_p95_s"] == pytest.approx(0.020)


def test_cycles_that_fill_the_pipe_belong_to_the_token_that_follows() -> None:
    seconds, tokens = intervals(make_run(make_steps([1, 0, 0, 1, 1, 0], step_ns=10 * MS)))
    assert seconds.tolist() == pytest.approx([0.030, 0.010])
    assert tokens.tolist() == [1, 1]


def test_macro_latency_is_the_mean_of_the_runs_own_percentiles() -> None:
    runs = [make_run(vanilla_steps(11)), make_run(vanilla_steps(2, step_ns=50 * MS), prompt="p1")]
    found = overall([*runs, make_run(vanilla_steps(1), prompt="p2")], VANILLA)
    assert found["itl_p50_s"] == pytest.approx(0.010)
    assert found["itl_p50_s_macro"] == pytest.approx(0.030)


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 9)), min_size=1, max_size=40))
def test_weighted_percentiles_are_numpys_on_the_repeated_values(pairs: list[tuple[int, int]]) -> None:
    values, weights = np.array([pair[0] for pair in pairs], dtype=np.float64), np.array([pair[1] for pair in pairs])
    repeated = np.sort(np.repeat(values, weights))
    expected = [repeated[-(-percent * len(repeated) // 100) - 1] for percent in (50, 95, 99)]
    assert percentiles(values, weights, [len(pairs)]).tolist() == [expected]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_inter_token_times_add_up_to_decode_time(later: list[int]) -> None:
    run = make_run(make_steps([1, *later], step_ns=7 * MS))
    seconds, tokens = intervals(run)
    assert float(seconds @ tokens) == pytest.approx(run.decode_s)
    assert tokens.sum() == run.num_new_tokens - 1


def test_many_runs_take_little_memory() -> None:
    run = make_run(chunk_steps([1] + [3] * 255))
    runs = (run.model_copy(update={"prompt_id": f"p{index}"}) for index in range(500))
    tracemalloc.start()
    summarise(runs, make_backend("draft_verify"), None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000, "40 MB are the bootstrap's, whatever the number of runs; a run adds some 10 kB"


def test_a_flush_without_a_draft_begins_positions_anew() -> None:
    """A node whose drafts had no room gives a token, and none of them a verdict."""
    cycles = [(1, 0, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0), (1, 1, 1), (1, 1, 0)]
    emitted, judged, accepted = zip(*cycles, strict=True)
    steps = make_steps(emitted, drafted=judged, judged=judged, accepted=accepted)
    found = overall([make_run(steps)], SPD)
    assert found["acceptance_by_position"] == [1.0, 0.0]
