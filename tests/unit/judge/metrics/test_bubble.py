"""Lanes' time by what it was spent on: worked examples, and every nanosecond against docs/metrics.md's definition."""

from __future__ import annotations

import random
from dataclasses import asdict, astuple
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spdbench.judge.metrics.bubble import LaneTime, cycles_by_fill, full_cycles, lane_time, part_times, read_spans
from spdbench.judge.results.lanes import FullCycles, PartTime, PartTimes
from spdbench.types import Span, SpanKind


def span(lane: int, kind: SpanKind, start: int, end: int, *, kept: bool = True, cycle: int = -1) -> Span:
    return Span(lane, kind, start, end, 0, kept, cycle)


def spent(spans: list[Span], step_ends: list[int], lanes: int = 1) -> dict[str, int]:
    """What is not zero of the lanes' time."""
    found = lane_time(read_spans(spans, lanes), step_ends)
    return {name: value for name, value in asdict(found).items() if value}


# One lane

ROUND = [span(0, "draft", 0, 20), span(0, "target", 25, 80), span(0, "head", 80, 85), span(0, "verify", 85, 92)]


def test_idle_time_of_one_lane_goes_to_draft_verify_host_and_the_rest_is_unattributed() -> None:
    spans = [*ROUND, span(0, "host", 92, 97)]
    assert spent(spans, [0, 100]) == {"useful": 60, "draft": 20, "verify": 7, "host": 5, "unattributed": 8}


def test_a_drafter_with_a_lane_of_its_own_explains_the_targets_idle_time() -> None:
    spans = [span(1, "draft", 0, 20), span(2, "host", 20, 25), *ROUND[1:]]
    assert spent(spans, [0, 100]) == {"useful": 60, "draft": 20, "verify": 7, "host": 5, "unattributed": 8}


def test_what_overlaps_work_on_the_target_explains_nothing() -> None:
    spans = [span(0, "target", 10, 90), span(1, "draft", 5, 95)]
    assert spent(spans, [0, 100]) == {"useful": 80, "draft": 10, "unattributed": 10}


def test_the_first_cause_in_order_takes_an_instant_that_several_explain() -> None:
    spans = [span(0, "host", 0, 40), span(0, "draft", 10, 30), span(0, "verify", 25, 35), span(0, "target", 40, 100)]
    assert spent(spans, [0, 100]) == {"useful": 60, "verify": 10, "draft": 15, "host": 15}


def test_causes_that_overlap_themselves_count_once() -> None:
    spans = [span(1, "draft", 0, 30), span(2, "draft", 10, 20), span(1, "draft", 20, 40), span(0, "target", 50, 100)]
    assert spent(spans, [0, 100]) == {"useful": 50, "draft": 40, "unattributed": 10}


def test_one_lane_never_fills_nor_waits_for_another() -> None:
    spans = [span(0, "target", 0, 10)]
    assert spent(spans, [0, 10, 20, 30]) == {"useful": 10, "unattributed": 20}


def test_prefill_and_what_follows_the_last_token_are_cut_off() -> None:
    spans = [span(0, "target", 0, 120), span(0, "draft", 150, 180), span(0, "target", 190, 300)]
    assert spent(spans, [100, 200]) == {"useful": 30, "draft": 30, "unattributed": 40}
    assert spent([span(0, "target", 0, 50)], [100, 200]) == {"unattributed": 100}


def test_spans_of_no_duration_are_nothing() -> None:
    spans = [span(0, "target", 5, 5), span(0, "target", 0, 10), span(0, "verify", 10, 10)]
    assert spent(spans, [0, 20]) == {"useful": 10, "unattributed": 10}


def test_no_spans_leave_everything_unattributed() -> None:
    assert spent([], [0, 20], lanes=2) == {"fill": 40}
    assert spent([], [0, 20]) == {"unattributed": 20}


# Three lanes: a cycle of 100 ns, in which the stages take 50, 80 and 60

STAGES = (50, 80, 60)


def cycle(number: int, busy: tuple[int, ...] = (0, 1, 2), *, discarded: tuple[int, ...] = ()) -> list[Span]:
    start = 100 * number
    return [span(lane, "target", start, start + STAGES[lane], kept=lane not in discarded) for lane in busy]


