"""What a request's lanes did with the decode time: work that counted, work thrown away, and waiting, by its cause.

metrics.md, "Bubble ratio", from spans and the ends of steps, in whole nanoseconds, so that the parts add up exactly.

Busy are spans of kind `target` and `head`; they lie on the lanes 0 to n - 1 and never overlap on one. `verify` and
`draft` spans explain the idle time of every lane, wherever they lie, since all wait for a verdict or a draft. A `host`
span on a lane explains that lane's idle time; one on a number of n or above (the controller's) explains every lane's.

With several lanes a step is a cycle, and a span belongs to the cycle that it names, else to the one in which it begins.
A lane without a span in a cycle holds no token there, which is `fill`. With one lane the token is always there, and no
other lane to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.results.lanes import BubbleParts, CyclesByFill, FullCycles, PartTime, PartTimes
from spdbench.types import Span

NS_PER_S = 1e9
TARGET, HEAD, VERIFY, DRAFT, HOST = range(5)
CODES = {"target": TARGET, "head": HEAD, "verify": VERIFY, "draft": DRAFT, "host": HOST}
IDLE = range(6)
"""The causes of idle time: `fill` and the fields after it in `LaneTime`."""
Times = NDArray[np.int64]


@dataclass(frozen=True)
class LaneTime:
    """Nanoseconds of lanes x decode window, by what they were spent on; together exactly all of them."""

    useful: int
    wasted: int
    fill: int
    verify: int
    draft: int
    imbalance: int
    host: int
    unattributed: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def bubble(self) -> int:
        """Time in which a lane computed nothing of the target."""
        return self.total - self.useful - self.wasted

    def shares(self) -> BubbleParts:
        return BubbleParts(**{field.name: getattr(self, field.name) / self.total for field in fields(self)})


@dataclass(frozen=True)
class SpanTable:
    """Spans as columns of equal length, by lane and then by start; those without any duration are omitted."""

    lanes: int
    lane: Times
    kind: Times
    start: Times
    end: Times
    position: Times
    kept: NDArray[np.bool_]
    cycle: Times

    @property
    def busy(self) -> SpanTable:
        """Only the work on the target."""
        return self.where(self.kind <= HEAD)

    def where(self, chosen: NDArray[np.bool_] | Times) -> SpanTable:
        names = ("lane", "kind", "start", "end", "position", "kept", "cycle")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def clipped(self, first: int, last: int) -> SpanTable:
        """What lies between `first` and `last`."""
        start, end = self.start.clip(first, last), self.end.clip(first, last)
        return replace(self, start=start, end=end).where(end > start)


def read_spans(spans: Sequence[Span], lanes: int) -> SpanTable:
    """`spans`, in any order, of a backend with so many `lanes`.

    Raises:
        ValueError: the backend is broken: a kind that there is not, an end before its start, a lane that does not hold
            layers at work on the target, or two such spans on one lane at the same time.
    """
    lane, kind, start, end, position, kept, cycle = zip(*spans, strict=True) if spans else ((),) * 7
    if unknown := set(kind) - CODES.keys():
        raise ValueError(f"spans: kind {unknown.pop()!r} is none of {', '.join(CODES)}")
    codes = np.fromiter(map(CODES.__getitem__, kind), np.int64, len(kind))
    starts, ends = np.array(start, np.int64), np.array(end, np.int64)
    order = np.lexsort((starts, lane))
    kepts = np.array(kept, bool)
    lane_numbers, positions, cycles = (np.array(column, np.int64) for column in (lane, position, cycle))
    table = SpanTable(lanes, lane_numbers, codes, starts, ends, positions, kepts, cycles).where(order)
    _check(table)
    return table.where(table.end > table.start)


def _check(table: SpanTable) -> None:
    _refuse(table, table.end < table.start, "ends before it starts")
    _refuse(table, table.lane < 0, "lies on no lane")
    homeless = (table.kind <= HEAD) & (table.lane >= table.lanes)
    _refuse(table, homeless, f"is work on the target, whose last lane is {table.lanes - 1}")
    busy = table.where((table.kind <= HEAD) & (table.end > table.start))
    overlaps = (busy.lane[1:] == busy.lane[:-1]) & (busy.start[1:] < busy.end[:-1])
    _refuse(busy, np.append(False, overlaps), "begins before the work on the same lane before it has ended")


def _refuse(table: SpanTable, bad: NDArray[np.bool_], why: str) -> None:
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        kind = list(CODES)[int(table.kind[at])]
        raise ValueError(f"spans: {kind} on lane {table.lane[at]} from {table.start[at]} to {table.end[at]} ns {why}")


def lane_time(table: SpanTable, step_ends: Sequence[int]) -> LaneTime:
    """How the lanes spent the decode window.

    `step_ends` are the ends of steps in ns on the spans' clock, ascending: first that of the step with the first token,
    last that of the one with the last. What spans hold outside of these is not looked at.

    The window is cut at every instant at which a span begins or ends, or a step ends. Between two cuts nothing changes,
    so that each piece of a lane's time is work or has one cause: the first in docs/metrics.md's order that holds.
    """
    ends = _cycle_ends(step_ends)
    busy = _in_cycles(table.busy, step_ends, ends)
    inside = table.clipped(int(ends[0]), int(ends[-1]))
    cuts = np.unique(np.concatenate((ends, inside.start, inside.end)))
    starts, lengths = cuts[:-1], np.diff(cuts)
    cycle = _cycle_of(starts, ends)
    verify, draft = (_covered(cuts, inside.where(inside.kind == kind)) for kind in (VERIFY, DRAFT))
    idle_ns = np.zeros(len(IDLE), dtype=np.int64)
    for lane in range(table.lanes):
        own = busy.where(busy.lane == lane)
        hosts = (inside.kind == HOST) & ((inside.lane == lane) | (inside.lane >= table.lanes))
        fill = waits = np.zeros(len(starts), dtype=np.bool_)
        if table.lanes > 1:
            fill = ~np.isin(cycle, own.cycle)
            waits = starts < _waits_until(own, busy, ends, starts)
        cause = np.select([fill, verify, draft, waits, _covered(cuts, inside.where(hosts))], IDLE[:-1], IDLE[-1])
        idle = ~_covered(cuts, own)
        np.add.at(idle_ns, cause[idle], lengths[idle])
    duration = busy.end - busy.start
    useful, wasted = int(duration[busy.kept].sum()), int(duration[~busy.kept].sum())
    return LaneTime(useful, wasted, *idle_ns.tolist())


def full_cycles(table: SpanTable, step_ends: Sequence[int]) -> FullCycles | None:
    """The cycles between `step_ends` in which the pipe was full; None if there were none.

    Full: every lane was at work, the last of them on a token that counts. Else it may be on one that a verdict dropped
    while it was on its way, and then nothing comes of the cycle.
    """
    ends = _cycle_ends(step_ends)
    busy = _in_cycles(table.busy, step_ends, ends)
    lane_ns = _lane_ns(busy, table.lanes, len(ends) - 1)
    full = lane_ns.all(axis=0)
    full &= np.isin(np.arange(len(ends) - 1), busy.cycle[busy.kept & (busy.lane == table.lanes - 1)])
    if not full.any():
        return None
    return FullCycles(
        num=int(full.sum()),
        stage_s=float(lane_ns.max(axis=0)[full].sum()) / NS_PER_S,
        wall_s=float(np.diff(ends)[full].sum()) / NS_PER_S,
    )


def cycles_by_fill(table: SpanTable, step_ends: Sequence[int], num_stages: int) -> CyclesByFill:
    """The cycles between `step_ends` by how many of `num_stages` stages were at work on tokens in the pipe, and how
    far the drafter was from holding up the slowest lane."""
    ends = _cycle_ends(step_ends)
    num_cycles = len(ends) - 1
    busy, drafting = (_in_cycles(spans, step_ends, ends) for spans in (table.busy, table.where(table.kind == DRAFT)))
    layers = busy.where((busy.kind == TARGET) & (busy.lane < num_stages))
    fill = at_work(layers.lane, layers.position, layers.cycle, (num_stages, num_cycles)).sum(axis=0)
    num_lanes = 1 + max(table.lanes, int(drafting.lane.max(initial=0)))
    busy_ns, draft_ns = (_lane_ns(spans, num_lanes, num_cycles) for spans in (busy, drafting))
    slowest_ns, drafted = busy_ns.max(axis=0), draft_ns.any(axis=0)
    drafters_ns = np.where(draft_ns > 0, draft_ns + busy_ns, 0).max(axis=0)

    def sums(values: NDArray[Any]) -> list[float]:
        found: list[float] = np.bincount(fill, values, minlength=num_stages + 1).tolist()
        return found

    return CyclesByFill(
        num=np.bincount(fill, minlength=num_stages + 1).tolist(),
        wall_s=sums(np.diff(ends) / NS_PER_S),
        stage_s=sums(slowest_ns / NS_PER_S),
        drafts=np.bincount(fill[drafted], minlength=num_stages + 1).tolist(),
        slack_s=sums(np.where(drafted, slowest_ns - drafters_ns, 0) / NS_PER_S),
    )


def at_work(lane: Times, position: Times, cycle: Times, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which lanes work in which cycle on a token in the pipe: `shape`, lanes by cycles. The rest are columns of spans.

    In the cycle after a rejection, a stage that ran ahead may be at work on a token that was dropped. Tokens in the
    pipe stand one position a stage apart, so position + lane is one number for all of them. Dropped tokens come after
    the token that replaces a rejected draft, so theirs is higher.
    """
    front = np.full(shape[1], np.iinfo(np.int64).max)
    np.minimum.at(front, cycle, position + lane)
    in_pipe = position + lane == front[cycle]
    found = np.zeros(shape, dtype=np.bool_)
    found[lane[in_pipe], cycle[in_pipe]] = True
    return found


