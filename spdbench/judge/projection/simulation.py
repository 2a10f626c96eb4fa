"""A pipeline simulated event by event: stages, output head, drafter, verdicts, messages and host, each with its time.

It follows the engine (`pipeline/process.py`): a stage runs as soon as its input is there; the drafter reads the states
of the cycle before, and its token goes to stage 0 without waiting for the verdict; the controller waits for the oldest
token alone. A rejection drops all tokens in flight, and the next one enters an empty pipeline. So the time from one
flush to the next depends on nothing but the number of drafts accepted in between: one simulated stretch without a
rejection gives the time of every request.

`Parts.in_step` is the reference code's runtime instead (SPD.md, section 9): every cycle begins with a message to all
stages after the verdict, and the draft waits for it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from spdbench.judge.metrics.bubble import LaneTime, lane_time, read_spans
from spdbench.types import Span, SpanKind

NS_PER_S = 1e9
MAX_SHOWN_CYCLES = 4_000
"""Cycles of which the bubble is computed; its shares no longer change with more."""


@dataclass(frozen=True)
class Parts:
    """Seconds of each part of a cycle of one token a stage.

    `stages` are those of the target's layers, stage by stage. `devices` says on which device each stage runs, and the
    last entry where the drafter does; work on one device is done in the order in which its input arrives. `start_s` is
    what a request takes once, before its first cycle. With `head_on_drafter` the output head runs where the drafter
    does, else after the last stage. `late` drafters read what stage 0 computes in the same cycle (PPSD).
    """

    stages: tuple[float, ...]
    head_s: float
    draft_s: float
    verify_s: float
    host_s: float
    message_s: float
    devices: tuple[int, ...]
    start_s: float = 0.0
    head_on_drafter: bool = False
    in_step: bool = False
    late: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def slowest_s(self) -> float:
        """Of the stages, the output head included where the last one has it."""
        return max(*self.stages[:-1], self.stages[-1] + (0.0 if self.head_on_drafter else self.head_s), 0.0)

    def with_message(self, message_s: float) -> Parts:
        return replace(self, message_s=message_s)


class _Work(NamedTuple):
    """One piece of work of a cycle, from `ready` on; `stage` -1 is the drafter's."""

    ready: float
    stage: int


class _Piece(NamedTuple):
    """What was done on a lane, for the bubble. `node` counts tokens since the flush."""

    lane: int
    kind: SpanKind
    start: float
    end: float
    node: int
    cycle: int


