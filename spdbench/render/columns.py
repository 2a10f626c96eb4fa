"""The words in a comparison: its columns and cells, and the title line. For terminal, Markdown, LaTeX.

A line break in a header is where it may be folded on a narrow terminal; cells are one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import PaddingDimensions
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import tabulate

from spdbench.console import counted, printable
from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.pairing import concurrency
from spdbench.judge.metrics.dialects import metric_name
from spdbench.judge.metrics.flags import FEW_PROMPTS, is_untrained
from spdbench.judge.results.schema import UNKNOWN, DecodingInfo, Result

EMPTY = "-"


def capture(console: Console, *parts: RenderableType) -> str:
    """What `console` would print, without spaces at the ends of lines."""
    with console.capture() as captured:
        for part in parts:
            console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().split("\n"))


def bullet(line: str) -> RichTable:
    """A note whose further lines are indented."""
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_row("-", Text(line))
    return grid


def plain_grid(columns: Iterable[tuple[str, bool]] = (), padding: PaddingDimensions = (0, 1)) -> RichTable:
    """An empty table without frame, with a column for each header; true for one of numbers."""
    grid = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, header_style="bold")
    for header, is_numeric in columns:
        grid.add_column(header, justify="right" if is_numeric else "left")
    return grid


def tabulated(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[bool], form: str) -> str:
    """`rows` of cells as tabulate prints them in `form`."""
    aligns = ["right" if is_numeric else "left" for is_numeric in numeric]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=aligns)


def markdown(title: str, grid: str, notes: Iterable[str]) -> str:
    lines = [f"- {markdown_line(note)}" for note in notes]
    return "\n".join([f"**{markdown_line(title)}**", "", grid, "", *lines, ""])


def markdown_line(text: str) -> str:
    """`text` for a line of Markdown, in which it begins no tag of HTML and ends no escape."""
    return text.replace("\\", "\\\\").replace("<", "&lt;")


def markdown_cell(text: str) -> str:
    """`text` for a cell of a Markdown table."""
    return markdown_line(text).replace("|", "\\|")


def harmless(text: str) -> str:
    """`text` for a line or a cell, though a file may name it: on one line, with nothing that a terminal obeys."""
    return printable(text, one_line=True)


def category_of(row: Row) -> str:
    return harmless(row.category or "all")


@dataclass(frozen=True)
class Column:
    """A column. Where room is short, the one with the highest `leave_out` goes first; 0 always stays."""

    header: str
    cell: Callable[[Row], str]
    leave_out: int = 0
    numeric: bool = True
    meaning: str = ""

    @property
    def name(self) -> str:
        """The header on one line."""
        return self.header.replace("/\n", "/").replace("\n", " ")

    def cells(self, table: Table) -> list[str]:
        """What it says in each row."""
        return [self.cell(row) for row in table.rows]


def columns_for(table: Table, *, details: bool = False) -> list[Column]:
    """The columns that say anything in `table`; the label always comes first. With `details` also those that are
    omitted everywhere else."""
    columns = _columns_with(table.dialects)
    if details:
        shown = [column.cells(table) for column in columns]
        columns += [column for column in DETAILS if column.cells(table) not in shown]
    return [column for column in columns if not column.leave_out or set(column.cells(table)) != {EMPTY}]


def _columns_with(dialects: Sequence[str]) -> list[Column]:
    """All columns, with tau in the one dialect that was asked for; with several, what leaves room for them all."""
    if not dialects:
        return list(COLUMNS)
    header = "tau\n{}" if len(dialects) == 1 else "{}"
    taus = [Column(header.format(name), _metric(metric_name(name), ".2f")) for name in dialects]
    if len(dialects) == 1:
        at = COLUMNS.index(TAU)
        return [*COLUMNS[:at], *taus, *COLUMNS[at + 1 :]]
    return [*WITH_DIALECTS, *taus]


def _drafts(row: Row) -> bool:
    return row.head.backend.kind != "autoregressive"


def _is_pipeline(row: Row) -> bool:
    """True where the ideal speed-up is not tau."""
    return row.head.backend.kind == "pipeline"


def _is_overall(row: Row) -> bool:
    return row.category is None


def _has_devices(row: Row) -> bool:
    """True for several: with one device, a number for each repeats another column."""
    return row.head.backend.num_devices != 1


def _metric(name: str, form: str, scale: float = 1, where: Callable[[Row], bool] | None = None) -> Callable[[Row], str]:
    """A cell with `scale` times the metric; blank where that is null, and in rows that are not of a kind."""

    def cell(row: Row) -> str:
        value = row.metrics.get(name) if where is None or where(row) else None
        return EMPTY if value is None else format(scale * value, form)

    return cell


def _label(row: Row) -> str:
    return harmless(f"{row.label} (lossy)" if row.head.backend.lossy else row.label)


def _drafter(row: Row) -> str:
    drafter = row.head.drafter
    if drafter is None:
        return EMPTY
    name = harmless(Path(drafter.id).name or drafter.id)
    tree = row.head.backend.chosen.get("tree")
    kind = "synthetic" if drafter.synthetic else "untrained" if is_untrained(drafter) else None
    remarks = "; ".join(filter(None, (kind, tree and harmless(tree))))
    return f"{name} ({remarks})" if remarks else name


def _speedup(row: Row) -> str:
    value, interval = row.metrics["speedup"], row.metrics["speedup_ci"]
    if row.is_baseline:
        return "baseline"
    if value is None:
        return EMPTY
    return f"{value:.2f} (no interval)" if interval is None else _with_interval(value, interval)


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def share(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.1%}"


def _score(row: Row, fewest: int = 1) -> str:
    """The mean with its interval, where there is one; blank where fewer answers than `fewest` have a score."""
    value = row.metrics["score"]
    if value is None or (row.metrics["num_scored"] or 0) < fewest:
        return EMPTY
    interval = row.metrics["score_ci"]  # asked for last: it takes time, and most rows have no score
    return f"{value:.2f}" if interval is None else _with_interval(value, interval)


def _rate(row: Row) -> str:
    value = row.metrics["decode_tokens_per_s"]
    return EMPTY if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _outputs(row: Row) -> str:
    """How many outputs are the baseline's; without one, what the file says of vanilla's."""
    if row.outputs is not None and row.outputs.num_compared:
        same, compared = row.outputs.num_identical, row.outputs.num_compared
    elif row.outputs is None and not row.is_baseline and row.category is None and row.head.divergence is not None:
        same, compared = row.head.divergence.identical, sum(row.head.divergence.counts.values())
    else:
        return EMPTY
    return f"{same}/{compared}"


LABEL = Column("label", _label, numeric=False)
RATE = Column("tok/s", _rate, leave_out=1)
SPEEDUP = Column("speed-up\n[95 %]", _speedup)
ACCEPTANCE = Column("accept", _metric("acceptance_rate", ".1%"), leave_out=4, meaning="share of drafts accepted")
TAU = Column("tau", _metric("acceptance_length", ".2f", where=_drafts), leave_out=3, meaning="tokens a round")
"""Vanilla's is 1 by definition, and not shown."""
GOODPUT = Column("goodput", _metric("goodput", ".1%"), leave_out=1)
"""Of the limits that were given; what it means is a note of the table."""
WITH_DIALECTS = (
    LABEL,
    replace(RATE, leave_out=2),
    replace(SPEEDUP, leave_out=4),
    replace(ACCEPTANCE, leave_out=3),
    GOODPUT,
)
"""The columns next to acceptance lengths in several dialects; the highest number makes room first."""