def _lane_ns(spans: SpanTable, num_lanes: int, num_cycles: int) -> NDArray[Any]:
    """Nanoseconds of `spans` by lane and cycle."""
    place = spans.lane * num_cycles + spans.cycle
    return np.bincount(place, spans.end - spans.start, num_lanes * num_cycles).reshape(num_lanes, num_cycles)


def part_times(table: SpanTable, step_ends: Sequence[int], stage_layers: Sequence[int]) -> PartTimes:
    """How often each part of the work was done between `step_ends`, and its time. `stage_layers` are those of each
    lane. Work on tokens that were dropped does not count: most of it was cut short."""
    ends = _cycle_ends(step_ends)
    inside = table.where((table.start >= ends[0]) & (table.end <= ends[-1]) & table.kept)
    found = {}
    for name, kind in (("layer", TARGET), ("head", HEAD), ("draft", DRAFT), ("verify", VERIFY)):
        of_kind = inside.where(inside.kind == kind)
        num = int(np.asarray(stage_layers)[of_kind.lane].sum()) if kind == TARGET else len(of_kind.start)
        if num:
            found[name] = PartTime(num=num, s=float((of_kind.end - of_kind.start).sum()) / NS_PER_S)
    return PartTimes(**found)


def _covered(cuts: Times, table: SpanTable) -> NDArray[np.bool_]:
    """Which of the pieces between `cuts` [P + 1] some span covers: [P]. All spans begin and end at cuts."""
    opened, closed = (
        np.bincount(np.searchsorted(cuts, times), minlength=len(cuts)) for times in (table.start, table.end)
    )
    return np.cumsum(opened - closed)[:-1] > 0


