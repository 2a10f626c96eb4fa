"""What a comparison concludes of each label: does it pay, how many prompts would show more, what if it had devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spdbench.judge.comparison.compare import compare
from spdbench.judge.comparison.conclusion import Conclusion, conclusions
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.metrics import stats
from spdbench.judge.results.lanes import BubbleParts, FullCycles
from spdbench.judge.results.schema import Run, RunKey
from spdbench.types import BackendKind
from tests.builders import MS, ORACLE, chunk_steps, make_backend, make_result, make_run, pipeline_steps, vanilla_steps

Sides = tuple[list[RunKey], NDArray[np.float64], NDArray[np.float64]]


def result(kind: BackendKind, runs: Sequence[Run], drafter: Any = None, **backend: Any) -> LoadedResult:
    made = make_result(list(runs), make_backend(kind, **backend), drafter=drafter)
    return load(made, f"{made.backend.label}.json")


def vanilla(num: int = 10, *step_ms: float) -> LoadedResult:
    steps = step_ms or (20,)
    return result("autoregressive", [decode(f"p{i}", steps[i % len(steps)]) for i in range(num)])


def decode(prompt: str, step_ms: float) -> Run:
    return make_run(vanilla_steps(9, step_ns=round(step_ms * MS)), prompt=prompt)


def other(*step_ms: float, num: int = 10, **more: Any) -> LoadedResult:
    """Plain decoding under another label, whose requests take turns at these times a token."""
    runs = [decode(f"p{i}", step_ms[i % len(step_ms)]) for i in range(num)]
    return result("autoregressive", runs, label="other", **more)


def conclude(*results: LoadedResult) -> Conclusion:
    """What is said of the last of `results`, with the first as baseline."""
    [table] = compare(results, results[0])
    return conclusions(table)[-1]


def test_a_speedup_pays_if_its_interval_lies_above_one_and_not_if_below() -> None:
    assert conclude(vanilla(), other(10, 11)).outcome == "pays"
    assert conclude(vanilla(), other(40, 41)).outcome == "slower"
    assert conclude(vanilla(), other(18, 22)).outcome == "no difference shown"


def test_the_baseline_and_a_label_that_pairs_with_nothing_have_no_speedup_to_speak_of() -> None:
    [table] = compare([vanilla(), other(10)], "vanilla")
    base = conclusions(table)[0]
    assert (base.outcome, base.num_prompts) == ("baseline", 10)
    assert base.tokens_per_s == pytest.approx(50)
    stranger = result("autoregressive", [decode("elsewhere", 10)], label="other")
    assert conclude(vanilla(), stranger).outcome == "no pair"
    [table] = compare([pipeline()])
    assert conclusions(table)[0].outcome == "no baseline"


def test_one_prompt_has_a_speedup_without_interval() -> None:
    found = conclude(vanilla(1), other(10, num=1))
    assert (found.outcome, found.interval) == ("no interval", None)
    assert found.speedup == pytest.approx(2.0)


def test_flags_disqualify_and_raise_doubts() -> None:
    few = conclude(vanilla(4), other(10, num=4, lossy=True))
    assert (few.disqualified_by, few.doubts) == (("lossy",), ("few_prompts",))
    assert conclude(vanilla(), other(10)).doubts == ()


def test_several_devices_have_their_share_of_the_speedup() -> None:
    assert conclude(vanilla(), other(10)).speedup_per_device is None
    assert conclude(vanilla(), other(10, num_devices=4)).speedup_per_device == pytest.approx(0.5)


# How many prompts would show 5 %


def sides(rng: np.random.Generator, num: int, *, sigma: float, speedup: float = 1.0) -> Sides:
    """Runs of a speed-up whose prompts differ by `sigma` on the log scale, with that mean, and in length as well."""
    tokens = rng.integers(20, 60, num).astype(float)
    seconds = tokens * np.exp(rng.normal(-np.log(speedup) - sigma**2 / 2, sigma, num))
    return [(f"p{i}", 0, 0) for i in range(num)], np.stack([tokens] * 2, axis=1), np.stack([tokens, seconds], axis=1)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.15])
def test_as_many_prompts_as_it_says_show_the_difference_four_times_in_five(sigma: float) -> None:
    rng = np.random.default_rng(3)
    spread = stats.spread_of_log_ratio(*sides(rng, 2000, sigma=sigma))
    assert spread is not None
    num = stats.prompts_to_show(0.05, spread)
    found = [
        stats.ratio_interval(*sides(rng, num, sigma=sigma, speedup=1.05), resamples=400, seed=1) for _ in range(400)
    ]
    shown = np.mean([interval is not None and interval[0] > 1 for interval in found])
    assert shown == pytest.approx(stats.POWER, abs=0.08)


def test_the_spread_does_not_depend_on_how_many_were_measured() -> None:
    rng = np.random.default_rng(5)
    squares = [
        np.mean([(stats.spread_of_log_ratio(*sides(rng, num, sigma=0.1)) or 0) ** 2 for _ in range(2000 // num)])
        for num in (4, 20, 100)
    ]
    assert max(squares) / min(squares) < 1.25


def test_the_spread_is_the_error_that_resampling_finds() -> None:
    keys, first, second = sides(np.random.default_rng(7), 60, sigma=0.2)
    spread = stats.spread_of_log_ratio(keys, first, second)
    interval = stats.ratio_interval(keys, first, second)
    assert spread is not None
    assert interval is not None
    assert np.log(interval[1] / interval[0]) / 4 == pytest.approx(spread / np.sqrt(60), rel=0.1)


def test_repeats_of_a_prompt_are_one_conversation_and_one_has_no_spread() -> None:
    rows = np.array([[10.0, 1.0], [10.0, 3.0]])
    assert stats.spread_of_log_ratio([("a", 0, 0), ("a", 0, 1)], rows, rows) is None
    assert stats.spread_of_log_ratio([("a", 0, 0), ("b", 0, 0)], rows, rows) == 0
    assert stats.spread_of_log_ratio([("a", 0, 0), ("b", 0, 0)], rows * 0, rows) is None


def test_twice_the_spread_takes_four_times_the_prompts() -> None:
    assert stats.prompts_to_show(0.05, 0.4) / stats.prompts_to_show(0.05, 0.2) == pytest.approx(4, rel=0.05)
    assert stats.prompts_to_show(0.05, 0.0) == 2


def test_the_number_of_prompts_is_given_only_where_no_difference_is_shown() -> None:
    assert conclude(vanilla(), other(10, 11)).num_prompts_to_show is None
    found = conclude(vanilla(), other(18, 22)).num_prompts_to_show
    assert found is not None
    assert 10 < found < 100


# If each stage had a device


def pipeline(*control_s: float, num: int = 10, lengths: Sequence[int] = (8,), **backend: Any) -> LoadedResult:
    """Three stages of which the last reads 80 of 200 MB; with `lengths` of 8 tokens, 0.8 of them a cycle of 20 ms, as
    vanilla takes for a token. Prompts take turns at the lengths, and at what full cycles took beyond a stage's time."""
    runs = []
    for i in range(num):
        steps = pipeline_steps([True] * lengths[i % len(lengths)], 3, step_ns=20 * MS)
        more: dict[str, Any] = {}
        if control_s:
            wall_s = 0.02 + control_s[i % len(control_s)]
            shares = dict.fromkeys(BubbleParts.model_fields, 0.0) | {"useful": 0.5, "fill": 0.5}
            more = {"bubble": shares, "full_cycles": FullCycles(num=5, stage_s=5 * 0.02, wall_s=5 * wall_s)}
        runs.append(make_run(steps, prompt=f"p{i}", **more))
    return result("pipeline", runs, ORACLE, **backend)


