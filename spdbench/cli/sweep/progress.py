"""What is done of a sweep: a folder of results, and a file `points.jsonl` with a line for each point that ended.

A point is done if its last line says that it ended with 0, and if the results in the folder still have the run keys in
that line. The file is locked while a sweep works, so that a second one cannot mix with it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from spdbench.cli.sweep.points import ADDRESS, Point
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.input_files import parse_json
from spdbench.judge.loaded import LoadedResult, read_results
from spdbench.output_files import try_lock, write_obstacle

LOG = "points.jsonl"
SALT = 16
"""Characters."""
TRIES = 3
"""On a cluster, for a point whose node was lost."""


class Outcome(NamedTuple):
    """How a point ended: its exit code, and what else is worth saying, such as the node that was lost."""

    point: Point
    exit_code: int
    note: str = ""


Try = tuple[Point, int, str]
"""A point that waits for its turn: which try it is, and what happened in the last one."""


def try_again(waiting: list[Try], point: Point, number: int, lost: str) -> Iterator[Outcome]:
    """Adds a point, whose try `number` was `lost`, to those that wait; yields its end where there are no more tries."""
    note = f"{lost}, try {number} of {TRIES}"
    if number < TRIES:
        waiting.append((point, number + 1, note))
    else:
        yield Outcome(point, 1, note)


def result_files(folder: Path, point: Point) -> list[Path]:
    """The result files of a point that are there, by label."""
    starts = [glob.escape(f"{point.suite}__{label}__") for label in point.labels]
    return [path for start in starts for path in sorted(folder.glob(f"{start}*__{glob.escape(point.name)}.json"))]


def point_results(folder: Path, point: Point) -> list[LoadedResult]:
    """A point's results; empty if one is missing or cannot be read."""
    files = result_files(folder, point)
    try:
        return read_results(files) if len(files) == len(point.labels) else []
    except InputError:
        return []


def _slow_hash(text: str, salt: str) -> str:
    """There are so few addresses that all could be tried, if a hash took no time."""
    return salt + hashlib.scrypt(text.encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=16).hex()


class SweepLog:
    """The lines of `points.jsonl`, and new ones."""

    def __init__(self, folder: Path, file: IO[str]) -> None:
        self._folder = folder
        self._file = file
        self._last: dict[str, dict[str, Any]] = {}
        self._salt = secrets.token_hex(8)
        self._hash_of = cache(_slow_hash)
        file.seek(0)
        for line in file:
            try:
                found = parse_json(line)
                self._last[found["name"]] = found
            except (ValueError, KeyError, TypeError):  # the last line of a sweep that was killed
                continue

    def is_done(self, point: Point) -> bool:
        found = self._last.get(point.name)
        if found is None or found.get("exit_code") != 0:
            return False
        if (servers := found.get("servers")) and servers != self._hash_of_servers(point, str(servers)):
            raise InputError(
                f"{self._folder}: the point {point.name} was measured with servers at other addresses, which its files "
                "do not hold; give another --results"
            )
        keys = [result.head.run_key for result in point_results(self._folder, point)]
        return bool(keys) and keys == found.get("run_keys")

    def _hash_of_servers(self, point: Point, salt: str) -> str | None:
        """What tells the addresses of a point's servers from others, with its salt in front; None without any."""
        addresses = "\0".join(word for word in point.words if ADDRESS.search(word))
        return self._hash_of(addresses, salt[:SALT]) if addresses else None

    def record(self, outcome: Outcome) -> None:
        point = outcome.point
        keys = [result.head.run_key for result in point_results(self._folder, point)]
        line = {
            "name": point.name,
            "exit_code": outcome.exit_code,
            "run_keys": keys,
            "words": [ADDRESS.sub("base_url=***", word) for word in point.words],
            "servers": self._hash_of_servers(point, self._salt),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._last[point.name] = line


@contextmanager
def open_log(folder: Path) -> Iterator[SweepLog]:
    """The log of the sweep in `folder`, which is made.

    Raises:
        InputError: the folder cannot be written, or another sweep works in it.
    """
    if (error := write_obstacle(folder)) is not None:
        raise InputError(f"--results {folder}: cannot be written ({error})")
    with (folder / LOG).open("a+", encoding="utf-8") as file:
        locked = try_lock(file)
        if locked is None:
            say(f"NOTE: {folder}: its file system has no locks; take care that no other sweep works there.")
        elif not locked:
            raise InputError(f"{folder}: another sweep works in this folder; wait for it, or give --results")
        yield SweepLog(folder, file)


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each point that failed."""
    return [
        f"{outcome.point.name}: exit code {outcome.exit_code}{'; ' + outcome.note if outcome.note else ''}"
        for outcome in outcomes
        if outcome.exit_code
    ]
