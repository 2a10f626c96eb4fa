"""A pipeline simulated event by event: stages, output head, drafter, verdicts, messages and host, each with its time.

It follows the engine (`processes/process.py`): a stage runs as soon as its input is there; the drafter reads the states
of the cycle before, and its token goes to stage 0 without waiting for the verdict; the controller waits for the oldest
token alone. A rejection drops all tokens in flight, and the next one enters an empty pipeline. So the time from one
flush to the next depends on nothing but how many cycles lie in between: one simulated stretch without a rejection gives
the time of every request.

Times scatter, and a cycle waits for the slowest of its parts. So where `Parts.scatter` says how much, a stretch is
simulated `REPLICAS` times at once with times drawn independently, and a verdict's time is the mean over these.

A drafter on the first stage's device shares its process (`processes/local_stage.py`): there the drafted token passes
stage 0 at once, and the verdict is read after that.

`Parts.in_step` is the reference code's runtime instead (published with arXiv 2605.30852): every cycle begins
with a message to all stages after the verdict, and the draft waits for it too.

Shapes: R replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.bubble import LaneTime, lane_time, read_spans
from spdbench.judge.metrics.stats import SEED
from spdbench.types import Span, SpanKind

NS_PER_S = 1e9
MAX_SHOWN_CYCLES = 4_000
"""Cycles of which the bubble is computed; its shares no longer change with more."""
REPLICAS = 256
QUANTILES = 64
Times = NDArray[np.float64]
Factors = tuple[float, ...]
"""Equally likely factors of a part's mean time, whose mean is 1; empty for a part that always takes its mean."""


@dataclass(frozen=True)
class Scatter:
    """How the times of parts scatter about their means."""

    stages: Factors = ()
    drafts: Factors = ()
    messages: Factors = ()


def lognormal_factors(sigma: float) -> Factors:
    """The quantiles of a log-normal distribution: times are positive, and long ones lie farther from the mean. None
    where `sigma`, the standard deviation of the logarithm, is 0."""
    if sigma <= 0:
        return ()
    values = [np.exp(sigma * NormalDist().inv_cdf((each + 0.5) / QUANTILES)) for each in range(QUANTILES)]
    return as_factors(values)


def as_factors(times: Sequence[float]) -> Factors:
    """Measured times of one part over their mean; none where there are no two."""
    mean = sum(times) / max(1, len(times))
    return tuple(float(each / mean) for each in times) if len(times) > 1 and mean > 0 else ()


@dataclass(frozen=True)
class Parts:
    """Seconds of each part of a cycle of one token a stage, on average.

    `stages` are those of the target's layers, stage by stage. `devices` says on which device each stage runs, and the
    last entry where the drafter does; work on one device is done in the order in which its input arrives. `start_s` is
    what a request takes once, before its first cycle. Of the output head the drafter's device computes `drafters_head`,
    from 0 to 1, and the last stage the rest, at the same time. `abort_s` is how long a stage still works on a token
    that was dropped. Drafts with `reads_states` wait for what the stages computed in the cycle before; a synthetic
    drafter's do not. `late` drafters read what stage 0 computes in the same cycle (PPSD).
    """

    stages: tuple[float, ...]
    head_s: float
    draft_s: float
    verify_s: float
    host_s: float
    message_s: float
    devices: tuple[int, ...]
    start_s: float = 0.0
    drafters_head: float = 0.0
    abort_s: float = 0.0
    in_step: bool = False
    late: bool = False
    reads_states: bool = True
    scatter: Scatter = field(default=Scatter())

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def drafts_in_first_stage(self) -> bool:
        """True if one process does both."""
        alone = self.in_step or self.late or self.num_stages == 1
        return self.devices[0] == self.devices[-1] and not alone

    @property
    def last_head_s(self) -> float:
        """Of the output head, the last stage's part."""
        return self.head_s * (1 - self.drafters_head)

    @property
    def slowest_s(self) -> float:
        """Of the stages, the output head included where the last one has it."""
        return max(*self.stages[:-1], self.stages[-1] + self.last_head_s, 0.0)


class _Work(NamedTuple):
    """One piece of work of a cycle, from `ready` [R] on; `stage` -1 is the drafter's."""

    ready: Times
    stage: int


class _Piece(NamedTuple):
    """What was done on a lane, for the bubble, from `start` [R] to `end` [R]. `node` counts tokens since the flush."""

    lane: int
    kind: SpanKind
    start: Times
    end: Times
    node: int
    cycle: int