def test_a_full_pipe_is_idle_by_imbalance_and_control() -> None:
    spans = [*cycle(0), span(3, "verify", 80, 90), span(3, "host", 90, 97)]
    assert spent(spans, [0, 100], lanes=3) == {
        "useful": 190, "imbalance": 30 + 20, "verify": 30, "host": 21, "unattributed": 9,
    }  # fmt: skip


def test_a_pipe_that_fills_is_idle_for_whole_cycles_in_the_lanes_without_a_token() -> None:
    spans = [*cycle(0, (0,)), *cycle(1, (0, 1)), *cycle(2), span(3, "verify", 0, 300)]
    found = spent(spans, [0, 100, 200, 300], lanes=3)
    assert found["fill"] == 200 + 100
    assert found["verify"] == 50 + (50 + 20) + (50 + 20 + 40)
    assert found["useful"] == 50 + 130 + 190


def test_work_on_tokens_that_a_rejection_drops_is_wasted_and_not_idle() -> None:
    spans = [*cycle(0, discarded=(0, 1)), *cycle(1, (0,))]
    assert spent(spans, [0, 100, 200], lanes=3) == {
        "useful": 60 + 50, "wasted": 50 + 80, "fill": 200, "imbalance": 30 + 20, "unattributed": 60 + 50,
    }  # fmt: skip


def test_a_lane_waits_only_after_its_own_work() -> None:
    spans = [span(0, "target", 0, 80), span(1, "target", 30, 50), span(2, "target", 0, 20), span(2, "head", 40, 60)]
    assert spent(spans, [0, 80], lanes=3) == {"useful": 140, "imbalance": 30 + 20, "unattributed": 30 + 20}


def test_a_host_span_on_a_lane_explains_that_lane_only_and_a_controllers_all() -> None:
    spans = [span(0, "target", 20, 100), span(1, "target", 30, 100), span(1, "host", 0, 15)]
    assert spent(spans, [0, 100], lanes=2) == {"useful": 150, "host": 15, "unattributed": 35}
    assert spent([*spans, span(2, "host", 10, 20)], [0, 100], lanes=2)["host"] == 10 + 20


def test_a_draft_on_a_stages_own_lane_holds_up_the_others() -> None:
    spans = [span(0, "draft", 0, 40), span(0, "target", 40, 60), span(1, "target", 40, 100)]
    assert spent(spans, [0, 100], lanes=2) == {"useful": 80, "draft": 80, "imbalance": 40}


def test_a_stage_that_runs_past_the_end_of_its_cycle_still_holds_up_those_that_are_done() -> None:
    spans = [span(0, "target", 0, 90), span(1, "target", 0, 130), span(0, "target", 140, 200), *cycle(2, (0, 1))]
    found = spent([*spans, span(1, "target", 130, 200)], [0, 100, 200], lanes=2)
    assert found == {"useful": 90 + 130 + 60 + 70, "imbalance": 40, "unattributed": 10}


def test_a_stage_ahead_of_its_cycle_is_of_the_cycle_that_it_names() -> None:
    """Lane 0 begins each cycle's work 30 ns before the last one's verdict is in."""
    spans = [
        *(span(0, "target", 0, 60, cycle=0), span(1, "target", 10, 100, cycle=0)),
        *(span(0, "target", 70, 130, cycle=1), span(1, "target", 110, 200, cycle=1)),
    ]
    expected = {"useful": 60 + 90 + 60 + 90, "imbalance": 10 + 70, "unattributed": 10 + 10}
    assert spent(spans, [0, 100, 200], lanes=2) == expected
    assert full_cycles(read_spans(spans, 2), [0, 100, 200]) == FullCycles(num=2, stage_s=180e-9, wall_s=200e-9)
    unnamed = [s._replace(cycle=-1) for s in spans]
    assert spent(unnamed, [0, 100, 200], lanes=2)["fill"] == 70


def test_a_stage_two_cycles_ahead_waits_for_the_slowest_one_of_the_cycle_that_it_lies_in() -> None:
    spans = [
        *(span(0, "target", 20 * number, 20 * number + 20, cycle=number) for number in range(3)),
        *(span(1, "target", 100 * number, 100 * number + 90, cycle=number) for number in range(3)),
        *(span(2, "verify", 100 * number + 90, 100 * number + 95) for number in range(3)),
    ]
    expected = {"useful": 60 + 270, "verify": 6 * 5, "imbalance": 30 + 90 + 90, "unattributed": 6 * 5}
    assert spent(spans, [0, 100, 200, 300], lanes=2) == expected


# Cycles with a full pipe


