"""A comparison for people: a terminal table that fits its width, GitHub Markdown, LaTeX; and the door to CSV and JSON.

What it concludes comes first, then the table, then what to do about its flags. The words are in `columns.py` and
`notes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby
from textwrap import fill
from typing import Literal, NamedTuple, get_args

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.load import Load, conclude, loads
from spdbench.judge.comparison.summary import summaries
from spdbench.judge.conclusion import SpeedupOutcome, conclusions
from spdbench.render import summary as over_suites
from spdbench.render.columns import (
    LABEL,
    SPEEDUP,
    Column,
    bullet,
    by_category,
    capture,
    category_of,
    columns_for,
    markdown,
    markdown_cell,
    markdown_line,
    plain_grid,
    tabulated,
    title,
    titles,
)
from spdbench.render.export import to_csv, to_json
from spdbench.render.load import columns_of, load_notes, sentences
from spdbench.render.notes import details as notes_on_details
from spdbench.render.notes import notes, sentence, verdicts

Format = Literal["table", "github", "latex", "csv", "json"]
FORMATS: tuple[str, ...] = get_args(Format)
MORE = "`spdbench compare --details` adds {}."
MIN_LABEL_WIDTH = 12
NARROWEST = 20
"""A terminal may say that it has no columns (`COLUMNS=0`)."""
STYLES: dict[SpeedupOutcome, str] = {"pays": "bold green", "slower": "red"}


def render(tables: Sequence[Table], form: Format, console: Console, *, details: bool = False) -> str:
    """`tables` as text. Only the format `table` looks at `console`: its width, its colours, its encoding.

    With `details`, columns for which there is no room follow in tables of their own, and all columns are explained.
    """
    writers: dict[str, Callable[[], str]] = {
        "table": lambda: _to_terminal(tables, console, details=details),
        "github": lambda: _to_github(tables, details=details),
        "latex": lambda: _to_latex(tables, details=details),
        "csv": lambda: to_csv(tables),
        "json": lambda: to_json(tables),
    }
    return writers[form]()


def _to_terminal(tables: Sequence[Table], console: Console, *, details: bool) -> str:
    parts: list[RenderableType] = []
    families = loads(tables)
    whole = not details and not any(by_category(table) or table.dialects for table in tables)
    summary = [*chain.from_iterable(_summary_to_terminal(tables))]
    if whole and len(families) < len(tables):
        shown = chain.from_iterable(_load_to_terminal(family, console) for family in families)
        return capture(console, *shown, *summary)
    headings = titles(tables)
    for table, heading in zip(tables, headings, strict=True):
        parts += [Text(heading, style="bold")] * (len(tables) > 1)
        parts += [_indented(sentence(each), console, STYLES.get(each.outcome, "")) for each in conclusions(table)]
    for table, heading in zip(tables, headings, strict=True):
        parts += ["", Text(heading, style="bold"), *_table_and_notes(table, console, details=details)]
    return capture(console, *parts, *summary)


def _summary_to_terminal(tables: Sequence[Table]) -> Iterator[Sequence[RenderableType]]:
    """What several suites say together."""
    for each in summaries(tables):
        heading = Text(over_suites.heading(each), style="bold")
        yield "", heading, over_suites.to_rich(each), *map(bullet, over_suites.notes(each))


def _load_to_terminal(load: Load, console: Console) -> Iterator[RenderableType]:
    """Several loads in one table; a single one as ever."""
    if len(load.tables) == 1:
        yield _to_terminal(load.tables, console, details=False)
        return
    for found in conclude(load):
        first, *others = sentences(found)
        style = STYLES["pays"] if found.pays_up_to else ""
        yield from (_indented(first, console, style), *(_indented(line, console, "") for line in others))
    yield from (
        "",
        Text(title(load.table), style="bold"),
        _grid(load.table, _fit(load.table, [*columns_of(load)], console.width)),
    )
    yield from map(bullet, [*load_notes(load), MORE.format("a table for each load")])


def _indented(line: str, console: Console, style: str) -> Text:
    """`line`, with what does not fit its first line indented below."""
    return Text(fill(line, max(console.width, NARROWEST), subsequent_indent="  ", break_on_hyphens=False), style=style)


def _table_and_notes(table: Table, console: Console, *, details: bool) -> Iterator[RenderableType]:
    """The table with the columns that fit, then its notes; with `details` the other columns and what they mean."""
    columns = columns_for(table)
    fit = _fit(table, columns, console.width)
    yield _grid(table, fit)
    if meanings := [f"{column.name}: {column.meaning}" for column in fit.columns if column.meaning]:
        yield bullet(f"{'; '.join(meanings)}.")
    yield from map(bullet, notes(table))
    more = [column for column in columns_for(table, details=True) if column not in fit.columns]
    if not details:
        shown = {column.name for column in fit.columns}
        names = [column.name for column in more if column.name not in shown]
        yield bullet(MORE.format(", ".join([*names, "explanations of columns and flags"])))
        return
    while more:
        ranked = [replace(column, leave_out=place) for place, column in enumerate(more)]
        fit = _fit(table, [LABEL, *ranked], console.width)
        more = more[len(fit.columns) - 1 :]
        yield from ("", _grid(table, fit))
    yield from map(bullet, notes_on_details(table))


class _Fit(NamedTuple):
    """The columns of a table with their cells, and how they are laid out: `folded` headers, `gap` spaces between.
    Cells wrap where they are not `whole`."""

    columns: list[Column]
    cells: list[list[str]]
    folded: bool
    gap: int
    whole: bool = True

    def widths(self, table: Table) -> list[int]:
        """How wide each column has to be."""
        texts = [
            [*(column.header if self.folded else column.name).split("\n"), *cells]
            for column, cells in zip(self.columns, self.cells, strict=True)
        ]
        texts[0] += map(category_of, table.rows) if by_category(table) else []
        return [max(map(cell_len, column)) for column in texts]

    def too_wide(self, table: Table, room: int) -> int:
        """By how much the table is wider than `room`; 0 if it fits."""
        return max(0, sum(self.widths(table)) + self.gap * (len(self.columns) - 1) - room)


def _fit(table: Table, columns: Sequence[Column], room: int) -> _Fit:
    """The roomiest layout that fits with the most columns.

    Cells are one line each. Labels are shortened only where nothing is left to leave out, and cells wrap only where
    the terminal is narrower than that.
    """
    kept, cells = list(columns), [column.cells(table) for column in columns]
    while True:
        for folded, gap in ((False, 2), (True, 2), (True, 1)):
            fit = _Fit(kept, cells, folded, gap)
            if not fit.too_wide(table, room):
                return fit
        ranks = [column.leave_out for column in kept]
        if not any(ranks):
            break
        last = ranks.index(max(ranks))
        kept, cells = [*kept[:last], *kept[last + 1 :]], [*cells[:last], *cells[last + 1 :]]
    length = max(MIN_LABEL_WIDTH, max(map(cell_len, cells[0])) - fit.too_wide(table, room))
    fit = fit._replace(cells=[[_shortened(label, length) for label in cells[0]], *cells[1:]])
    return fit._replace(whole=not fit.too_wide(table, room))


def _shortened(label: str, length: int) -> str:
    """`label` without its middle, where it is longer than `length`: labels mostly differ at an end."""
    if cell_len(label) <= length:
        return label
    kept = length - 2
    return f"{label[: (kept + 1) // 2]}..{label[len(label) - kept // 2 :]}"


def _grid(table: Table, fit: _Fit) -> RichTable:
    """The table, with columns as wide as their widest cell: this saves measuring every cell again."""
    grid = plain_grid(padding=(0, fit.gap - 1, 0, 0))
    for column, width in zip(fit.columns, fit.widths(table), strict=True):
        header, room = column.header if fit.folded else column.name, width if fit.whole else None
        grid.add_column(header, justify="right" if column.numeric else "left", overflow="fold", width=room)
    for category, rows in groupby(enumerate(table.rows), key=lambda pair: category_of(pair[1])):
        if by_category(table):
            grid.add_row(Text(category, style="italic"))
        for number, row in rows:
            styled = zip(fit.columns, fit.cells, strict=True)
            grid.add_row(*(Text(texts[number], style=_style(row, column)) for column, texts in styled))
        grid.add_section()
    return grid


def _style(row: Row, column: Column) -> str:
    if column.header == SPEEDUP.header and row.difference_shown is False:
        return "dim"
    return "bold green" if row.best else "dim" if row.disqualified else ""


def _tabulate(table: Table, form: str, escape: Callable[[str], str] = str, *, details: bool) -> str:
    columns = columns_for(table, details=details)
    category = ["category"] * by_category(table)
    rows = [
        [escape(text) for text in ([category_of(row)] * len(category) + [column.cell(row) for column in columns])]
        for row in table.rows
    ]
    headers = [*category, *(escape(column.name) for column in columns)]
    return tabulated(headers, rows, [False] * len(category) + [column.numeric for column in columns], form)


def _to_github(tables: Sequence[Table], *, details: bool) -> str:
    parts = []
    for table, heading in zip(tables, titles(tables), strict=True):
        grid = _tabulate(table, "pipe", markdown_cell, details=details)
        lines = [*notes(table), *(notes_on_details(table) if details else ())]
        parts.append(
            "\n".join([*(f"- {markdown_line(line)}" for line in verdicts(table)), "", markdown(heading, grid, lines)])
        )
    return "\n".join([*parts, *map(over_suites.to_github, summaries(tables))])


def _to_latex(tables: Sequence[Table], *, details: bool) -> str:
    """A booktabs tabular each; verdicts, title and notes as comments, since where they go is the paper's choice."""
    parts = []
    for table, heading in zip(tables, titles(tables), strict=True):
        grid = _tabulate(table, "latex_booktabs", details=details)
        above, below = [*verdicts(table), heading], [*notes(table), *(notes_on_details(table) if details else ())]
        parts.append("\n".join([*(f"% {line}" for line in above), grid, *(f"% {line}" for line in below), ""]))
    return "\n".join([*parts, *map(over_suites.to_latex, summaries(tables))])
