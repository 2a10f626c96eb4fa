"""`train.jsonl`: a line for the run, each step and each evaluation. Can be cut back to where a checkpoint was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrainingLog:
    """Appends lines to `path`; what lies behind byte `size` is dropped first."""

    def __init__(self, path: Path, size: int = 0) -> None:
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