COLUMNS = (
    LABEL,
    SPEEDUP,
    RATE,
    Column("per\ndevice", _metric("speedup_per_device", ".2f", where=_has_devices), leave_out=2),
    ACCEPTANCE,
    TAU,
    Column(
        "ideal",
        _metric("ideal_speedup", ".2f", where=_is_pipeline),
        leave_out=5,
        meaning="speed-up with a device per stage and cycles as long as the heaviest stage",
    ),
    Column("TTFT\ns", _metric("ttft_s", ".3f"), leave_out=8, meaning="time to first token"),
    GOODPUT,
    Column("same\noutputs", _outputs, leave_out=6, meaning="answers equal to the baseline's"),
    Column("score", partial(_score, fewest=FEW_PROMPTS), leave_out=7),
    Column("tok/\ncycle", _metric("tokens_per_cycle", ".2f"), leave_out=10, meaning="tokens a cycle of the pipeline"),
    Column(
        "bubble",
        _metric("bubble_ratio", ".1%"),
        leave_out=9,
        meaning="share of time in which the target model was idle",
    ),
    Column("J/\ntok", _metric("energy_j_per_token", ".2f"), leave_out=11),
    Column("device\nms/tok", _metric("device_s_per_token", ".1f", scale=1000, where=_has_devices), leave_out=12),
    # Memory is the highest over the run, whose categories share a process.
    Column("memory\nGiB", _metric("peak_memory_bytes", ".2f", scale=2**-30, where=_is_overall), leave_out=13),
    Column("drafter", _drafter, leave_out=14, numeric=False),
)
DETAILS = (Column("score", _score, leave_out=1),)
"""The columns that are shown on request only: a score of few answers."""


