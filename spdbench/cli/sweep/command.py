"""`spdbench sweep`: reads and checks the whole file, then runs what is not done yet."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from spdbench.cli.files import write_stdout
from spdbench.cli.options import FOLDER, OUTPUT, PATH, argument, flag, option, takes
from spdbench.console import counted, say
from spdbench.errors import InputError

CHARTS = ("heat-map", "pareto", "break-even")
PLACES = {"local": "local", "ray": "on_ray", "slurm": "on_slurm"}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What `sweep` runs, and where."""

    file: Path = argument("FILE", type=PATH)
    on: str = option("--on", click.Choice(tuple(PLACES)), None, "Where the points run.", "local")
    results: Path | None = option("--results", FOLDER, "DIR", "Where results go. [default: results/NAME of the sweep]")
    dry_run: bool = flag("--dry-run", "Print the commands, one a line, and run nothing.")
    chart: tuple[str, Path] | None = option(
        "--chart",
        (click.Choice(CHARTS), OUTPUT),
        "CHART FILE",
        f"Draw {', '.join(CHARTS)} as .svg, .png or .pdf.",
        nargs=2,
    )
    report: Path | None = option("--report", OUTPUT, "FILE", "Write an HTML page: charts, all points, where it pays.")
    force: bool = flag("--force", "Replace a chart or a page that is there already.")
    best: str | None = option(
        "--best", None, "METRIC", "Print the options of the best point by a metric, such as speedup."
    )


@click.command("sweep", short_help="Run a grid or a list of runs, here or on a cluster.")
@takes(SweepOptions)
def command(options: SweepOptions) -> None:
    """Run every point of FILE, a YAML file with a grid or a list of settings of `run`, and skip what is done.

    Each point is an ordinary `spdbench run`. A point that fails does not stop the others.
    """
    click.get_current_context().exit(_sweep(options))


def _sweep(options: SweepOptions) -> int:
    """The exit code: 1 if a point failed."""
    from spdbench.cli.sweep.best import best_snippet, require_metric
    from spdbench.cli.sweep.drawn import check_output, draw, write_report
    from spdbench.cli.sweep.local import require_models_and_devices
    from spdbench.cli.sweep.points import read_sweep
    from spdbench.cli.sweep.progress import failures, open_log
    from spdbench.cli.terminal import sigterm_interrupts

    if options.best is not None:
        require_metric(options.best)
    if options.chart is not None:
        check_output("--chart", options.chart[1], force=options.force)
    if options.report is not None:
        check_output("--report", options.report, force=options.force)
    file, points = read_sweep(options.file)
    folder = options.results or Path("results") / file.name
    here = options.on == "local"
    if options.dry_run:
        if here:
            require_models_and_devices(options.file, points)
        write_stdout("".join(f"{point.shown(folder)}\n" for point in points))
        return 0
    place = importlib.import_module(f"spdbench.cli.sweep.{PLACES[options.on]}")
    run = place.connect(getattr(file, options.on, {}))
    with sigterm_interrupts(), open_log(folder) as log:
        todo = [point for point in points if not log.is_done(point)]
        if here:
            require_models_and_devices(options.file, todo)
        say(f"{file.name}: {counted(len(points), 'point')}, of which {len(points) - len(todo)} are done.")
        outcomes = []
        with closing(run(todo, folder)) as ended:  # an interruption here also ends what still runs
            for outcome in ended:
                log.record(outcome)
                outcomes.append(outcome)
                how = f"failed (exit code {outcome.exit_code})" if outcome.exit_code else "done"
                note = f"; {outcome.note}" if outcome.note else ""
                say(f"[{len(outcomes)}/{len(todo)}] {outcome.point.name}: {how}{note}")
    failed = failures(outcomes)
    done = len(points) - len(failed)
    shown = f"; `spdbench compare {folder}` shows them" if done else ""
    say(f"{done} of {len(points)} points are in {folder}{shown}.")
    if failed:
        say("Failed points, which the same command tries again:\n  " + "\n  ".join(failed))
    outputs: list[Callable[[], None]] = []
    if options.chart is not None:
        outputs.append(partial(draw, *options.chart, points, folder))
    if options.report is not None:
        outputs.append(partial(write_report, options.report, options.file, file.name, points, folder))
    if (metric := options.best) is not None:
        outputs.append(lambda: write_stdout(best_snippet(metric, points, folder)))
    missing = [error for error in map(_problem, outputs) if error is not None]
    for error in missing:
        say(f"Error: {error}")
    return 1 if failed else InputError.exit_code if missing else 0


def _problem(write: Callable[[], None]) -> InputError | None:
    """Why an output cannot be written, such as a chart of points that failed. The others are written all the same."""
    try:
        write()
    except InputError as error:
        return error
    return None
