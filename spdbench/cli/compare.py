"""`spdbench compare`: result files in, a comparison out. Only parses the command line, reads and writes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import result_paths, write_stdout

if TYPE_CHECKING:
    from spdbench.render.table import Format

FORMATS = ("table", "github", "latex", "csv", "json")
DIALECTS = ("spdbench", "vllm", "spec-bench", "sglang", "nvidia", "specforge", "aiperf", "eagle", "spd")


@click.command("compare", short_help="Compare results: speed-ups, acceptance, outputs.")
@click.argument("results", metavar="RESULT...", nargs=-1, required=True)
@click.option(
    "--baseline", metavar="LABEL|FILE", help="What speed-ups are relative to. Default: the first vanilla of each table."
)
@click.option("--by", type=click.Choice(["category"]), help="One row for each category as well.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print.")
@click.option(
    "--dialect",
    type=click.Choice([*DIALECTS, "all"]),
    help="Acceptance length as others print it, or in all dialects side by side.",
)
@click.option("--details", is_flag=True, help="All columns, what they mean, and why each flag was raised.")
def command(
    results: tuple[str, ...], baseline: str | None, by: str | None, form: Format, dialect: str | None, details: bool
) -> None:
    """Compare results: what each label gains, then a table for each suite, model, dtype, decoding and machine.

    RESULT is a result file, a pattern such as 'results/quick__*.json', a folder of result files, or a report, which
    holds results. Everything is computed anew from the runs in the files; no model is needed.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads gain nothing here and take a core each
    from rich.console import Console

    from spdbench.judge.comparison.compare import compare, find_baseline
    from spdbench.judge.loaded import read_results
    from spdbench.render.table import render

    loaded = read_results(list(result_paths(results)))
    chosen = None if baseline is None else find_baseline(baseline, loaded)
    dialects = DIALECTS if dialect == "all" else (dialect,) if dialect else ()
    tables = compare(loaded, chosen, by_category=by == "category", dialects=dialects)
    write_stdout(render(tables, form, Console(file=sys.stdout), details=details))
