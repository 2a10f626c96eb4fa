"""A comparison of several suites in one table: a row a label, a column a suite, and the mean over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table as RichTable
from rich.text import Text

from spdbench.judge.comparison.summary import LabelSummary, Summary
from spdbench.judge.metrics.stats import Interval
from spdbench.render.columns import (
    EMPTY,
    harmless,
    machine,
    markdown,
    markdown_cell,
    model_as_asked,
    plain_grid,
    tabulated,
)

MEAN_NOTE = (
    "mean: geometric, every suite counts alike, with its 95 % interval; average: arithmetic, what papers give as the "
    "average over tasks. Both take a speed-up in every suite."
)


def heading(summary: Summary) -> str:
    head = summary.tables[0].head
    return harmless(f"over {len(summary.suites)} suites | {model_as_asked(head)} | {machine(head)}")


def to_rich(summary: Summary) -> RichTable:
    """For a terminal; speed-ups whose interval holds 1.0 are dim."""
    grid = plain_grid((name, name != "label") for name in headers(summary))
    for found in summary.labels:
        styles = ["", *("dim" if _holds_one(each.interval) else "" for each in found.suites), *_mean_styles(found)]
        grid.add_row(*(Text(text, style=style) for text, style in zip(cells(found), styles, strict=True)))
    return grid


def to_github(summary: Summary) -> str:
    return markdown(heading(summary), _tabulated(summary, "pipe", markdown_cell), notes(summary))


def to_latex(summary: Summary) -> str:
    lines = [f"% {heading(summary)}", _tabulated(summary, "latex_booktabs"), *(f"% {line}" for line in notes(summary))]
    return "\n".join([*lines, ""])


def notes(summary: Summary) -> list[str]:
    """The lines below the table."""
    out = [
        f"{found.label}: disqualified in {', '.join(found.disqualified)}."
        for found in summary.labels
        if found.disqualified
    ]
    return [MEAN_NOTE, *map(harmless, out)]


def _tabulated(summary: Summary, form: str, escape: Callable[[str], str] = str) -> str:
    rows = [[escape(text) for text in cells(found)] for found in summary.labels]
    names = headers(summary)
    return tabulated([*map(escape, names)], rows, [name != "label" for name in names], form)


def headers(summary: Summary) -> list[str]:
    """The names of the columns of `cells`."""
    return ["label", *map(harmless, summary.suites), "mean [95 %]", "average"]


def cells(found: LabelSummary) -> list[str]:
    """A label's line: its speed-up in each suite, and the means."""
    values = ["baseline" if found.is_baseline else _number(each.speedup) for each in found.suites]
    return [harmless(found.label), *values, _with_interval(found.mean, found.interval), _number(found.arithmetic_mean)]


def _number(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.2f}"


def _with_interval(value: float | None, interval: Interval | None) -> str:
    return _number(value) if interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _holds_one(interval: Interval | None) -> bool:
    return interval is not None and interval[0] <= 1 <= interval[1]


def _mean_styles(found: LabelSummary) -> Sequence[str]:
    if found.interval is None or found.disqualified or _holds_one(found.interval):
        return ("dim", "")
    return ("bold green" if found.interval[0] > 1 else "red", "")