def _waits_until(own: SpanTable, busy: SpanTable, ends: Times, starts: Times) -> Times:
    """Until when a lane that is idle at each of `starts`, done with its cycle's work, waits for the cycle's slowest
    lane; where it is ahead of the cycle that it lies in, for that cycle's."""
    slowest = np.zeros(len(ends) - 1, dtype=np.int64)
    np.maximum.at(slowest, busy.cycle, busy.end)
    done = np.append(own.cycle[1:] != own.cycle[:-1], True)[: len(own.cycle)]
    before = np.searchsorted(own.start, starts, side="right") - 1  # -1 before any work: the entry that is appended
    cycle = np.minimum(np.append(own.cycle, 0)[before], _cycle_of(starts, ends))
    found: Times = np.where(np.append(done, False)[before], slowest[cycle], starts[0])
    return found


def _cycle_ends(step_ends: Sequence[int]) -> Times:
    """The ends of steps, without those that took no time."""
    ends = np.unique(np.asarray(step_ends, dtype=np.int64))
    if len(ends) < 2:
        raise ValueError("a decode window has a duration")
    return ends


def _in_cycles(busy: SpanTable, step_ends: Sequence[int], ends: Times) -> SpanTable:
    """What lies in the window, each span in its cycle: the one that it names, else the one in which it begins."""
    inside = busy.clipped(int(ends[0]), int(ends[-1]))
    begins = np.asarray(step_ends, dtype=np.int64)[inside.cycle.clip(0, len(step_ends) - 1)]
    named = _cycle_of(begins, ends)
    cycle = np.where(inside.cycle < 0, _cycle_of(inside.start, ends), named)
    return replace(inside, cycle=cycle.clip(0, len(ends) - 2))


def _cycle_of(times: Times, ends: Times) -> Times:
    """The cycle in which each of `times` lies, from 0; all lie in the window."""
    return np.searchsorted(ends, times, side="right") - 1