class Stretch:
    """The cycles after a flush, as long as every draft is accepted; simulated as far as they are asked for."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._ends: list[float] = []
        self._pieces: list[_Piece] = []
        self._free: dict[int, float] = {}
        self._finished = [0.0] * parts.num_stages
        self._arrival = parts.message_s
        self._controller = self._begin = 0.0

    def end(self, cycle: int) -> float:
        """Seconds from the flush to the end of the cycle of that number, from 0."""
        while len(self._ends) <= cycle:
            self._run_cycle()
        return self._ends[cycle]

    def verdict(self, number: int) -> float:
        """Seconds from the flush to the verdict of that number, from 0."""
        return self.end(self.parts.num_stages - 1 + number)

    def pieces(self, last_cycle: int) -> Iterator[_Piece]:
        """All work that began by the end of the cycle of that number."""
        self.end(last_cycle)
        return (piece for piece in self._pieces if piece.cycle <= last_cycle)

    def _run_cycle(self) -> None:
        parts, cycle = self.parts, len(self._ends)
        before, busy = list(self._finished), min(cycle + 1, parts.num_stages)
        begin = self._begin + parts.message_s if parts.in_step else 0.0
        if parts.in_step:
            self._add(parts.num_stages + 1, "host", self._begin, begin, cycle, cycle)
        self._add(0, "host", self._arrival - parts.message_s, self._arrival, cycle, cycle)
        work = [_Work(max(self._arrival, begin), 0)]
        for stage in range(1, busy):
            arrived = before[stage - 1] + parts.message_s
            self._add(stage, "host", before[stage - 1], arrived, cycle - stage, cycle)
            work.append(_Work(max(arrived, begin), stage))
        states = max(before[: min(cycle, parts.num_stages)], default=0.0)
        draft = max(self._controller, states + parts.message_s if cycle else 0.0)
        if parts.late:
            self._run_all(work, cycle)
            states = max(self._finished[:busy]) + parts.message_s
            drafted = self._run_all([_Work(max(draft, states), -1)], cycle)
        else:
            drafted = self._run_all([*work, _Work(draft, -1)], cycle)
        self._end_cycle(cycle, busy - 1, drafted)

    def _run_all(self, work: Sequence[_Work], cycle: int) -> float:
        """Runs a cycle's work, on each device in the order in which it becomes ready; returns when the draft is done,
        if one is made."""
        parts, drafted = self.parts, 0.0
        for ready, stage in sorted(work):
            device = parts.devices[stage]
            start = max(ready, self._free.get(device, 0.0))
            if stage < 0:
                end = drafted = start + parts.draft_s
                self._add(parts.num_stages, "draft", start, end, cycle, cycle)
            else:
                end = start + parts.stages[stage]
                self._add(stage, "target", start, end, cycle - stage, cycle)
                if stage == parts.num_stages - 1 and not parts.head_on_drafter:
                    self._add(stage, "head", end, end + parts.head_s, cycle - stage, cycle)
                    end += parts.head_s
                self._finished[stage] = end
            self._free[device] = end
        return drafted

    def _end_cycle(self, cycle: int, oldest: int, drafted: float) -> None:
        parts, lane = self.parts, self.parts.num_stages + 1
        arrived = self._finished[oldest] + parts.message_s
        self._add(lane, "host", self._finished[oldest], arrived, cycle - oldest, cycle)
        done = max(arrived, drafted)
        if cycle >= parts.num_stages - 1:
            verdict = done + parts.verify_s
            if parts.head_on_drafter:
                verdict += parts.head_s
                self._free[parts.devices[-1]] = verdict
            self._add(lane, "verify", done, verdict, cycle - oldest, cycle)
            done = verdict
        self._ends.append(done)
        self._controller = self._begin = done + parts.host_s
        self._add(lane, "host", done, self._controller, cycle - oldest, cycle)
        waits = parts.in_step or parts.late or parts.num_stages == 1
        self._arrival = (self._controller if waits else drafted) + parts.message_s

    def _add(self, lane: int, kind: SpanKind, start: float, end: float, node: int, cycle: int) -> None:
        if end > start:
            self._pieces.append(_Piece(lane, kind, start, end, node, cycle))


def stretches(verdicts: Sequence[bool]) -> list[tuple[int, bool]]:
    """The verdicts between flushes: how many there are, and whether the last of them is a rejection."""
    found, count = [], 0
    for accepted in verdicts:
        count += 1
        if not accepted:
            found.append((count, True))
            count = 0
    return [*found, (count, False)] if count else found


def request_seconds(stretch: Stretch, verdicts: Sequence[bool]) -> float:
    """Decode time of a request whose tokens after the first got these `verdicts`."""
    host_s = stretch.parts.host_s
    times = [stretch.verdict(count - 1) + (host_s if rejects else 0.0) for count, rejects in stretches(verdicts)]
    return stretch.parts.start_s + sum(times)


def lane_shares(stretch: Stretch, requests: Sequence[Sequence[bool]]) -> LaneTime:
    """What the stages do in the decode time of the `requests`, by METRICS.md's definition of the bubble, from the spans
    of the simulated cycles; of the first `MAX_SHOWN_CYCLES` of them."""
    parts = stretch.parts
    spans: list[Span] = []
    ends, offset, position = [0], 0.0, 0
    for verdicts in requests:
        for count, rejects in stretches(verdicts):
            last = parts.num_stages - 2 + count
            cut, number = stretch.end(last), len(ends) - 1
            for piece in stretch.pieces(last):
                start, end = _ns(offset + piece.start), _ns(offset + min(piece.end, cut))
                if end > start:
                    kept = piece.node < count or piece.lane >= parts.num_stages
                    spans.append(
                        Span(piece.lane, piece.kind, start, end, position + piece.node, kept, number + piece.cycle)
                    )
            ends += [_ns(offset + stretch.end(cycle)) for cycle in range(last + 1)]
            offset += cut + (parts.host_s if rejects else 0.0)
            position += count
        if len(ends) > MAX_SHOWN_CYCLES:
            break
    return lane_time(read_spans(spans, parts.num_stages), ends)


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