def test_cycle_efficiency_looks_at_full_cycles_only() -> None:
    spans = [*cycle(0, (0,)), *cycle(1, (0, 1)), *cycle(2), *cycle(3)]
    table = read_spans(spans, 3)
    assert full_cycles(table, [0, 100, 200, 300, 410]) == FullCycles(num=2, stage_s=160e-9, wall_s=210e-9)
    assert full_cycles(table, [0, 100, 200]) is None


def test_parts_are_counted_with_their_time_and_dropped_work_is_not() -> None:
    spans = [
        *(span(0, "target", 0, 40), span(1, "target", 50, 80), span(1, "head", 80, 90), span(2, "draft", 10, 30)),
        *(span(0, "target", 100, 120, kept=False), span(3, "verify", 110, 115), span(2, "draft", 190, 230)),
    ]
    found = part_times(read_spans(spans, 2), [0, 100, 200], [4, 2])
    assert found == PartTimes(
        layer=PartTime(num=6, s=70e-9),
        head=PartTime(num=1, s=10e-9),
        draft=PartTime(num=1, s=20e-9),
        verify=PartTime(num=1, s=5e-9),
    )


def test_a_pipe_with_a_dropped_token_at_its_end_is_not_full() -> None:
    spans = [*cycle(0, discarded=(0, 1)), *cycle(1, discarded=(2,)), *cycle(2, discarded=(0, 1, 2))]
    assert full_cycles(read_spans(spans, 3), [0, 100, 200, 300]) == FullCycles(num=1, stage_s=80e-9, wall_s=100e-9)


def test_the_slowest_stage_is_each_cycles_own_and_its_head_belongs_to_it() -> None:
    spans = [
        *(span(0, "target", 0, 50), span(1, "target", 0, 40), span(1, "head", 45, 60)),
        *(span(0, "target", 100, 190), span(1, "target", 100, 140)),
    ]
    assert full_cycles(read_spans(spans, 2), [0, 100, 200]) == FullCycles(num=2, stage_s=145e-9, wall_s=200e-9)


# Cycles by how many stages were at work


def token(lane: int, position: int, start: int, end: int, cycle: int, kind: SpanKind = "target") -> Span:
    return Span(lane, kind, start, end, position, True, cycle)


def test_cycles_are_counted_by_the_stages_at_work_in_them() -> None:
    """One stage, then both twice; the head of the last one is no stage, and counts as its time."""
    spans = [
        *(token(0, 7, 0, 60, 0), token(2, 7, 0, 20, -1, "draft")),
        *(token(0, 8, 100, 150, 1), token(1, 7, 100, 180, 1), token(1, 7, 180, 190, 1, "head")),
        *(token(0, 9, 200, 280, 2), token(1, 8, 200, 250, 2), token(2, 9, 205, 305, -1, "draft")),
    ]
    found = cycles_by_fill(read_spans(spans, 2), [0, 100, 200, 320], 2)
    assert (found.num, found.drafts) == ([0, 1, 2], [0, 1, 1])
    assert found.wall_s == pytest.approx([0, 100e-9, 220e-9])
    assert found.stage_s == pytest.approx([0, 60e-9, 170e-9])
    assert found.slack_s == pytest.approx([0, 40e-9, -20e-9])


def test_a_stage_at_work_on_a_dropped_token_is_not_at_work_in_the_pipe() -> None:
    """After the rejection of 8 in cycle 1, stage 1 had begun 9 and stage 0 had passed it on; 8' enters in cycle 2."""
    spans = [token(1, 7, 0, 90, 1), token(0, 8, 0, 90, 1), token(1, 8, 90, 99, 2), token(0, 9, 90, 99, 2)]
    found = cycles_by_fill(read_spans([*spans, token(0, 8, 100, 150, 2)], 2), [-100, 0, 100, 200], 2)
    assert found.num == [1, 1, 1]
    assert found.stage_s == pytest.approx([0.0, 59e-9, 90e-9])


def test_a_drafter_on_a_stages_lane_has_the_stages_time_as_well() -> None:
    spans = [token(0, 8, 0, 30, 0), token(0, 8, 30, 80, -1, "draft"), token(1, 7, 0, 90, 0)]
    assert cycles_by_fill(read_spans(spans, 2), [0, 100], 2).slack_s == pytest.approx([0, 0, 10e-9])


