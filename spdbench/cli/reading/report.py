"""`spdbench report`: result files in, a page or one chart out. Only parses the command line, reads and writes.

Of models it knows the tokenizer, which turns the ids of answers into text; their weights are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from spdbench.cli.files import (
    CALIBRATION,
    file_identity,
    read_calibration,
    require_free_output,
    result_paths,
    write_whole_file,
)
from spdbench.cli.options import OUTPUT, complete_files
from spdbench.cli.parameters import LABEL_OR_FILE, Argument, Option
from spdbench.cli.terminal import start_quickly
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.render.report.style import STYLES, ImageFormat

if TYPE_CHECKING:
    from spdbench.judge.comparison.compare import Table
    from spdbench.judge.gate.calibration import Calibration
    from spdbench.judge.loaded import LoadedResult
    from spdbench.judge.results.embedded import EmbeddedFile
    from spdbench.render.report.chart import Chart, Shown

CHARTS = (
    *("speedup", "categories", "prompts", "acceptance"),
    *("step-lengths", "step-lengths-by-category", "step-lengths-by-context"),
    *("bubble", "waterfall", "timeline"),
)
HISTORY_CHARTS = ("history-speedup", "history-speed", "history-acceptance")
FORMATS: tuple[str, ...] = get_args(ImageFormat)
MAX_EMBEDDED_BYTES = 32 * 2**20
"""Of results in a page of many: about 3 MB when compressed. A page of more is made without them."""


@click.command("report", short_help="Draw a comparison: one HTML page, or one chart as a file.")
@click.argument("results", cls=Argument, metavar="RESULT...", nargs=-1, required=True, shell_complete=complete_files)
@click.option(
    "-o",
    "--out",
    cls=Option,
    type=OUTPUT,
    metavar="FILE",
    help="Where to write. [default: report.html, with --history history.html, or CHART.FORMAT]",
)
@click.option("--chart", type=click.Choice([*CHARTS, *HISTORY_CHARTS]), help="Write this chart alone.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of a chart. [default: what FILE ends in, else svg]")
@click.option(
    "--style",
    type=click.Choice([*STYLES]),
    help="Of a chart: paper is one column of two (3.35 in), paper-wide is both (7 in). [default: screen]",
)
@click.option(
    "--baseline",
    cls=Option,
    type=LABEL_OR_FILE,
    metavar="LABEL|FILE",
    help="What speed-ups are relative to. Default: that of `spdbench compare`.",
)
@click.option(
    "--history",
    "as_history",
    is_flag=True,
    help="Many runs of one workload in order of time, each judged as `check` does against those before it.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
def command(
    results: tuple[str, ...],
    out: Path | None,
    chart: str | None,
    form: ImageFormat | None,
    style: str | None,
    baseline: str | None,
    as_history: bool,
    force: bool,
) -> None:
    """Draw a comparison of results: one HTML page that holds everything it needs, or one chart as a file.

    RESULT is a result file, a pattern, a folder of result files, or an earlier report. All must be of one model, dtype,
    decoding and machine; of several suites the page shows the means and a table each, of several loads (--concurrency)
    up to which each label pays, and has no charts. The page opens from disk without network, and holds the results that
    it shows: `spdbench compare report.html` reads it.

    With --history the results are many runs of one suite, model, dtype and decoding, on any machines; a
    calibration.json next to them, which `check --calibrate` writes, says what is noise.
    """
    start_quickly()
    for option, value in (("--format", form), ("--style", style)):
        if value is not None and chart is None:
            raise click.UsageError(f"{option} is for a single chart; name it with --chart")
    if chart in CHARTS and as_history:
        raise click.UsageError(f"--chart {chart} shows a comparison; with --history: {', '.join(HISTORY_CHARTS)}")
    as_history = as_history or chart in HISTORY_CHARTS
    if baseline is not None and as_history:
        raise click.UsageError("--baseline has no effect on a history, whose runs are judged by those before them")
    if chart is not None and out is not None:
        form = _form_of(out, form)
    form = form or "svg"
    page = "history.html" if as_history else "report.html"
    out = out or Path(page if chart is None else f"{chart}.{form}")
    paths = list(result_paths(results))
    require_free_output(out, paths, force=force)
    from spdbench.render.report import vega

    vega.vl_convert()  # before the results are read: without it there is nothing to do
    from spdbench.judge.loaded import read_results

    loaded = read_results(paths, keep_ids=True)
    if as_history:
        content = _history(loaded, paths, out, chart, form, style)
    elif chart is None:
        content = _page(_compared(loaded, baseline), paths, out)
    else:
        content = _drawn(vega.CHARTS[chart], _only_table(_compared(loaded, baseline)), form, style)
    write_whole_file("-o", out, content)
    say(f"Wrote {out}")


def _form_of(out: Path, form: ImageFormat | None) -> ImageFormat | None:
    """The format of the chart that goes to `out`: that of its ending, which must not say something else than `form`."""
    ending = out.suffix[1:].lower()
    if ending in ("html", "htm"):
        raise InputError(f"-o {out}: a chart is a picture; allowed: {', '.join(FORMATS)}")
    if ending not in FORMATS:
        return form
    if form not in (None, ending):
        raise InputError(f"-o {out}: ends in .{ending}, and --format is {form}; give one of them")
    return cast("ImageFormat", ending)


def _compared(loaded: Sequence[LoadedResult], word: str | None) -> list[Table]:
    from spdbench.judge.comparison.compare import compare, find_baseline

    return compare(loaded, None if word is None else find_baseline(word, loaded), by_category=True)


def _only_table(tables: Sequence[Table]) -> Table:
    """The comparison of all results, with what turns their ids into text.

    Raises:
        InputError: they do not all compare.
    """
    from spdbench.judge.comparison.pairing import differences
    from spdbench.models.checkpoints.tokenizer_files import find_decoder

    if len(tables) == 1:
        model = tables[0].head.model
        return replace(tables[0], decode=find_decoder(model.id, model.tokenizer_sha256, model.sha256))
    first, second = (table.rows[0] for table in tables[:2])
    why = "; ".join(differences(first.head, second.head)) or "the machine that measured them"
    raise InputError(
        f"{first.file} and {second.file} do not compare: they differ in {why}. Make a report of each group of results."
    )


def _page(tables: Sequence[Table], paths: Sequence[Path], out: Path) -> bytes:
    """The page of one comparison, or of several suites or loads that differ in nothing else."""
    from spdbench.input_files import MAX_UNPACKED_BYTES
    from spdbench.judge.comparison.load import loads
    from spdbench.judge.comparison.summary import summaries
    from spdbench.render.report import load_page, page, suites_page

    sources = _sources(paths)
    if (size := sum(len(file.raw) for file in sources)) > MAX_UNPACKED_BYTES:
        raise InputError(
            f"results of {size >> 20} MiB are more than a page holds ({MAX_UNPACKED_BYTES >> 20} MiB). Report fewer of "
            "them, or measure without --trace"
        )
    for summary in summaries(tables):
        if len(summary.tables) == len(tables):
            return suites_page.to_html(summary, sources).encode()
    if len(tables) > 1 and len(found := loads(tables)) == 1:
        return load_page.to_html(found[0], sources).encode()
    return page.to_html(_only_table(tables), sources, out.name).encode()


def _drawn(chart: Chart[Shown], shown: Shown, form: ImageFormat, style: str | None) -> bytes:
    """One chart as a file.

    Raises:
        InputError: `shown` has nothing that it shows.
    """
    from spdbench.render.report import vega
    from spdbench.render.report.style import LIGHT

    panels = chart.make(shown, LIGHT)
    if not panels:
        raise InputError(f"--chart {chart.name}: {chart.missing}")
    return vega.to_file(chart, panels, form, style or "screen")


def _history(
    loaded: Sequence[LoadedResult],
    paths: Sequence[Path],
    out: Path,
    chart: str | None,
    form: ImageFormat,
    style: str | None,
) -> bytes:
    """The page of a history, or one chart of it."""
    from spdbench.judge.gate.history import history
    from spdbench.render.report.history import CHARTS as DRAWN
    from spdbench.render.report.history_page import to_html

    calibration = _calibration(paths)
    found = history(loaded, calibration)
    if chart is not None:
        return _drawn(DRAWN[chart], found, form, style)
    sources = small_sources(paths)
    # The page holds no calibration: what draws a chart anew needs the folder where it is.
    shown = out.name if sources and calibration is None else f"{paths[0].resolve().parent.name}/"
    return to_html(found, sources, calibration, shown).encode()


def _calibration(paths: Sequence[Path]) -> Calibration | None:
    """The calibration next to the results, if there is one.

    Raises:
        InputError: it cannot be read, or the results lie in several folders that have one each.
    """
    places = [path.parent / CALIBRATION for path in paths if (path.parent / CALIBRATION).is_file()]
    found = list({file_identity(place): place for place in places}.values())
    if len(found) > 1:
        raise InputError(
            f"{found[0]} and {found[1]} are both next to results; which of them says what is noise? Put the results of "
            "a history into one folder, or remove one calibration"
        )
    return read_calibration(found[0]) if found else None


def small_sources(paths: Sequence[Path]) -> list[EmbeddedFile] | None:
    """The result files as they are; None if they are too large for a page."""
    files = _sources(paths)
    return files if sum(len(file.raw) for file in files) <= MAX_EMBEDDED_BYTES else None


def _sources(paths: Sequence[Path]) -> list[EmbeddedFile]:
    """The result files as they are, those of earlier reports among them; each file once."""
    from spdbench.input_files import read_input
    from spdbench.judge.results.embedded import EmbeddedFile, is_report, read_report

    found: dict[object, list[EmbeddedFile]] = {}
    for path in paths:
        place = file_identity(path)
        if place not in found:
            found[place] = read_report(path) if is_report(path) else [EmbeddedFile(path.name, read_input(path))]
    return [file for files in found.values() for file in files]
