"""`spdbench compare`: result files in, a comparison out. Only parses the command line, reads and writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from spdbench.cli.files import result_paths, write_stdout
from spdbench.cli.options import argument, complete_files, flag, option, takes
from spdbench.cli.parameters import LABEL_OR_FILE
from spdbench.cli.terminal import start_quickly
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.judge.comparison.compare import Table
    from spdbench.judge.loaded import LoadedResult
    from spdbench.render.table import Format

FORMATS = ("table", "github", "latex", "csv", "json", "parquet")
RECORD_WRITERS = {"csv": "csv_text", "json": "json_text", "parquet": "to_parquet"}
"""Formats of single records, and which function of `render/export.py` writes them."""
DIALECTS = ("spdbench", "vllm", "spec-bench", "sglang", "nvidia", "specforge", "aiperf", "eagle", "spd")
BY = ("category", "context")
"""What a comparison can have more rows for."""
DIALECT_NAMES = (*DIALECTS, "all")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, with what, and how it is printed."""

    results: tuple[str, ...] = argument("RESULT...", nargs=-1, required=True, shell_complete=complete_files)
    baseline: str | None = option(
        "--baseline",
        LABEL_OR_FILE,
        "LABEL|FILE",
        "What speed-ups are relative to. Default: the run's first -b; of runs with different ones, the first vanilla.",
    )
    by: str | None = option(
        "--by",
        click.Choice([*BY, "request"]),
        None,
        "One row for each category, or length of context, as well; or only one for each request, as csv, json or "
        "parquet.",
    )
    form: Format | Literal["parquet"] = option("--format", click.Choice(FORMATS), None, "How to print.", "table")
    dialect: str | None = option(
        "--dialect",
        click.Choice(DIALECT_NAMES),
        None,
        "Acceptance length as others print it, or in all dialects side by side.",
    )
    goodput: str | None = option(
        "--goodput",
        None,
        "LIMITS",
        "Share of requests within limits in ms, such as ttft:500,tpot:50 (or e2el, the whole request).",
    )
    details: bool = flag("--details", "All columns, what they mean, and why each flag was raised.")


@click.command("compare", short_help="Compare results: speed-ups, acceptance, outputs.")
@takes(CompareOptions)
def command(options: CompareOptions) -> None:
    """Compare results: what each label gains, then a table for each suite, model, dtype, decoding and machine.

    RESULT is a result file, a pattern such as 'results/quick__*.json', a folder of result files, or a report, which
    holds results. Everything is computed anew from the runs in the files; no model is needed.
    """
    start_quickly()
    form = options.form
    if form == "parquet" and sys.stdout.isatty():
        raise InputError("--format parquet: is binary; send it to a file: spdbench compare ... > FILE.parquet")
    if options.by == "request" and form not in RECORD_WRITERS:
        raise InputError(f"--by request: is for programs; give --format {', '.join(RECORD_WRITERS)}, not {form}")
    if options.by == "request" and (options.baseline or options.dialect or options.goodput):
        raise InputError("--by request: compares nothing, so it takes neither --baseline nor --dialect nor --goodput")

    from rich.console import Console

    from spdbench.judge.loaded import read_results
    from spdbench.render import export
    from spdbench.render.table import render

    loaded = read_results(list(result_paths(options.results)))
    if options.by == "request":
        write_stdout(getattr(export, RECORD_WRITERS[form])(export.request_records(loaded)))
        return
    tables = compare_results(loaded, options.baseline, options.by, options.dialect, options.goodput)
    if form == "parquet":
        write_stdout(export.to_parquet(export.comparison_records(tables)))
    else:
        write_stdout(render(tables, form, Console(file=sys.stdout), details=options.details))


def compare_results(
    loaded: list[LoadedResult], baseline: str | None, by: str | None, dialect: str | None, goodput: str | None = None
) -> list[Table]:
    """The tables of `loaded` results; the other arguments are the command's options.

    Raises:
        InputError: `baseline` is neither a label nor a result file, or `goodput` no limits.
        NotComparableError: `baseline` did other work than every result.
    """
    from spdbench.judge.comparison.compare import compare, find_baseline
    from spdbench.judge.comparison.context import by_context
    from spdbench.judge.loaded import LoadedResult
    from spdbench.judge.metrics.goodput import parse_limits

    chosen = None if baseline is None else find_baseline(baseline, loaded)
    if by == "context":
        whole = [*loaded, *([chosen] if isinstance(chosen, LoadedResult) and chosen not in loaded else [])]
        split = by_context(whole)
        if isinstance(chosen, LoadedResult):
            chosen = split[whole.index(chosen)]
        loaded = split[: len(loaded)]
    dialects = DIALECTS if dialect == "all" else (dialect,) if dialect else ()
    limits = None if goodput is None else parse_limits(goodput)
    return compare(loaded, chosen, by_category=by is not None, dialects=dialects, limits=limits)