def test_a_head_on_the_drafters_lane_is_no_stage_and_counts_as_the_drafters_time() -> None:
    spans = [
        token(0, 8, 0, 80, 0),
        token(1, 7, 0, 50, 0),
        token(2, 7, 50, 80, 0, "head"),
        token(2, 8, 0, 40, 0, "draft"),
    ]
    found = cycles_by_fill(read_spans(spans, 3), [0, 100], 2)
    assert found.num == [0, 0, 1]
    assert found.slack_s == pytest.approx([0, 0, 10e-9])


def test_cycles_of_any_spans_add_up_to_the_window() -> None:
    ends = [0, 10, 10, 25]
    found = cycles_by_fill(read_spans([token(1, 3, 1, 9, 0)], 3), ends, 3)
    assert sum(found.num) == 2
    assert sum(found.wall_s) == pytest.approx(25e-9)


# Spans that cannot be


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([("target", 0, 10, 5)], "target on lane 0 from 10 to 5 ns ends before it starts"),
        ([("draft", -1, 0, 5)], "draft on lane -1 from 0 to 5 ns lies on no lane"),
        ([("head", 2, 0, 5)], "head on lane 2 .* work on the target, whose last lane is 1"),
        ([("target", 1, 0, 5), ("head", 1, 4, 6)], "head on lane 1 from 4 to 6 ns begins before the work"),
        ([("target", 1, 5, 9), ("target", 1, 0, 20)], "target on lane 1 from 5 to 9 ns begins before"),
        ([("think", 1, 5, 9)], "kind 'think' is none of target, head, verify"),
    ],
)
def test_spans_of_a_broken_backend_are_refused(spans: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spans([span(lane, kind, start, end) for kind, lane, start, end in spans], 2)


def test_lanes_work_at_the_same_time_and_one_after_the_other_without_complaint() -> None:
    spans = [span(0, "target", 0, 10), span(1, "target", 5, 15), span(0, "head", 10, 12), span(0, "host", 0, 12)]
    assert spent(spans, [0, 15], lanes=2)["useful"] == 22


def test_a_window_without_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="a decode window has a duration"):
        lane_time(read_spans(ROUND, 1), [5, 5])


# Any spans


@st.composite
def timelines(draw: st.DrawFn) -> tuple[list[Span], list[int], int]:
    """Spans in a window of some cycles, on the lanes and beyond, before and after it; in any order."""
    lanes = draw(st.integers(1, 3))
    ends = list(accumulate(draw(st.lists(st.integers(0, 12), min_size=1, max_size=5)), initial=10))
    if ends[-1] == ends[0]:
        ends.append(ends[0] + 5)
    kinds: tuple[SpanKind, ...] = ("target", "head")
    spans = []
    named = draw(st.booleans())
    for lane in range(lanes):
        at, cycle = 0, 0 if named else -1
        for gap, length in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=8)):
            kept = draw(st.booleans())
            spans.append(span(lane, draw(st.sampled_from(kinds)), at + gap, at + gap + length, kept=kept, cycle=cycle))
            at += gap + length
            cycle += draw(st.integers(0, 2)) if named else 0
    causes: tuple[SpanKind, ...] = ("draft", "verify", "host")
    others = st.tuples(st.integers(0, lanes + 1), st.sampled_from(causes), st.integers(0, 60), st.integers(0, 15))
    for where, kind, start, length in draw(st.lists(others, max_size=8)):
        spans.append(span(where, kind, start, start + length))
    return draw(st.permutations(spans)), ends, lanes


