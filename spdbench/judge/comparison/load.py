"""Comparisons of the same work under different loads: up to how many requests at once does a label pay?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.pairing import concurrency, machine, work_at_any_load
from spdbench.judge.conclusion import Conclusion, SpeedupOutcome, conclusions, outcome_of
from spdbench.judge.metrics.stats import Interval


@dataclass(frozen=True)
class Load:
    """Tables of the same work and machine by number of requests at once, ascending."""

    tables: tuple[Table, ...]

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(concurrency(table.head) for table in self.tables)

    @property
    def table(self) -> Table:
        """All levels in one table, a row for each label at each level."""
        rows = tuple(row for table in self.tables for row in table.rows if row.category is None)
        return replace(self.tables[0], rows=rows, notes=())


@dataclass(frozen=True)
class Level:
    """What was measured of a label at one number of requests at once. Acceptance lengths have intervals where they are
    known; `needed` is the one at which it would be as fast as the baseline."""

    at_once: int
    outcome: SpeedupOutcome
    speedup: float | None
    interval: Interval | None
    acceptance: float | None
    acceptance_interval: Interval | None
    needed: float | None
    needed_interval: Interval | None


@dataclass(frozen=True)
class LoadConclusion:
    """What the levels say of one label: `pays_up_to` is the largest at which, as at all below it, the interval of its
    speed-up lies above 1, None if there is none. `break_even` is the number of requests at once at which the speed-up
    would be 1, between two measured levels; its interval comes from those of the speed-up. None stands for a number
    outside of the levels. `disqualified_by` is what disqualifies it at any level, where it pays at none; `doubts` are
    those of the levels at which it pays."""

    label: str
    levels: tuple[Level, ...]
    pays_up_to: int | None
    break_even: float | None
    break_even_interval: tuple[float | None, float | None]
    disqualified_by: tuple[str, ...]
    doubts: tuple[str, ...]


def loads(tables: Sequence[Table]) -> list[Load]:
    """`tables` of the same work together, in order; most stand alone."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        groups.setdefault(work_at_any_load(table.head) + machine(table.head), []).append(table)
    return [Load(tuple(sorted(group, key=lambda table: concurrency(table.head)))) for group in groups.values()]


def conclude(load: Load) -> list[LoadConclusion]:
    """A conclusion for each label that is compared with a baseline."""
    rows: dict[str, list[tuple[Row, Table]]] = {}
    for table in load.tables:
        for row in table.rows:
            if row.category is None and not row.is_baseline and table.baseline is not None:
                rows.setdefault(row.label, []).append((row, table))
    of_levels = [{each.label: each for each in conclusions(table)} for table in load.tables]
    return [
        _conclude([_level(row, table) for row, table in found], [each[label] for each in of_levels if label in each])
        for label, found in rows.items()
    ]


def _level(row: Row, table: Table) -> Level:
    metrics = row.metrics
    intervals = {
        name: None if (found := metrics[f"{name}_ci"]) is None else (found[0], found[1])
        for name in ("speedup", "acceptance_length", "break_even_length")
    }
    return Level(
        at_once=concurrency(table.head),
        outcome=outcome_of(row),
        speedup=metrics["speedup"],
        interval=intervals["speedup"],
        acceptance=metrics["acceptance_length"],
        acceptance_interval=intervals["acceptance_length"],
        needed=metrics["break_even_length"],
        needed_interval=intervals["break_even_length"],
    )


def _conclude(levels: Sequence[Level], of_levels: Sequence[Conclusion]) -> LoadConclusion:
    disqualified_by = tuple(dict.fromkeys(name for each in of_levels for name in each.disqualified_by))
    paying = [level.at_once for level in levels]
    for place, level in enumerate(levels):
        if level.outcome != "pays" or disqualified_by:
            paying = paying[:place]
            break
    known = [level for level in levels if level.speedup is not None]
    with_interval = [level for level in known if level.interval is not None]
    low, high = (
        break_even(
            [level.at_once for level in with_interval], [(level.interval or (1.0, 1.0))[end] for level in with_interval]
        )
        for end in (0, 1)
    )
    estimate = break_even([level.at_once for level in known], [level.speedup or 1.0 for level in known])
    return LoadConclusion(
        label=of_levels[0].label,
        levels=tuple(levels),
        pays_up_to=paying[-1] if paying else None,
        break_even=estimate,
        break_even_interval=(low, high),
        disqualified_by=disqualified_by,
        doubts=tuple(dict.fromkeys(name for each in of_levels[: len(paying)] for name in each.doubts)),
    )


def break_even(levels: Sequence[int], speedups: Sequence[float]) -> float | None:
    """The number of requests at once at which speed-ups first fall to 1: on a line between the logarithms of two
    neighbouring levels. None where they do not fall to it within `levels`, or begin below it."""
    for place in range(1, len(levels)):
        before, after = log(speedups[place - 1]), log(speedups[place])
        if before > 0 >= after:
            first, last = log(levels[place - 1]), log(levels[place])
            return exp(first + (last - first) * before / (before - after))
    return None
