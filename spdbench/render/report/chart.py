"""What a chart is: panels of Vega-Lite, the rows that they show, words for readers who cannot see it; and as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Generic, TypeVar

from spdbench.judge.comparison.compare import Row, Table
from spdbench.render.columns import harmless
from spdbench.render.export import csv_text
from spdbench.render.report.style import SERIES_SHAPES, Palette

Record = dict[str, Any]
Spec = dict[str, Any]
AXIS_LETTERS, LEGEND_LETTERS = "26", "22"
"""Of a name. The widest take a little more than the room for it, and lose their end."""
NUM_TICKS = 6
"""Of an axis of numbers, about."""
Shown = TypeVar("Shown")
"""What a chart shows: a comparison, or a history."""


@dataclass(frozen=True)
class Panel:
    """One picture: `spec` without width, whose data are `rows`; several of them are told apart by `heading`."""

    spec: Spec
    rows: list[Record]
    heading: str | None = None


@dataclass(frozen=True)
class Chart(Generic[Shown]):
    """`make` gives the panels, none where there is nothing to show: `missing` says why. `read` says how to read it,
    `describe` what it shows, from its rows."""

    name: str
    title: str
    read: str
    missing: str
    make: Callable[[Shown, Palette], list[Panel]]
    describe: Callable[[Sequence[Record]], str]


def overall(table: Table) -> list[Row]:
    """The rows over all prompts, the baseline first."""
    return sorted((row for row in table.rows if row.category is None), key=lambda row: not row.is_baseline)


def series(table: Table, palette: Palette, records: Sequence[Record]) -> dict[str, Any]:
    """`color` and `shape` of the labels in `records`, for each label the same in all charts."""
    colours: dict[str, str] = {}
    for row in overall(table):
        place = len(colours) - (table.baseline is not None)
        colours[harmless(row.label)] = (
            palette.baseline if row.is_baseline else palette.series[place % len(palette.series)]
        )
    shapes = dict(zip(colours, cycle(SERIES_SHAPES), strict=False))
    labels = list(dict.fromkeys(record["label"] for record in records))
    return {
        name: {
            "field": "label",
            "type": "nominal",
            "scale": {"domain": labels, "range": [found[label] for label in labels]},
            "legend": {"labelExpr": shortened(LEGEND_LETTERS)},
        }
        for name, found in (("color", colours), ("shape", shapes))
    }


def shortened(letters: str) -> str:
    """Vega's expression for a name of an axis or a legend: what is longer than `letters` loses its middle, as names
    that begin alike often end differently. `letters` is a number or an expression."""
    kept = f"floor(({letters} - 1) / 2)"
    middle = f"slice(datum.label, 0, {kept}) + '\N{HORIZONTAL ELLIPSIS}' + slice(datum.label, -{kept})"
    return f"length(datum.label) > {letters} ? {middle} : datum.label"


def quantity(field: str, title: str, **more: Any) -> Spec:
    """An axis of numbers."""
    axis = {"tickCount": NUM_TICKS, **more.pop("axis", {})}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, **more}


def names(field: str, records: Sequence[Record], **axis: Any) -> Spec:
    """An axis of names, in the order of `records`."""
    plain = {"domain": False, "ticks": False, "labelPadding": 6, "labelExpr": shortened(AXIS_LETTERS)}
    scale = {"domain": list(dict.fromkeys(record[field] for record in records))}
    return {"field": field, "type": "nominal", "scale": scale, "title": None, "axis": plain | axis}


def height(records: Sequence[Record], field: str, step: int) -> int:
    """Room for `step` pixels a name. (Vega-Lite's own steps make it warn about widths that fit the page.)"""
    return step * len({record[field] for record in records})


def spec(rows: Sequence[Record], *layers: Spec, **more: Any) -> Spec:
    """A view of `rows` in `layers`; of one layer where there is one."""
    content = {"layer": list(layers)} if len(layers) > 1 else layers[0]
    return {"data": {"values": list(rows)}, **content, **more}


def to_csv(panels: Sequence[Panel]) -> str:
    """The rows of all panels, with one header."""
    return csv_text([row for panel in panels for row in panel.rows])


def listing(parts: Sequence[str], most: int = 12) -> str:
    """`parts` as an enumeration, the first of them where there are many."""
    rest = f" and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + rest
