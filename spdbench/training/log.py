"""`train.jsonl`: a line with the run's settings, one for each step and evaluation, and a last one at its end.

The log is cut back to where the checkpoint was made when a run is resumed. Every run begins it anew, and it gets its
last line only when the drafter is written. So a drafter that an earlier run left in the folder is never taken for that
of a later one, which may have been killed before it kept anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spdbench.append_log import AppendLog, require_same_settings
from spdbench.errors import InputError
from spdbench.input_files import MAX_BYTES, open_input, parse_json, read_input

NAME = "train.jsonl"
RESTART = "Run without --resume to begin anew."


class TrainingLog(AppendLog):
    """Appends lines to `path`, after its first `size` bytes; what follows them is dropped.

    Raises:
        InputError: the file is shorter than `size`, cannot be written, or another process is writing it.
    """

    name = "training log"
    elsewhere = "choose another --out"
    resume_with = "the same command with --resume"
    restart = "run without --resume"

    def __init__(self, path: Path, size: int = 0) -> None:
        if size and (not path.exists() or path.stat().st_size < size):
            raise InputError(f"--resume: {path} is gone or cut, and with it what the run has written so far. {RESTART}")
        super().__init__(path)
        self.cut(size)

    def write(self, line: Mapping[str, Any]) -> None:
        self.append_line(json.dumps(line).encode() + b"\n")


def is_finished(folder: Path, identity: Mapping[str, Any], layout: str) -> bool:
    """True if the run of these settings ended in `folder`, which has no checkpoint, with files in this layout.

    Raises:
        InputError: what is there belongs to a run with other settings, or to none.
    """
    path, drafter = folder / NAME, folder / "config.json"
    if not path.exists():
        if drafter.exists():
            raise InputError(
                f"--resume: {folder} holds a model or a drafter, but no {NAME} of a run that could be resumed; "
                "choose another --out"
            )
        return False
    lines = read_input(path).rstrip(b"\n").split(b"\n")
    first, last = _object(lines[0]), _object(lines[-1])
    if not first:  # killed before it could write anything
        return False
    require_same_settings(f"--resume: {path}", first, identity, RESTART)
    if not last.get("finished") or not drafter.exists():
        return False
    require_same_settings(f"--resume: {path}", {"format": last.get("format")}, {"format": layout}, RESTART)
    return True


def first_line(folder: Path) -> Mapping[str, Any]:
    """The settings of the run whose log is in `folder`; empty where there is none that can be read."""
    try:
        with open_input(folder / NAME) as file:
            return _object(file.readline(MAX_BYTES))
    except InputError:
        return {}


def mark_finished(folder: Path, layout: str) -> None:
    """Adds the line that says that the run's drafter has been written."""
    path = folder / NAME
    with TrainingLog(path, path.stat().st_size) as log:
        log.write({"finished": True, "format": layout})
        log.sync()


def _object(line: bytes) -> Mapping[str, Any]:
    """The JSON object in a line; empty where a kill cut it."""
    try:
        found = parse_json(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
