"""A sweep's charts as files, and its page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from spdbench.cli.files import require_free_output, write_whole_file
from spdbench.cli.reading.report import small_sources
from spdbench.cli.sweep.best import point_rows
from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import result_files
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.judge.sweeps import SweepRow
from spdbench.render.report import vega
from spdbench.render.report.style import LIGHT
from spdbench.render.report.sweep import CHARTS, to_html


def check_output(option: str, path: Path, *, force: bool) -> None:
    """Raises `InputError` where `path` could not be written, before anything runs."""
    require_free_output(path, [], force=force, option=option)
    if option == "--chart":
        vega.format_of(option, path)
    vega.vl_convert()


def draw(name: str, path: Path, points: Sequence[Point], folder: Path) -> None:
    """One chart as a file.

    Raises:
        InputError: the finished points have nothing that it shows.
    """
    chart = CHARTS[name]
    panels = chart.make(_rows(points, folder), LIGHT)
    if not panels:
        raise InputError(f"--chart {name}: {chart.missing}")
    write_whole_file("--chart", path, vega.to_file(chart, panels, vega.format_of("--chart", path), "screen"))
    say(f"Wrote {path}")


def write_report(path: Path, file: Path, name: str, points: Sequence[Point], folder: Path) -> None:
    """The page of what is finished."""
    command = shlex.join(["spdbench", "sweep", str(file), "--results", str(folder)])
    sources = small_sources([each for point in points for each in result_files(folder, point)])
    page = to_html(_rows(points, folder), name, str(folder), sources, command)
    write_whole_file("--report", path, page.encode())
    say(f"Wrote {path}")


def _rows(points: Sequence[Point], folder: Path) -> list[SweepRow]:
    return [SweepRow(point.settings, row) for point in points for row in point_rows(point, folder)]
