"""A comparison for people: a terminal table that fits its width, GitHub Markdown, LaTeX; and the door to CSV and JSON.

Its words are in `columns.py` and `notes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal, get_args

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from spdbench.judge.comparison.compare import Row, Table
from spdbench.render.columns import (
    Column,
    bullet,
    by_category,
    capture,
    columns_for,
    markdown,
    pipe_escape,
    plain_grid,
    tabulated,
    titles,
)
from spdbench.render.export import to_csv, to_json
from spdbench.render.notes import notes

Format = Literal["table", "github", "latex", "csv", "json"]
FORMATS: tuple[str, ...] = get_args(Format)


def render(tables: Sequence[Table], form: Format, console: Console) -> str:
    """`tables` as text. Only the format `table` looks at `console`: its width, its colours, its encoding."""
    if form == "table":
        return _to_terminal(tables, console)
    writers: dict[str, Callable[[Sequence[Table]], str]] = {
        "github": _to_github,
        "latex": _to_latex,
        "csv": to_csv,
        "json": to_json,
    }
    return writers[form](tables)


def _to_terminal(tables: Sequence[Table], console: Console) -> str:
    parts: list[RenderableType] = []
    for number, (table, heading) in enumerate(zip(tables, titles(tables), strict=True)):
        parts += [*([""] if number else []), Text(heading, style="bold"), *_table_and_notes(table, console)]
    return capture(console, *parts)


def _table_and_notes(table: Table, console: Console) -> Iterator[RenderableType]:
    """The table in the roomiest layout that fits, then its notes."""
    columns, left_out = columns_for(table), list[str]()
    for folded, gap in ((False, 2), (True, 2), (True, 1)):
        grid = _grid(table, columns, folded=folded, gap=gap)
        if _width(grid, console) <= console.width:
            break
    while _width(grid, console) > console.width and any(column.leave_out for column in columns):
        last = max(columns, key=lambda column: column.leave_out)
        columns = [column for column in columns if column is not last]
        left_out.append(_fold(last.header, folded=False))
        grid = _grid(table, columns, folded=True, gap=1)
    if _width(grid, console) > console.width:
        for column in grid.columns:
            column.width = None  # cells have to wrap
    yield grid
    if left_out:
        yield bullet(f"left out at this width: {', '.join(left_out)} (--format csv has everything).")
    yield from map(bullet, notes(table))


def _width(grid: RichTable, console: Console) -> int:
    """Columns of text that `grid` takes if nothing has to wrap."""
    return console.measure(grid, options=console.options.update(width=10_000)).maximum


def _grid(table: Table, columns: Sequence[Column], *, folded: bool, gap: int) -> RichTable:
    """The table with columns as wide as their widest cell, which saves measuring every cell several times."""
    with_categories = by_category(table)
    grid = plain_grid(padding=(0, gap - 1, 0, 0))
    cells = [[_fold(column.cell(row), folded=folded) for row in table.rows] for column in columns]
    if with_categories:
        cells[0] += [row.category or "all" for row in table.rows]
    for column, texts in zip(columns, cells, strict=True):
        header = _fold(column.header, folded=folded)
        width = max(cell_len(line) for text in (header, *texts) for line in text.split("\n"))
        grid.add_column(header, justify="right" if column.numeric else "left", overflow="fold", width=width)
    numbered = enumerate(table.rows)
    for category, rows in groupby(numbered, key=lambda pair: pair[1].category):
        if with_categories:
            grid.add_row(Text(category or "all", style="italic"))
        for number, row in rows:
            grid.add_row(*(Text(texts[number], style=_style(row)) for texts in cells))
        grid.add_section()
    return grid


def _fold(text: str, *, folded: bool) -> str:
    return text if folded else text.replace("\n", " ").replace("/ ", "/")


def _style(row: Row) -> str:
    return "bold green" if row.best else "dim" if row.disqualified else ""


def _tabulate(table: Table, form: str, escape: Callable[[str], str] = str) -> str:
    """The table with each cell on one line."""
    columns = columns_for(table)
    category = ["category"] * by_category(table)
    rows = [
        [escape(_fold(text, folded=False)) for text in ([row.category or "all"] * len(category) + cells)]
        for row, cells in ((row, [column.cell(row) for column in columns]) for row in table.rows)
    ]
    headers = [*category, *(escape(_fold(column.header, folded=False)) for column in columns)]
    return tabulated(headers, rows, [False] * len(category) + [column.numeric for column in columns], form)


def _to_github(tables: Sequence[Table]) -> str:
    headed = zip(tables, titles(tables), strict=True)
    return "\n".join(markdown(title, _tabulate(table, "pipe", pipe_escape), notes(table)) for table, title in headed)


def _to_latex(tables: Sequence[Table]) -> str:
    """A booktabs tabular each; title and notes as comments, since where they go is the paper's choice."""
    parts = []
    for table, heading in zip(tables, titles(tables), strict=True):
        grid = _tabulate(table, "latex_booktabs")
        parts.append("\n".join([f"% {heading}", grid, *(f"% {line}" for line in notes(table)), ""]))
    return "\n".join(parts)
