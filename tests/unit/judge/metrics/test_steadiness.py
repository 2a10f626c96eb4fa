"""Drift and outliers: what is found, what is left to the prompts, and how often chance raises an alarm."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.metrics.steadiness import find_drift, find_outliers, log_paces, theil_sen
from spdbench.judge.results.schema import Run
from spdbench.types import BackendKind
from tests.builders import MS, chunk_steps, make_backend, make_result, make_run, summarise, vanilla_steps

NUM = 40


def flags(runs: Sequence[Run], kind: BackendKind = "autoregressive") -> dict[str, str]:
    found = load(make_result(runs, make_backend(kind)), "a.json").head.flags
    return {flag.name: f"{flag.reason}. {flag.remedy}" for flag in found if flag.name in ("drift", "outliers")}


def run(index: int, step_ms: float, *, tokens: int = 20, repeat: int = 0, prompt_tokens: int = 7) -> Run:
    made = make_run(vanilla_steps(tokens, step_ns=round(step_ms * MS)), prompt=f"p{index}", repeat=repeat)
    return made.model_copy(update={"num_prompt_tokens": prompt_tokens})


def noise(num: int, share: float = 0.02, seed: int = 0) -> NDArray[np.float64]:
    return np.exp(np.random.default_rng(seed).normal(0, share, num))


def test_a_machine_that_slows_down_is_flagged_with_by_how_much() -> None:
    found = flags([run(i, 10 * (1 + 0.2 * i / (NUM - 1)) * jitter) for i, jitter in enumerate(noise(NUM))])
    assert found.keys() == {"drift"}
    assert "the time a step rose by" in found["drift"]
    change = summarise([run(i, 10 * (1 + 0.2 * i / (NUM - 1))) for i in range(NUM)], make_backend(), None).overall[
        "drift"
    ]
    assert change == pytest.approx(0.2, abs=0.02)


def test_a_machine_that_warms_up_is_flagged_as_well() -> None:
    found = flags([run(i, 10 / (1 + 0.2 * i / (NUM - 1))) for i in range(NUM)])
    assert "the time a step fell by 1" in found["drift"]


def test_noise_without_a_trend_is_no_drift() -> None:
    alarms = sum(
        "drift" in flags([run(i, 10 * jitter) for i, jitter in enumerate(noise(NUM, 0.1, seed))]) for seed in range(40)
    )
    assert alarms <= 2


def test_a_trend_too_small_to_matter_is_no_drift() -> None:
    assert flags([run(i, 10 * (1 + 0.03 * i / (NUM - 1))) for i in range(NUM)]) == {}


def test_a_suite_that_ends_with_its_longest_prompts_is_no_drift() -> None:
    longer = [run(i, 10 + 0.1 * i, prompt_tokens=50 * i) for i in range(NUM)]
    assert flags(longer) == {}


def test_wider_forwards_towards_the_end_are_no_drift() -> None:
    """A drafter that finds more to draft has more rows in a forward, which take longer."""
    runs = [
        make_run(chunk_steps([1, *[2] * 12], depth=depth, step_ns=(10 + depth) * MS), prompt=f"p{depth}-{i}")
        for depth in range(1, 9)
        for i in range(4)
    ]
    assert flags(runs, "draft_verify") == {}


def test_repeats_of_one_prompt_count_once() -> None:
    """Seven prompts are too few, however often each was asked."""
    repeats = [run(i, 10 + i, repeat=repeat) for i in range(7) for repeat in range(5)]
    assert flags(repeats).get("drift") is None
    assert "drift" in flags([run(i, 10 + i, repeat=repeat) for i in range(9) for repeat in range(5)])


def test_one_request_far_off_is_an_outlier_named_by_its_prompt() -> None:
    runs = [run(i, 10 * jitter * (3 if i == 11 else 1)) for i, jitter in enumerate(noise(NUM))]
    found = flags(runs)
    assert found.keys() == {"outliers"}
    assert "1 of 40 requests" in found["outliers"]
    assert "(p11)" in found["outliers"]


def test_many_outliers_are_not_all_named() -> None:
    slow = {3, 8, 13, 18, 23}
    found = flags([run(i, 10 * jitter * (2 if i in slow else 1)) for i, jitter in enumerate(noise(NUM))])
    assert "(p3, p8, p13 and 2 more)" in found["outliers"]


def test_a_quiet_machines_small_deviations_are_no_outliers() -> None:
    assert flags([run(i, 10 * (1.1 if i == 5 else 1) * jitter) for i, jitter in enumerate(noise(NUM, 0.001))]) == {}


def test_a_prompt_that_is_slow_in_each_repeat_is_slow_by_nature() -> None:
    runs = [
        run(i, 10 * (2 if i == 5 or (i, repeat) == (9, 1) else 1), repeat=repeat)
        for i in range(NUM)
        for repeat in range(3)
    ]
    assert "(p9)" in flags(runs)["outliers"]


@pytest.mark.parametrize("num", [0, 1, 7])
def test_few_requests_show_neither(num: int) -> None:
    runs = [run(i, 10 * 2**i) for i in range(num)]
    overall = summarise(runs, make_backend(), None).overall
    assert (overall["drift"], overall["drift_p_value"], overall["outliers"]) == (None, None, None)


def test_requests_of_few_steps_are_not_looked_at() -> None:
    assert flags([run(i, 10 * 2**i, tokens=8) for i in range(12)]) == {}


def test_equal_paces_are_steady() -> None:
    overall = summarise([run(i, 10) for i in range(NUM)], make_backend(), None).overall
    assert overall["drift"] == pytest.approx(0)
    assert overall["drift_p_value"] == 1
    assert overall["outliers"] == []


def test_compare_shows_both_flags_and_neither_disqualifies() -> None:
    base = [run(i, 20) for i in range(NUM)]
    mine = [run(i, 10 * (1 + 0.2 * i / NUM) * (3 if i == 11 else 1)) for i in range(NUM)]
    entries = [load(make_result(runs, make_backend(label=name)), name) for name, runs in (("a", base), ("b", mine))]
    [table] = compare(entries)
    assert {"drift", "outliers"} <= {flag.name for flag in table.rows[1].flags}
    assert table.rows[1].best


# The arithmetic


def test_the_line_through_median_slopes_is_not_moved_by_a_stray_value() -> None:
    values = 3.0 * np.arange(20.0)
    values[7] = 1000
    assert theil_sen(np.arange(20.0), values) == pytest.approx(3.0)
    assert theil_sen(np.ones(5), np.arange(5.0)) == 0


def test_the_trends_p_value_is_kendalls() -> None:
    """By the normal distribution with a correction for continuity, which scipy does not make."""
    from scipy.stats import kendalltau

    values = np.random.default_rng(1).normal(0, 1, 60) + 0.01 * np.arange(60)
    found = find_drift(values, list(range(60)))
    assert found is not None
    assert found.p_value == pytest.approx(kendalltau(np.arange(60), values, method="asymptotic").pvalue, rel=0.03)


def test_paces_are_free_of_what_explains_them() -> None:
    length = np.random.default_rng(2).permutation(100).astype(np.float64)
    paces = log_paces(np.exp(0.01 * length), np.ones(100), [length])
    assert np.ptp(paces) == pytest.approx(0, abs=1e-9)


def test_ten_thousand_requests_take_no_more_memory_than_pairs_of_blocks() -> None:
    paces = np.linspace(0, 0.2, 10_000) + np.random.default_rng(3).normal(0, 0.02, 10_000)
    tracemalloc.start()
    found = find_drift(paces, list(range(10_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # all pairs would take a hundred times as much
    assert found is not None
    assert found.change == pytest.approx(np.exp(0.2) - 1, abs=0.01)
    assert not find_outliers(paces, list(range(10_000))).any()


def test_repeats_are_told_where_others_were_measured_between_them() -> None:
    """Several requests at once are kept in the order in which they end."""
    slow = [run(i, 20.0 if i == 5 else 10.0, repeat=repeat) for repeat in range(3) for i in range(NUM)]
    assert "outliers" not in flags(slow)
    few = [run(i, 10.0 + i, repeat=repeat) for repeat in range(5) for i in range(7)]
    assert "drift" not in flags(few)
