"""The points of a sweep on this machine, one after the other: timings want an idle machine."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import Outcome


class Runner(Protocol):
    """Runs points, and yields how each ended as soon as it has; their results are in the folder by then. Closed before
    its end, it ends what still runs."""

    def __call__(self, points: Sequence[Point], folder: Path) -> Generator[Outcome]: ...


def connect(_settings: Mapping[str, Any]) -> Runner:
    return run_points


def run_points(points: Sequence[Point], folder: Path) -> Generator[Outcome]:
    for point in points:
        yield Outcome(point, run_here(point, folder))


def run_here(point: Point, folder: Path) -> int:
    """The exit code of one run. Its notes and its progress are shown; its table is left to `spdbench compare`."""
    running = subprocess.Popen(point.command(folder), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        return running.wait()
    except BaseException:  # Ctrl-C, which it gets as well, or SIGTERM, which it does not: it keeps what is finished
        running.send_signal(signal.SIGTERM)
        running.wait()
        raise
