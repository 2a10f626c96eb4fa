"""`spdbench compare`: result files in, a comparison out. Only parses the command line, reads and writes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import result_paths, write_stdout
from spdbench.cli.options import argument, flag, option, takes
from spdbench.cli.terminal import start_quickly

if TYPE_CHECKING:
    from spdbench.render.table import Format

FORMATS = ("table", "github", "latex", "csv", "json")
DIALECTS = ("spdbench", "vllm", "spec-bench", "sglang", "nvidia", "specforge", "aiperf", "eagle", "spd")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, with what, and how it is printed."""

    results: tuple[str, ...] = argument("RESULT...", nargs=-1, required=True)
    baseline: str | None = option(
        "--baseline", None, "LABEL|FILE", "What speed-ups are relative to. Default: the first vanilla of each table."
    )
    by: str | None = option(
        "--by", click.Choice(["category", "context"]), None, "One row for each category, or length of context, as well."
    )
    form: Format = option("--format", click.Choice(FORMATS), None, "How to print.", "table")
    dialect: str | None = option(
        "--dialect",
        click.Choice([*DIALECTS, "all"]),
        None,
        "Acceptance length as others print it, or in all dialects side by side.",
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
    from rich.console import Console

    from spdbench.judge.comparison.compare import compare, find_baseline
    from spdbench.judge.comparison.context import by_context
    from spdbench.judge.loaded import LoadedResult, read_results
    from spdbench.render.table import render

    loaded = read_results(list(result_paths(options.results)))
    chosen = None if options.baseline is None else find_baseline(options.baseline, loaded)
    if options.by == "context":
        split = by_context(loaded)
        if isinstance(chosen, LoadedResult):
            chosen = split[loaded.index(chosen)] if chosen in loaded else by_context([chosen])[0]
        loaded = split
    dialects = DIALECTS if options.dialect == "all" else (options.dialect,) if options.dialect else ()
    tables = compare(loaded, chosen, by_category=options.by is not None, dialects=dialects)
    write_stdout(render(tables, options.form, Console(file=sys.stdout), details=options.details))
