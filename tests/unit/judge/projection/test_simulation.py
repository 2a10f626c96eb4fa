"""The simulated pipeline against times that follow by hand, and against docs/metrics.md's count of cycles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.judge.projection.simulation import (
    Parts,
    Scatter,
    Stretch,
    as_factors,
    lane_shares,
    lognormal_factors,
    request_seconds,
    stretches,
)

IDEAL: dict[str, Any] = {"head_s": 0.0, "draft_s": 0.0, "verify_s": 0.0, "host_s": 0.0, "message_s": 0.0}


def make_parts(*stages: float, shared: bool = False, **more: Any) -> Parts:
    """Stages with a device each; all that is not named takes no time."""
    devices = (*range(len(stages)), 0 if shared else len(stages))
    return Parts(stages=stages, **(IDEAL | {"devices": devices} | more))


def steady(parts: Parts, cycle: int = 200) -> float:
    """Seconds of one of many cycles in which all drafts are accepted."""
    stretch = Stretch(parts)
    return (stretch.end(cycle) - stretch.end(cycle // 2)) / (cycle - cycle // 2)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_where_only_stages_take_time_a_request_takes_as_many_stage_times_as_cycles(
    verdicts: list[bool], num_stages: int
) -> None:
    cycles = len(verdicts) + (num_stages - 1) * (1 + verdicts[:-1].count(False))
    seconds = request_seconds(Stretch(make_parts(*[2.0] * num_stages)), verdicts)
    assert seconds == pytest.approx(2.0 * cycles)


@pytest.mark.parametrize(
    ("parts", "cycle_s"),
    [
        (make_parts(1.0, 1.0, 1.0, draft_s=0.5), 1.0),
        (make_parts(1.0, 1.0, 1.0, draft_s=2.0), 2.0),
        (make_parts(1.0, 3.0, 1.0), 3.0),
        (make_parts(1.0, 1.0, 1.0, head_s=0.5), 1.5),
        (make_parts(1.0, 1.0, draft_s=0.5, shared=True), 1.5),
        (make_parts(1.0, 1.0, 1.0, message_s=0.1, verify_s=0.1, host_s=0.1), 1.0),
        (make_parts(1.0, 2.0, devices=(0, 0, 0), draft_s=0.5), 3.5),
        (make_parts(2.0, draft_s=1.0, verify_s=0.25), 2.25),
        (make_parts(1.0, 1.0, draft_s=0.5, late=True), 1.5),
    ],
    ids=["stages", "drafter", "slowest", "head", "shared", "hidden", "one device", "one stage", "late"],
)
def test_the_steady_cycle_is_what_cannot_be_overlapped(parts: Parts, cycle_s: float) -> None:
    assert steady(parts) == pytest.approx(cycle_s)


def test_in_step_a_cycle_is_control_stage_result_head_and_verdict_one_after_another() -> None:
    reference = make_parts(
        *[7.9] * 4, draft_s=4.2, head_s=1.0, verify_s=0.2, message_s=0.05, in_step=True, drafters_head=1.0
    )
    assert steady(reference) == pytest.approx(0.05 + 7.9 + 0.05 + 1.0 + 0.2)


def test_a_draft_that_takes_longer_than_the_stages_holds_the_verdict_up_too() -> None:
    parts = make_parts(1.0, 1.0, draft_s=3.0, verify_s=0.5)
    assert Stretch(parts).verdict(0) == pytest.approx(3.0 + 3.0 + 0.5)


def test_a_fill_lets_each_stage_start_when_the_one_before_and_a_message_are_done() -> None:
    stretch = Stretch(make_parts(1.0, 1.0, 1.0, message_s=0.25, verify_s=0.5))
    # controller -> 0 -> 1 -> 2 -> controller are four messages
    assert stretch.verdict(0) == pytest.approx(3 * 1.0 + 4 * 0.25 + 0.5)


def test_a_branch_that_entered_late_takes_as_many_cycles_more() -> None:
    stretch = Stretch(make_parts(1.0, 1.0, 1.0))
    assert request_seconds(stretch, [1, 1, 1]) == pytest.approx(5.0)
    assert request_seconds(stretch, [1, 3, 1]) == pytest.approx(7.0)


def test_a_drafter_that_reads_no_states_does_not_wait_for_the_slowest_stage() -> None:
    scatter = Scatter(stages=lognormal_factors(0.5))
    parts = [make_parts(*[1.0] * 6, draft_s=0.9, reads_states=each, scatter=scatter) for each in (True, False)]
    waits, goes_on = map(steady, parts)
    assert 1.0 < goes_on < 0.98 * waits


def test_a_rejection_costs_what_a_stage_still_works_on_a_dropped_token() -> None:
    seconds = [request_seconds(Stretch(make_parts(1.0, 1.0, abort_s=each)), [0, 1]) for each in (0.0, 0.25)]
    assert seconds == pytest.approx([4.0, 4.25])


@pytest.mark.parametrize(
    ("share", "draft_s", "cycle_s"),
    [
        (0.0, 0.5, 2.0),  # the last stage and the whole head
        (0.5, 0.25, 1.5),  # the last stage and half of it
        (1.0, 0.5, 1.5),  # the drafter's device: draft and head
        (1.0, 1.5, 2.5),
    ],
)
def test_a_head_takes_its_time_where_it_runs(share: float, draft_s: float, cycle_s: float) -> None:
    parts = make_parts(1.0, 1.0, 1.0, head_s=1.0, draft_s=draft_s, drafters_head=share)
    assert steady(parts) == pytest.approx(cycle_s)


def test_a_drafter_in_the_first_stages_process_reads_the_verdict_after_that_stage() -> None:
    """Draft and stage 0 in turn: 0.5 + 1.0, and in the first cycle stage 0 alone before them."""
    stretch = Stretch(make_parts(1.0, 1.0, draft_s=0.5, shared=True))
    assert [stretch.end(cycle) for cycle in range(3)] == pytest.approx([2.5, 4.0, 5.5])


# Scatter


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8])
def test_factors_have_the_mean_one_and_spread_as_asked(sigma: float) -> None:
    factors = np.array(lognormal_factors(sigma))
    assert factors.mean() == pytest.approx(1)
    assert np.log(factors).std() == pytest.approx(sigma, rel=0.05)
    assert lognormal_factors(0.0) == ()


def test_measured_times_become_factors() -> None:
    assert as_factors([1.0, 3.0]) == (0.5, 1.5)
    assert as_factors([1.0]) == as_factors([]) == ()


def test_a_cycle_takes_the_expected_maximum_of_its_stages() -> None:
    """Of two stages that take 0.5 or 1.5 with equal chances the slower one takes 1.25 on average. A barrier in each
    cycle makes them wait for one another."""
    parts = make_parts(1.0, 1.0, in_step=True, scatter=Scatter(stages=(0.5, 1.5)))
    assert steady(parts) == pytest.approx(1.25, abs=0.02)
    assert steady(make_parts(1.0, 1.0, in_step=True)) == pytest.approx(1.0)


def test_one_device_does_not_wait_so_that_scatter_averages_out() -> None:
    scatter = Scatter(stages=lognormal_factors(0.5))
    parts = make_parts(1.0, 2.0, devices=(0, 0, 0), in_step=True, scatter=scatter)
    assert steady(parts) == pytest.approx(3.0, rel=0.02)


@given(st.integers(2, 6), st.floats(0.05, 0.6))
def test_scatter_makes_a_pipeline_slower_and_a_deeper_one_more_so(stages: int, sigma: float) -> None:
    scatter = Scatter(stages=lognormal_factors(sigma))
    one, more = (steady(make_parts(*[1.0] * num, scatter=scatter), 40) for num in (stages, 2 * stages))
    assert 1.0 < one < more


def test_the_bubble_of_drawn_times_is_mostly_imbalance() -> None:
    parts = make_parts(1.0, 1.0, 1.0, in_step=True, scatter=Scatter(stages=lognormal_factors(0.5)))
    lanes = lane_shares(Stretch(parts), [[True] * 300])
    causes = ("fill", "verify", "draft", "imbalance", "host", "unattributed")
    assert max(causes, key=lambda name: getattr(lanes, name)) == "imbalance"
    assert 0.2 < lanes.imbalance / lanes.total < 0.5


def test_what_a_request_takes_once_is_added_once() -> None:
    bare, with_start = (request_seconds(Stretch(make_parts(1.0, 1.0, start_s=s)), [True, False, True]) for s in (0, 5))
    assert with_start - bare == 5


def test_verdicts_between_flushes() -> None:
    assert stretches([True, False, False, True, True]) == [(2, 1, True), (1, 0, True), (2, 1, False)]
    assert stretches([1, 3, 2, 0]) == [(4, 6, True)]
    assert stretches([]) == []


def test_the_bubble_of_an_ideal_pipeline_without_a_rejection_is_its_fill() -> None:
    num, stages = 97, 4
    lanes = lane_shares(Stretch(make_parts(*[1.0] * stages)), [[True] * num])
    cycles = num + stages - 1
    # In the first cycles the later stages are empty; the last tokens in flight are of no use.
    assert lanes.fill == pytest.approx(1e9 * sum(range(stages)), rel=1e-6)
    assert lanes.useful == pytest.approx(1e9 * stages * num, rel=1e-6)
    assert lanes.total == pytest.approx(1e9 * stages * cycles, rel=1e-6)


def test_rejections_waste_the_work_on_what_was_in_flight() -> None:
    lanes = lane_shares(Stretch(make_parts(*[1.0] * 3)), [[True, False] * 20])
    # Of each two tokens' four cycles of three stages: 6 units count, 3 are empty, the other 3 are dropped drafts'.
    assert [lanes.useful, lanes.fill, lanes.wasted] == pytest.approx([6 * 20e9, 3 * 20e9, 3 * 20e9], rel=1e-6)


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        (make_parts(1.0, 1.0, 1.0, draft_s=3.0), "draft"),
        (make_parts(1.0, 4.0, 1.0), "imbalance"),
        (make_parts(1.0, 1.0, in_step=True, verify_s=2.0), "verify"),
        (make_parts(1.0, 1.0, in_step=True, host_s=2.0), "host"),
        (make_parts(1.0, 1.0, in_step=True, message_s=1.0), "host"),
    ],
)
def test_the_bubble_names_its_cause(parts: Parts, cause: str) -> None:
    lanes = lane_shares(Stretch(parts), [[True] * 300])
    causes = ("fill", "verify", "draft", "imbalance", "host", "unattributed")
    assert max(causes, key=lambda name: getattr(lanes, name)) == cause
    assert lanes.unattributed < 0.1 * lanes.total


@pytest.mark.parametrize("stages", [2, 5, 10])
@pytest.mark.parametrize("draft_s", [0.0, 3.0], ids=["synthetic", "drafter"])
@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_every_wait_has_a_cause(stages: int, draft_s: float, sigma: float) -> None:
    """Stages run ahead of the last one, which has the head; after a rejection they still work on a dropped token."""
    factors = lognormal_factors(sigma)
    others: dict[str, Any] = {"head_s": 2.0, "verify_s": 0.1, "host_s": 0.5, "abort_s": 0.5, "draft_s": draft_s}
    parts = make_parts(*[1.0] * stages, scatter=Scatter(factors, factors), **others)
    lanes = lane_shares(Stretch(parts), [[True, True, True, False] * 30])
    assert lanes.unattributed < 1e-3 * lanes.total


@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.tuples(*[st.floats(0, 2)] * 4),
)
def test_nothing_gets_faster_when_a_part_gets_slower(
    stages: list[float], verdicts: list[bool], times: tuple[float, float, float, float]
) -> None:
    draft, verify, host, message = times
    fast = make_parts(*stages, draft_s=draft, verify_s=verify, host_s=host, message_s=message)
    slow = make_parts(*stages, draft_s=draft, verify_s=verify, host_s=host, message_s=message + 0.5)
    assert request_seconds(Stretch(slow), verdicts) >= request_seconds(Stretch(fast), verdicts)
    assert request_seconds(Stretch(fast), verdicts) >= sum(stages) + verify