def by_category(table: Table) -> bool:
    return any(row.category is not None for row in table.rows)


def title(table: Table, *, with_hashes: bool = False) -> str:
    """One line: suite, model, its chosen chat template and arguments, dtype, decoding, prompts, requests at once,
    machine."""
    parts = [work(table.head, with_hashes=with_hashes), _prompts(table), *loads(row.head for row in table.rows)]
    return harmless(" | ".join([*parts, _where(table)]))


def work(head: Result, *, with_hashes: bool = False) -> str:
    """What was asked of which model: the parts of a title that do not depend on who answered."""
    suite = f"{head.suite.name} v{head.suite.version}"
    suite = f"{suite} (sha256 {head.suite.sha256[:8]})" if with_hashes else suite
    return " | ".join([suite, model_as_asked(head, with_hash=with_hashes), decoding(head.decoding)])


def model_as_asked(head: Result, *, with_hash: bool = False) -> str:
    """The model, its chosen chat template and arguments, and its dtype."""
    args = [f"{key}={json.dumps(value)}" for key, value in head.model.template_args.items()]
    chosen = [] if head.model.chat_template is None else [f"chat template {head.model.chat_template}"]
    sha256 = [f"(sha256 {head.model.sha256[:8]})"] if with_hash else []
    dtype = "dtype unknown" if head.model.dtype == UNKNOWN else head.model.dtype
    return f"{' '.join([head.model.id, *sha256, *chosen, *args])} | {dtype}"


def titles(tables: Sequence[Table]) -> list[str]:
    """A title each; with hashes if they would otherwise look alike."""
    plain = [title(table) for table in tables]
    return plain if len(set(plain)) == len(plain) else [title(table, with_hashes=True) for table in tables]


def decoding(info: DecodingInfo) -> str:
    length = f"up to {info.max_new_tokens} new tokens"
    if info.temperature == 0:
        return f"greedy, {length}"
    filters = [f"top-p {info.top_p:g}"] * (info.top_p < 1) + [f"top-k {info.top_k}"] * (info.top_k > 0)
    if info.temperature is None:
        return f"temperature unknown, {length}"
    return ", ".join([f"temperature {info.temperature:g}", *filters, f"seed {info.seed}", length])


def _prompts(table: Table) -> str:
    """How many prompts have an answer, from the row with the fewest to the one with the most, and of how many."""
    rows = [row for row in table.rows if row.category is None]
    counts = [row.metrics["num_prompts"] for row in rows]
    fewest, most = min(counts, default=0), max(counts, default=0)
    asked = max((row.head.suite.num_prompts for row in rows), default=0)
    short = any(row.metrics["num_prompts"] < row.head.suite.num_prompts for row in rows)
    answers = max((row.metrics["num_runs"] - row.metrics["num_failed"] for row in rows), default=0)
    words = f"{most} of {counted(asked, 'prompt')}" if short else counted(most, "prompt")
    more = f", {answers} answers" if answers > most else ""
    return f"{'' if fewest == most else f'{fewest} to '}{words}{more}"


def loads(heads: Iterable[Result]) -> list[str]:
    """How many requests were under way at once, where that was more than one."""
    levels = list(dict.fromkeys(map(concurrency, heads))) or [1]
    return [f"{', '.join(map(str, levels))} at once"] if levels != [1] else []


def _where(table: Table) -> str:
    """The machine; that of the client alone, where no backend knows what its server runs on."""
    served = all(row.result.known_devices is None for row in table.rows)
    return f"asked from {machine(table.head)}" if served else machine(table.head)


def machine(head: Result) -> str:
    """The machine's name as far as the environment holds it, and the start of its fingerprint."""
    found = [text for key in ("gpu", "gpus", "cpu") if (text := device_name(head.environment.get(key)))]
    fingerprint = str(head.environment.get("fingerprint") or "unknown machine")[:8]
    return f"{', '.join(found)} (machine id {fingerprint})" if found else fingerprint


def device_name(value: Any) -> str:
    """The name in `value`: text, {"name" or "model": text}, or a list of such."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return str(value.get("name") or value.get("model") or "")
    if isinstance(value, Sequence):
        names = [name for item in value if (name := device_name(item))]
        return ", ".join(dict.fromkeys(names))
    return ""