def by_the_nanosecond(spans: list[Span], ends: list[int], lanes: int) -> LaneTime:
    """docs/metrics.md's definition, instant by instant."""
    first, last = ends[0], ends[-1]
    counts = dict.fromkeys(LaneTime.__annotations__, 0)

    def cycle_of(t: int) -> int:
        return max(index for index, end in enumerate(ends) if end <= t)

    def cycle_with(s: Span) -> int:
        """As named, counting steps that took no time; what would come after the last counts as in it."""
        begins = s.start_ns if s.cycle < 0 else ends[min(s.cycle, len(ends) - 1)]
        return cycle_of(min(begins, last - 1))

    work = [
        s._replace(start_ns=max(s.start_ns, first), end_ns=min(s.end_ns, last))
        for s in spans
        if s.kind in ("target", "head")
    ]
    work = [s for s in work if s.start_ns < s.end_ns]
    slowest: dict[int, int] = {}
    for s in work:
        slowest[cycle_with(s)] = max(slowest.get(cycle_with(s), 0), s.end_ns)

    def cause(lane: int, t: int) -> str:
        mine = sorted(s for s in work if s.lane == lane)
        here = {s.kind for s in spans if s.start_ns <= t < s.end_ns and (s.kind != "host" or s.lane in (lane, *beyond))}
        begun = [s for s in mine if s.start_ns <= t]
        for s in begun:
            if t < s.end_ns:
                return "useful" if s.kept else "wasted"
        if lanes > 1 and cycle_of(t) not in {cycle_with(s) for s in mine}:
            return "fill"
        for name in ("verify", "draft"):
            if name in here:
                return name
        if lanes > 1 and begun:
            newest = max(begun, key=lambda s: s.start_ns)
            cycle = cycle_with(newest)
            done = all(cycle_with(s) != cycle for s in mine if s.start_ns > t)
            waited_for = min(cycle, cycle_of(t))  # it may be ahead of the cycle that it lies in
            if done and t < slowest.get(waited_for, 0):
                return "imbalance"
        return "host" if "host" in here else "unattributed"

    beyond = range(lanes, lanes + 2)
    for lane in range(lanes):
        for t in range(first, last):
            counts[cause(lane, t)] += 1
    return LaneTime(**counts)


@given(timelines())
@example(([], [10, 10, 15], 2))
@example(([span(0, "target", 1, 13, cycle=0), span(1, "target", 0, 11, cycle=1)], [10, 12, 13], 2))
def test_every_nanosecond_is_charged_as_the_definition_says(timeline: tuple[list[Span], list[int], int]) -> None:
    spans, ends, lanes = timeline
    assert lane_time(read_spans(spans, lanes), ends) == by_the_nanosecond(spans, ends, lanes)


@given(timelines())
def test_parts_are_never_negative_and_add_up_exactly(timeline: tuple[list[Span], list[int], int]) -> None:
    spans, ends, lanes = timeline
    found = lane_time(read_spans(spans, lanes), ends)
    assert min(astuple(found)) >= 0
    assert found.useful + found.wasted + found.bubble == lanes * (ends[-1] - ends[0])
    shares = found.shares().model_dump().values()
    assert sum(shares) == pytest.approx(1, abs=1e-12)


@given(timelines())
def test_every_cycle_has_one_fill(timeline: tuple[list[Span], list[int], int]) -> None:
    spans, ends, lanes = timeline
    found = cycles_by_fill(read_spans(spans, lanes), ends, lanes)
    assert len(found.num) == lanes + 1
    assert sum(found.num) == len(set(ends)) - 1
    assert sum(found.wall_s) == pytest.approx((ends[-1] - ends[0]) * 1e-9)


@given(timelines(), st.randoms())
def test_the_order_of_spans_means_nothing(
    timeline: tuple[list[Span], list[int], int], randomness: random.Random
) -> None:
    spans, ends, lanes = timeline
    found = lane_time(read_spans(spans, lanes), ends)
    randomness.shuffle(spans)
    table = read_spans(spans, lanes)
    assert lane_time(table, ends) == found
    later = read_spans([s._replace(start_ns=s.start_ns + 10**18, end_ns=s.end_ns + 10**18) for s in spans], lanes)
    assert lane_time(later, [end + 10**18 for end in ends]) == found


@given(timelines())
def test_what_lies_outside_of_the_window_means_nothing(timeline: tuple[list[Span], list[int], int]) -> None:
    spans, ends, lanes = timeline
    clipped = [s._replace(start_ns=max(s.start_ns, ends[0]), end_ns=min(s.end_ns, ends[-1])) for s in spans]
    inside = [s for s in clipped if s.start_ns < s.end_ns]
    assert lane_time(read_spans(inside, lanes), ends) == lane_time(read_spans(spans, lanes), ends)


def test_a_long_answer_is_counted_in_full() -> None:
    steps = 5_000
    spans = [s._replace(start_ns=s.start_ns + 100 * i, end_ns=s.end_ns + 100 * i) for i in range(steps) for s in ROUND]
    found = lane_time(read_spans(spans, 1), [100 * i for i in range(steps + 1)])
    assert asdict(found) | {"unattributed": 0} == {
        **dict.fromkeys(asdict(found), 0), "useful": 60 * steps, "draft": 20 * steps, "verify": 7 * steps,
    }  # fmt: skip
