"""What slowdown is noise, from runs of the same code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from spdbench.errors import InputError, NotComparableError
from spdbench.judge.gate.calibration import (
    MIN_LIMIT,
    MIN_RUNS,
    ONE_SIDED,
    calibrate,
    distance,
    parse_calibration,
    slowdown,
)
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.stats import t_quantile
from tests.builders import MS, failed_run, make_run, vanilla_steps
from tests.unit.judge.gate.gates import drafted_runs, eagle, plain, plain_runs

SPEEDS = (1.00, 0.98, 1.01, 1.03, 0.97, 1.00)


def runs(*eagle_speeds: float, **more: object) -> list[LoadedResult]:
    """A/A runs in which eagle was so fast; plain decoding was twice as slow each time as the time before."""
    found = []
    for number, speed in enumerate(eagle_speeds):
        factor = 2**number
        environment = {"fingerprint": "machine-a", "read_bandwidth_bytes_per_s": number} | more
        found += [
            plain(plain_runs(step_ns=factor * 20 * MS), environment=environment),
            eagle(drafted_runs(step_ns=lambda _: round(factor * 20 * MS / speed)), environment=environment),  # noqa: B023
        ]
    return found


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_distance_is_the_root_of_twice_the_variance(values: list[float]) -> None:
    assert distance(values) == pytest.approx(math.sqrt(2 * np.var(values, ddof=1)), abs=1e-9)


def test_threshold_is_of_the_speedup_so_that_drift_of_the_machine_cancels() -> None:
    found = calibrate(runs(*SPEEDS))
    [threshold] = [each for each in found.thresholds if each.metric == "speedup"]
    spread = math.sqrt(2 * np.var(np.log(SPEEDS), ddof=1))
    assert threshold.label == "eagle"
    assert threshold.num_runs == len(SPEEDS)
    assert threshold.spread == pytest.approx(spread, rel=1e-4)
    assert threshold.max_slowdown == pytest.approx(1 - math.exp(-scipy_stats.t.ppf(0.999, 5) * spread), rel=1e-4)
    assert found.max_slowdown == threshold.max_slowdown
    assert found.fingerprint == "machine-a"
    assert {each.requests_at_once for each in found.thresholds} == {1}


def test_tokens_per_s_are_calibrated_as_well_and_decide_where_there_is_no_plain_decoding() -> None:
    found = calibrate(runs(*SPEEDS))
    assert [(each.label, each.metric) for each in found.thresholds] == [
        ("vanilla", "decode_tokens_per_s"),
        ("eagle", "speedup"),
        ("eagle", "decode_tokens_per_s"),
    ]
    alone = calibrate(runs(*SPEEDS)[1::2])
    assert [each.metric for each in alone.thresholds] == ["decode_tokens_per_s"]
    assert alone.max_slowdown == alone.thresholds[0].max_slowdown


def test_a_machine_without_noise_still_allows_a_little() -> None:
    assert calibrate(runs(*[1.0] * MIN_RUNS)).max_slowdown == MIN_LIMIT


def test_normal_noise_crosses_the_threshold_about_once_in_a_thousand_times() -> None:
    rng = np.random.default_rng(5)
    crossed, trials = 0, 20_000
    for _ in range(trials):
        values = rng.normal(0, 0.02, 8)
        limit = t_quantile(ONE_SIDED, 5) * distance(list(values[:6]))
        crossed += values[6] - values[7] < -limit
    assert 0.0004 <= crossed / trials <= 0.0018


def test_beside_the_mean_of_several_baselines_less_is_noise() -> None:
    allowed = [slowdown(0.02, 8, 1, number) for number in (1, 2, 8)]
    assert allowed == sorted(allowed, reverse=True)
    assert allowed[1] == pytest.approx(1 - math.exp(-scipy_stats.t.ppf(0.999, 7) * 0.02 * math.sqrt(1.5 / 2)))


def test_the_mean_of_several_new_runs_is_held_closer_too() -> None:
    assert slowdown(0.02, 8, 4, 8) < slowdown(0.02, 8, 1, 8)
    assert slowdown(0.02, 8, 4, 1) == slowdown(0.02, 8, 1, 4)


def test_runs_of_which_some_lack_their_plain_decoding_are_not_comparable() -> None:
    """From the others alone a threshold of tokens/s would come, which lets everything pass."""
    with pytest.raises(NotComparableError, match=r"1 of 6 results of the label 'eagle' have no plain decoding"):
        calibrate(runs(*SPEEDS)[1:])


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(InputError, match=r"4 results of the label 'vanilla', and 5 are the fewest"):
        calibrate(runs(*SPEEDS[:4]))


def test_runs_of_several_machines_or_prompts_are_not_comparable() -> None:
    with pytest.raises(NotComparableError, match="machines"):
        calibrate([*runs(*SPEEDS), *runs(*SPEEDS, fingerprint="machine-b")])
    with pytest.raises(NotComparableError, match="machine"):
        calibrate(runs(*SPEEDS, fingerprint=None))
    with pytest.raises(NotComparableError, match="not of the same prompts"):
        calibrate([*runs(*SPEEDS), eagle(drafted_runs(9))])
    with pytest.raises(NotComparableError, match="all answered"):
        calibrate([eagle([*drafted_runs(9), failed_run("p9")])] * MIN_RUNS)


def test_a_new_calibration_keeps_what_is_known_of_other_labels() -> None:
    both, older = calibrate(runs(*SPEEDS)), calibrate(runs(1.0, 1.1, 0.9, 1.05, 0.95))
    vanilla, eagles = both.thresholds[:1], both.thresholds[1:]
    again = both.model_copy(update={"thresholds": eagles}).merged_with(older)
    assert again.thresholds == [*eagles, *older.thresholds[:1]]
    assert older.thresholds[:1] != vanilla
    other = older.model_copy(update={"fingerprint": "machine-b"})
    assert both.merged_with(other) == both


def test_calibration_says_how_much_each_run_measured() -> None:
    assert {each.num_answers for each in calibrate(runs(*SPEEDS)).thresholds} == {10}


def test_calibration_is_read_back_as_it_was_written() -> None:
    found = calibrate(runs(*SPEEDS))
    assert parse_calibration(found.model_dump_json(by_alias=True)) == found


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "spdbench.calibration/2"}', "{}", '{"schema": 1, "schema": 1}'])
def test_what_is_no_calibration_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_calibration(text)
    assert "\n" not in str(caught.value)


def test_later_turns_whose_prompts_differ_do_not_count() -> None:
    """A first answer that ended otherwise is part of the next turn's prompt."""
    found = runs(*SPEEDS)
    turns = [make_run(vanilla_steps(8), prompt="p0", turn=1, prompt_sha256=f"{i:064x}") for i in range(len(SPEEDS))]
    plainly = [plain([*plain_runs(), turn], environment=found[0].head.environment) for turn in turns]
    assert {each.num_answers for each in calibrate(plainly).thresholds} == {11}
