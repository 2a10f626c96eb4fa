"""Many results of one workload, in order of time: each run judged against those before it, as a gate judges.

A result is judged by `check.py` against its label's baseline on the same machine: the first `MAX_BASELINES` results of
a level. A level begins with the first result on a machine, and again with each regression or improvement, as one renews
a gate's baseline; so a lasting change is found once, where it came. The baseline of a level does not move along with
later results, so that a slow drift adds up until it is found. Results that are inconclusive, not comparable, incomplete
or have failed runs are never part of a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from spdbench.errors import InputError
from spdbench.judge.comparison.pairing import differences, machine, pair, workload
from spdbench.judge.gate.calibration import Calibration
from spdbench.judge.gate.check import GATES, Limits, judge
from spdbench.judge.gate.counterpart import complete, reference
from spdbench.judge.gate.timing import SPEED, SPEEDUP
from spdbench.judge.gate.verdict import GateVerdict, Judgement
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.stats import Interval
from spdbench.judge.results.schema import Result

MAX_BASELINES = 5
"""More of them narrow the band little: of 5 it is 0.77 times as wide as of one, of infinitely many 0.71 times."""


class Band(NamedTuple):
    """Where a metric is neither a regression nor an improvement: `baseline` times 1 - s, and divided by 1 - s."""

    baseline: float
    floor: float
    ceiling: float
    is_calibrated: bool


@dataclass(frozen=True, eq=False)
class Point:
    """One label in one run. `speedup` is over the plain decoding of the same run, with its 95 % `interval`; None
    without it. A band is None where nothing was judged by that metric."""

    result: LoadedResult
    speedup: float | None
    interval: Interval | None
    judgement: Judgement
    speedup_band: Band | None
    speed_band: Band | None

    @property
    def label(self) -> str:
        return self.result.label

    @property
    def verdict(self) -> GateVerdict | Literal["first"]:
        """`first` where there is nothing before it to judge it by, and nothing wrong with itself."""
        verdict = self.judgement.verdict
        return "first" if self.judgement.against is None and verdict == "pass" else verdict


@dataclass(frozen=True, eq=False)
class HistoryRun:
    """Results that took turns in one run. `commit` is that of spdbench's checkout, if the results carry one;
    `is_new_machine` if the run before it was made on another machine or software."""

    started: datetime
    commit: str | None
    head: Result
    points: tuple[Point, ...]
    is_new_machine: bool


@dataclass(frozen=True, eq=False)
class History:
    """Runs in order of time. `labels` are in the order in which they first appear."""

    runs: tuple[HistoryRun, ...]
    labels: tuple[str, ...]

    @property
    def head(self) -> Result:
        """The newest run's."""
        return self.runs[-1].head

    def of(self, label: str) -> list[tuple[HistoryRun, Point]]:
        return [(run, point) for run in self.runs for point in run.points if point.label == label]


def history(results: Sequence[LoadedResult], calibration: Calibration | None) -> History:
    """`results` in order of time, each judged against those before it.

    Raises:
        InputError: they are of different work, or one of them says no time at which it was made.
    """
    first = results[0]
    for each in results:
        if workload(each.head) != workload(first.head):
            why = "; ".join(differences(first.head, each.head))
            raise InputError(
                f"{first.file} and {each.file} did different work, which no history can join: {why}. Make a history of "
                "each."
            )
    groups: dict[tuple[datetime, str], list[LoadedResult]] = {}
    for each in results:
        groups.setdefault((_started(each), repr(each.head.environment)), []).append(each)
    levels: dict[tuple[object, ...], list[tuple[LoadedResult, LoadedResult | None]]] = {}
    limits = Limits(calibration=calibration)
    runs: list[HistoryRun] = []
    for (started, _), members in sorted(groups.items()):
        head = members[0].head
        is_new = bool(runs) and machine(runs[-1].head) != machine(head)
        points = tuple(_point(each, members, levels.setdefault(_setting(each), []), limits) for each in members)
        runs.append(HistoryRun(started, head.spdbench.get("git"), head, points, is_new))
    return History(tuple(runs), tuple(dict.fromkeys(point.label for run in runs for point in run.points)))


def _started(result: LoadedResult) -> datetime:
    created = result.head.created
    try:
        found = datetime.fromisoformat(created)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InputError(
            f"{result.file}: created: '{created[:60]}' is no time as ISO 8601 writes it, and a history is in order of "
            "time; leave the file out"
        ) from None


def _setting(result: LoadedResult) -> tuple[object, ...]:
    """Equal for results whose speeds compare: one label, machine, devices, and number of answers asked for."""
    head = result.head
    repeats = len({repeat for _, _, repeat in result.runs.keys})
    backend = head.backend
    return result.label, backend.kind, machine(head), tuple(backend.devices), head.suite.num_prompts, repeats


def _point(
    result: LoadedResult,
    members: Sequence[LoadedResult],
    level: list[tuple[LoadedResult, LoadedResult | None]],
    limits: Limits,
) -> Point:
    """`result`, one of a run's `members`, judged against `level`, which it joins or begins anew."""
    plain = reference(result, members)
    if level:
        baselines = [each for pair_ in level for each in pair_ if each is not None]
        judgement = judge(result, [result], members, baselines, GATES["all"], limits)
    else:
        alone = tuple(complete(pair(result, result), "exact"))
        judgement = Judgement(result.label, result.file, None, result.head, alone)
    if all(finding.verdict == "pass" for finding in complete(pair(result, result), "exact")):
        if judgement.verdict in ("regression", "improved"):
            level.clear()
        if not level or (judgement.verdict == "pass" and len(level) < MAX_BASELINES):
            level.append((result, None if plain is result else plain))
    speedup, interval = (None, None) if plain is None or plain is result else pair(plain, result).speedup()
    bands = (_band(judgement, metric, limits, result) for metric in (SPEEDUP, SPEED))
    return Point(result, speedup, interval, judgement, *bands)


def _band(judgement: Judgement, metric: str, limits: Limits, result: LoadedResult) -> Band | None:
    for each in judgement.findings:
        if each.metric == metric and each.before is not None and each.allowed is not None:
            kept = 1 - each.allowed
            is_calibrated = limits.calibrated(result, metric) is not None
            return Band(each.before, each.before * kept, each.before / kept, is_calibrated)
    return None