class Stretch:
    """The cycles after a flush, as long as every draft is accepted; simulated as far as they are asked for."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.num_replicas = REPLICAS if parts.scatter != Scatter() else 1
        self._rng = np.random.default_rng(SEED)
        self._ends: list[Times] = []
        self._pieces: list[_Piece] = []
        zero = np.zeros(self.num_replicas)
        self._free = dict.fromkeys(parts.devices, zero)
        self._finished = [zero] * parts.num_stages
        self._controller = self._begin = self._sent = zero
        self._ahead: Times | None = None  # when stage 0 has done the next cycle's work, if it does that first
        self._arrival = self._message()

    def end(self, cycle: int) -> float:
        """Seconds from the flush to the end of the cycle of that number, from 0."""
        return float(self._end(cycle).mean())

    def verdict(self, number: int) -> float:
        """Seconds from the flush to the verdict of that number, from 0."""
        return self.end(self.parts.num_stages - 1 + number)

    def end_in(self, replica: int, cycle: int) -> float:
        """`end` in one of the replicas."""
        return float(self._end(cycle)[replica])

    def pieces(self, last_cycle: int) -> Iterator[_Piece]:
        """All work that began by the end of the cycle of that number."""
        self._end(last_cycle)
        return (piece for piece in self._pieces if piece.cycle <= last_cycle)

    def _end(self, cycle: int) -> Times:
        while len(self._ends) <= cycle:
            self._run_cycle()
        return self._ends[cycle]

    def _drawn(self, mean_s: float, factors: Factors) -> Times:
        if not factors:
            return np.full(self.num_replicas, mean_s)
        return mean_s * self._rng.choice(factors, self.num_replicas)

    def _message(self) -> Times:
        return self._drawn(self.parts.message_s, self.parts.scatter.messages)

    def _run_cycle(self) -> None:
        parts, cycle = self.parts, len(self._ends)
        before, busy = list(self._finished), min(cycle + 1, parts.num_stages)
        begin = self._begin + self._message() if parts.in_step else np.zeros(self.num_replicas)
        if parts.in_step:
            self._add(parts.num_stages + 1, "host", self._begin, begin, cycle, cycle)
        if self._ahead is None:
            self._add(0, "host", self._sent, self._arrival, cycle, cycle)
        work = []
        if self._ahead is None:
            work.append(_Work(np.maximum(self._arrival, begin), 0))
        else:
            self._finished[0] = self._ahead
        for stage in range(1, busy):
            arrived = before[stage - 1] + self._message()
            self._add(stage, "host", before[stage - 1], arrived, cycle - stage, cycle)
            work.append(_Work(np.maximum(arrived, begin), stage))
        draft = self._controller
        if cycle and parts.reads_states:
            draft = np.maximum(draft, np.max(before[: min(cycle, parts.num_stages)], axis=0) + self._message())
        if parts.late:
            self._run_all(work, cycle)
            states = np.max(self._finished[:busy], axis=0) + self._message()
            drafted = self._run_all([_Work(np.maximum(draft, states), -1)], cycle)
        else:
            drafted = self._run_all([*work, _Work(draft, -1)], cycle)
        self._end_cycle(cycle, busy - 1, drafted)

    def _run_all(self, work: Sequence[_Work], cycle: int) -> Times:
        """Runs a cycle's work, on each device in the order in which it becomes ready on average; returns when the
        draft is done, if one is made."""
        parts, drafted = self.parts, np.zeros(self.num_replicas)
        for ready, stage in sorted(work, key=lambda each: (each.ready.mean(), each.stage)):
            device = parts.devices[stage]
            start = np.maximum(ready, self._free[device])
            if stage < 0:
                end = drafted = start + self._drawn(parts.draft_s, parts.scatter.drafts)
                self._add(parts.num_stages, "draft", start, end, cycle, cycle)
            else:
                factor = self._drawn(1.0, parts.scatter.stages)
                end = start + parts.stages[stage] * factor
                self._add(stage, "target", start, end, cycle - stage, cycle)
                if stage == parts.num_stages - 1 and not parts.drafters_head:
                    self._add(stage, "head", end, end + parts.head_s * factor, cycle - stage, cycle)
                    end = end + parts.head_s * factor
                self._finished[stage] = end
            self._free[device] = end
        return drafted

    def _end_cycle(self, cycle: int, oldest: int, drafted: Times) -> None:
        parts, lane = self.parts, self.parts.num_stages + 1
        done = self._finished[oldest] + self._message()
        self._add(lane, "host", self._finished[oldest], done, cycle - oldest, cycle)
        done = np.maximum(done, drafted)
        if parts.drafts_in_first_stage:
            start = np.maximum(drafted + self._message(), self._free[parts.devices[0]])
            self._ahead = start + self._drawn(parts.stages[0], parts.scatter.stages)
            self._free[parts.devices[0]] = self._ahead
            self._add(0, "target", start, self._ahead, cycle + 1, cycle + 1)
            done = np.maximum(done, self._ahead + self._message())
        if cycle >= parts.num_stages - 1:
            verdict = done + parts.verify_s
            if parts.drafters_head:
                verdict = self._run_split_head(done, cycle, oldest) + parts.verify_s
            self._add(lane, "verify", done, verdict, cycle - oldest, cycle)
            done = verdict
        self._ends.append(done)
        self._controller = self._begin = done + parts.host_s
        self._add(lane, "host", done, self._controller, cycle - oldest, cycle)
        waits = parts.in_step or parts.late or parts.num_stages == 1
        self._sent = self._controller if waits else drafted
        self._arrival = self._sent + self._message()

    def _run_split_head(self, done: Times, cycle: int, oldest: int) -> Times:
        """When the drafter's part of the head and that of the last stage, which begins before, are both done."""
        parts, lane, began = self.parts, oldest, self._finished[oldest]
        stage_end = began + self._drawn(parts.last_head_s, parts.scatter.stages)
        own_end = done + self._drawn(parts.head_s - parts.last_head_s, parts.scatter.drafts)
        self._add(lane, "head", began, stage_end, cycle - oldest, cycle)
        self._free[parts.devices[lane]] = np.maximum(self._free[parts.devices[lane]], stage_end)
        self._free[parts.devices[-1]] = np.maximum(self._free[parts.devices[-1]], own_end)
        both = [own_end, stage_end + self._message()] if parts.last_head_s else [own_end]
        found: Times = np.max(both, axis=0)
        return found

    def _add(self, lane: int, kind: SpanKind, start: Times, end: Times, node: int, cycle: int) -> None:
        if (end > start).any():
            self._pieces.append(_Piece(lane, kind, start, end, node, cycle))


