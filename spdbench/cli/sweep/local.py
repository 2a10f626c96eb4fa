"""The points of a sweep here, one after the other: timings want an idle machine. And one point, as a cluster's task."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import Outcome
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.models.checkpoints import embedded
from spdbench.models.checkpoints.config import read_raw_config
from spdbench.models.checkpoints.folders import typed_model
from spdbench.models.hf.download import is_cached
from spdbench.processors import die_with

LONGEST_NOTE = 300


class Runner(Protocol):
    """Runs points, and yields how each ended as soon as it has; their results are in the folder by then. Closed before
    its end, it ends what still runs."""

    def __call__(self, points: Sequence[Point], folder: Path) -> Generator[Outcome]: ...


def require_models_and_devices(file: Path, points: Sequence[Point]) -> None:
    """Refuses points that cannot run on this machine, as far as that is known without weights, network and, for the
    CPU, torch. Says which models the hub has to have.

    Raises:
        InputError: a device is not there, or no model at the path that is named; names `file`, the sweep's, and
            the first such point.
    """
    models, devices = dict[str, str](), dict[str, str]()
    for point in points:
        if point.model is not None:
            models.setdefault(point.model, point.name)
        for device in point.devices:
            devices.setdefault(device, point.name)
    for checks, check in ((models, _require_model), (devices, _require_device)):
        for what, name in checks.items():
            try:
                check(what)
            except InputError as error:
                raise InputError(f"{file}: {name}: {error}") from None


def _require_model(model: str) -> None:
    if model == embedded.NAME:
        return
    path = typed_model(model)
    if path is None and not is_cached(model):
        say(f"NOTE: no folder {model} is here, so it is taken for a model of the hub, which is asked by the first run.")
    elif path is not None and path.is_dir():
        read_raw_config(path)


def _require_device(device: str) -> None:
    if device != "cpu":
        from spdbench.models.target import find_device

        find_device(device)


def connect(_settings: Mapping[str, Any]) -> Runner:
    return run_points


def run_points(points: Sequence[Point], folder: Path) -> Generator[Outcome]:
    for point in points:
        yield Outcome(point, run_here(point, folder))


def run_here(point: Point, folder: Path) -> int:
    """The exit code of one run. Its notes and its progress are shown; its table is left to `spdbench compare`."""
    running = subprocess.Popen(
        point.command(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=partial(die_with, os.getpid(), signal.SIGTERM),  # where this process is killed
    )
    try:
        return running.wait()
    except BaseException:  # Ctrl-C, which it gets as well, or SIGTERM, which it does not: it keeps what is finished
        running.send_signal(signal.SIGTERM)
        running.wait()
        raise


def run_there(point: Point, here: str) -> tuple[int, str, dict[str, bytes]]:
    """One run on a node: exit code, the last thing that it said, result files by name. It ends with the worker.
    Relative paths are those of `here`, where the node has that folder."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            point.command(folder),
            capture_output=True,
            text=True,
            cwd=here if os.path.isdir(here) else None,
            preexec_fn=partial(die_with, os.getpid()),
        )
        files = {path.name: path.read_bytes() for path in Path(folder).glob("*.json")}
    return done.returncode, last_line(done.stderr), files


def last_line(said: str) -> str:
    """What a run said last: its error, if it failed."""
    return said.strip().rpartition("\n")[2][-LONGEST_NOTE:]
