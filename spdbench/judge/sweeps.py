"""The points of a sweep side by side: what differs between them, which of them no other beats, and where a method
begins or stops to pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spdbench.judge.comparison.compare import Row
from spdbench.judge.projection.opponents import undominated


@dataclass(frozen=True)
class SweepRow:
    """A label of a point, compared with the point's own baseline. `settings` are what the point has of its own."""

    settings: Mapping[str, Any]
    row: Row

    @property
    def speedup(self) -> float | None:
        found: float | None = self.row.metrics["speedup"]
        return found

    def text(self, axis: str) -> str:
        """Its value on an axis."""
        value = self.settings.get(axis)
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    def number(self, axis: str) -> float | None:
        """Its value on an axis as a number: 3, or 0.6 for `oracle:0.6`."""
        try:
            return float(self.text(axis).rpartition(":")[2])
        except ValueError:
            return None


@dataclass(frozen=True)
class BreakEven:
    """Where a method's speed-up crosses 1 on an axis. `crossings` are all of them by rising value, on the lines between
    measured points; from each on the method pays or ceases to. `pays_first` says what it does at the lowest value,
    `measured` are the lowest and the highest one. `series` is the method with its other settings."""

    series: str
    axis: str
    crossings: tuple[float, ...]
    pays_first: bool
    measured: tuple[float, float]

    @property
    def words(self) -> str:
        axis, low_high = name_of(self.axis), " to ".join(f"{each:.3g}" for each in dict.fromkeys(self.measured))
        if not self.crossings:
            return f"{self.series}: {'always' if self.pays_first else 'never'} pays at {axis} {low_high}"
        bounds = [f"{each:.3g}" for each in self.crossings]
        spans = [f"up to {axis} {bounds.pop(0)}"] if self.pays_first else []
        while bounds:
            begin, end = bounds.pop(0), bounds.pop(0) if bounds else None
            spans.append(f"from {axis} {begin}" + (f" to {end}" if end else ""))
        return f"{self.series}: pays {' and '.join(spans)} (measured: {low_high})"


def name_of(axis: str) -> str:
    """An axis for people: `spd.stages` of `options.spd.stages`."""
    return axis.removeprefix("options.")


def axes_of(rows: Sequence[SweepRow]) -> list[str]:
    """The settings that differ between the rows, that with the most values first."""
    names = dict.fromkeys(name for row in rows for name in row.settings)
    counts = {name: len({row.text(name) for row in rows}) for name in names}
    return sorted((name for name in names if counts[name] > 1), key=lambda name: -counts[name])


def numeric_axis(rows: Sequence[SweepRow]) -> str | None:
    """The axis of numbers with the most values, if there is one."""
    return next((axis for axis in axes_of(rows) if all(row.number(axis) is not None for row in rows)), None)


def series_of(row: SweepRow, rows: Sequence[SweepRow], axis: str) -> str:
    """What a row is apart from its value on `axis`."""
    others = [f"{name_of(name)}={row.text(name)}" for name in axes_of(rows) if name != axis]
    kinds = {each.text(axis).rpartition(":")[0] for each in rows}  # `oracle` of `oracle:0.6`
    kind = [row.text(axis).rpartition(":")[0]] if len(kinds) > 1 else []
    return ", ".join([row.row.label, *kind, *others])


def best_of(rows: Sequence[SweepRow]) -> SweepRow | None:
    """The row with the highest speed-up; a disqualified one only if all are."""
    known = [row for row in rows if row.speedup is not None]
    fair = [row for row in known if not row.row.disqualified]
    return max(fair or known, key=lambda row: row.speedup or 0.0, default=None)


def frontier_of(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Those that no other beats in both time a token and device time a token, the fastest first."""
    known = [row for row in rows if None not in costs_of(row)]
    best = undominated([costs_of(row) for row in known])  # type: ignore[misc]
    found = [row for row, kept in zip(known, best, strict=True) if kept]
    return sorted(found, key=lambda row: costs_of(row)[0] or 0.0)


def costs_of(row: SweepRow) -> tuple[float | None, float | None]:
    """Seconds between two tokens, and of device time a token."""
    return row.row.metrics["tpot_s"], row.row.metrics["device_s_per_token"]


def break_evens(rows: Sequence[SweepRow], axis: str) -> list[BreakEven]:
    """For each method with its other settings where its speed-up crosses 1, on the lines between points. A speed-up of
    exactly 1 does not pay."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at = row.number(axis)
        if at is not None and row.speedup is not None:
            curves.setdefault(series_of(row, rows, axis), []).append((at, row.speedup))
    return [_break_even(series, axis, sorted(curve)) for series, curve in curves.items()]


def _break_even(series: str, axis: str, curve: Sequence[tuple[float, float]]) -> BreakEven:
    crossings = tuple(
        left + (right - left) * (1 - low) / (high - low)
        for (left, low), (right, high) in pairwise(curve)
        if (low > 1) != (high > 1)
    )
    return BreakEven(series, axis, crossings, curve[0][1] > 1, (curve[0][0], curve[-1][0]))
