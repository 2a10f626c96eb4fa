"""`train.jsonl`: a line for the run, each step and each evaluation. Can be cut back to where a checkpoint was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdbench.errors import InputError

NAME = "train.jsonl"


class TrainingLog:
    """Appends lines to `path`; what lies behind byte `size` is dropped first.

    Raises:
        InputError: the file does not reach to `size`.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        if size and (not path.exists() or path.stat().st_size < size):
            raise InputError(
                f"--resume: {path} is gone or cut, and with it what the run has written so far. "
                "Run without --resume to begin anew."
            )
        self._file = path.open("r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)

    @property
    def size(self) -> int:
        """Bytes so far, on their way to disk."""
        return self._file.tell()

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """What is written survives a crash of the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def ends(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The first line of a log and its last; one that is not there, or no object, is empty."""
    lines = path.read_bytes().splitlines() or [b""]
    return _object(lines[0]), _object(lines[-1])


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # a kill may have cut it
        return {}
    return found if isinstance(found, dict) else {}