def test_with_a_device_a_stage_a_cycle_takes_the_heaviest_stages_share_of_a_token() -> None:
    found = conclude(vanilla(), pipeline()).own_devices
    assert found is not None
    assert found.speedup == pytest.approx(0.8 / 0.4)
    assert (found.num_stages, found.is_bound) == (3, True), "what a cycle takes besides was not recorded"


def test_what_full_cycles_took_beyond_their_slowest_stage_stays() -> None:
    found = conclude(vanilla(), pipeline(0.002)).own_devices
    assert found is not None
    assert found.speedup == pytest.approx(0.8 * 20 / (0.4 * 20 + 2))
    assert not found.is_bound


def test_stages_that_ran_ahead_of_the_verdict_leave_a_bound() -> None:
    found = conclude(vanilla(), pipeline(-0.002)).own_devices
    assert found is not None
    assert found.speedup == pytest.approx(2.0)
    assert found.is_bound


def test_the_estimate_has_the_interval_that_resampled_prompts_give() -> None:
    """Against a bootstrap of its own, prompt by prompt."""
    lengths, control_s, vanilla_ms = (4, 9, 14), (0.001, 0.004), (18, 20, 23, 25)
    num = 12
    found = conclude(vanilla(num, *vanilla_ms), pipeline(*control_s, num=num, lengths=lengths)).own_devices
    assert found is not None
    rng = np.random.default_rng(11)
    estimates = []
    for _ in range(4000):
        picked = rng.integers(0, num, num)
        tokens = sum(lengths[i % 3] for i in picked)
        token_s = np.mean([vanilla_ms[i % 4] for i in picked]) / 1e3  # as many tokens of each
        besides_s = np.mean([control_s[i % 2] for i in picked])
        estimates.append(tokens / (tokens + 2 * num) * token_s / (0.4 * token_s + besides_s))
    assert found.interval is not None
    tail = stats.expanded_tail_percent(num, stats.TAIL_PERCENT)
    assert found.interval == pytest.approx(np.percentile(estimates, [tail, 100 - tail]), rel=0.01)
    assert found.interval[0] < found.speedup < found.interval[1]


def test_one_prompt_gives_an_estimate_without_interval() -> None:
    found = conclude(vanilla(1), pipeline(0.002, num=1)).own_devices
    assert found is not None
    assert found.interval is None


def test_there_is_no_what_if_where_stages_have_devices_or_where_there_are_none() -> None:
    assert conclude(vanilla(), pipeline(num_devices=3)).own_devices is None
    tree = result("draft_verify", [make_run(chunk_steps([1, 4, 4]), prompt=f"p{i}") for i in range(10)])
    assert conclude(vanilla(), tree).own_devices is None
    both = [pipeline(), pipeline(label="ppsd")]
    assert conclude(*both).own_devices is None, "the baseline is no plain decoding"