def stretches(verdicts: Sequence[int]) -> list[tuple[int, int, bool]]:
    """The verdicts between flushes, each as `recorded.verdicts` gives it: how many there are, the cycles from the first
    to the last of them, and whether that one is a rejection."""
    found, count, cycles, last = [], 0, 0, 0
    for verdict in verdicts:
        count += 1
        cycles, last = cycles + verdict, verdict
        if not verdict:
            found.append((count, cycles, True))
            count = cycles = 0
    return [*found, (count, cycles - last, False)] if count else found


def request_seconds(stretch: Stretch, verdicts: Sequence[int]) -> float:
    """Decode time of a request whose tokens after the first got these `verdicts`."""
    parts = stretch.parts
    flush_s = parts.host_s + parts.abort_s
    times = [stretch.verdict(cycles) + (flush_s if rejects else 0.0) for _, cycles, rejects in stretches(verdicts)]
    return parts.start_s + sum(times)


def lane_shares(stretch: Stretch, requests: Sequence[Sequence[int]]) -> LaneTime:
    """What the stages do in the decode time of the `requests`, by metrics.md's definition of the bubble, from the spans
    of the simulated cycles; of the first `MAX_SHOWN_CYCLES` of them."""
    parts = stretch.parts
    spans: list[Span] = []
    ends, offset, position, replica = [0], 0.0, 0, 0
    for verdicts in requests:
        for count, cycles, rejects in stretches(verdicts):
            last = parts.num_stages - 1 + cycles
            cut, number = stretch.end_in(replica, last), len(ends) - 1
            abort_s, flush_s = (parts.abort_s, parts.host_s + parts.abort_s) if rejects else (0.0, 0.0)
            for piece in stretch.pieces(last):
                begin, works = piece.start[replica], piece.kind in ("target", "head")
                limit = cut + abort_s if works and begin < cut else cut  # a stage still works on a dropped token
                start, end = _ns(offset + begin), _ns(offset + min(piece.end[replica], limit))
                if end > start:
                    kept = piece.node < count or piece.lane >= parts.num_stages
                    spans.append(
                        Span(piece.lane, piece.kind, start, end, position + piece.node, kept, number + piece.cycle)
                    )
            ends += [_ns(offset + stretch.end_in(replica, cycle)) for cycle in range(last + 1)]
            controller, flushed = parts.num_stages + 1, offset + cut + flush_s
            spans.append(Span(controller, "host", ends[-1], _ns(flushed), position + count, True, number + last))
            offset = flushed
            position += count
            replica = (replica + 1) % stretch.num_replicas
        if len(ends) > MAX_SHOWN_CYCLES:
            break
    return lane_time(read_spans(spans, parts.num_stages), ends)


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
