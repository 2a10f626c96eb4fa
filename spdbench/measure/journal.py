"""The journal of one label's run: a header that says what is measured, then a line for every finished request.

Appending costs the same at line ten thousand as at line one. A line is whole or it is not there: a kill can only cut
the last one, and that request had not finished. Must not know what the lines mean to anyone.

    {"journal": "spdbench.journal/1", "created": ..., "identity": {...}}
    {"run": {...}}                                 one finished request
    {"outcome": ["prompt", turn, repeat, "tie"]}   how it compared with vanilla's
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import IO, Any, Literal, Self, cast, get_args

from pydantic import ValidationError

from spdbench.errors import FULL, InputError, SpdbenchError
from spdbench.judge.result import Run

MAGIC = "spdbench.journal/1"
RUN_START = b'{"run":'
RunKey = tuple[str, int, int]
Outcome = Literal["identical", "tie", "near_tie", "real", "unclassified"]


class ResultsFolderError(InputError):
    """The results folder cannot be written: permission, a full disk."""


class Journal:
    """An open journal, closed by `with`. Keeps where each line lies, never the lines."""

    def __init__(self, path: Path, file: RawIOBase, created: str, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.created = created
        self.identity = identity
        self.outcomes: dict[RunKey, Outcome] = {}
        self.offsets: dict[RunKey, int] = {}
        self._file = file
        self._reader = path.open("rb")

    def __contains__(self, key: RunKey) -> bool:
        return key in self.offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def append(self, run: Run) -> None:
        """Adds a finished request and hands it to the operating system before returning."""
        self.append_json(run.key, _json(run.model_dump(mode="json")))

    def append_json(self, key: RunKey, run: bytes) -> None:
        """`append` for a run that is JSON already, with this `key` in it."""
        self.offsets[key] = self._write(RUN_START + run + b"}\n")

    def add_outcome(self, key: RunKey, outcome: Outcome) -> None:
        self._write(_json({"outcome": [*key, outcome]}) + b"\n")
        self.outcomes[key] = outcome

    def run(self, key: RunKey) -> Run:
        """One run, read back from disk."""
        return Run.model_validate_json(_run_json(self._line(self.offsets[key])))

    def lines(self) -> Iterator[bytes]:
        """Every run as the JSON it was written in, in order of writing; constant memory."""
        for offset in self.offsets.values():
            yield _run_json(self._line(offset))

    def runs(self) -> Iterator[Run]:
        for line in self.lines():
            yield Run.model_validate_json(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._file.close()

    def remove(self) -> None:
        """Deletes the file, when all of it stands in a result."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _write(self, text: bytes) -> int:
        offset = self._file.seek(0, os.SEEK_END)
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise ResultsFolderError(f"{self.path}: was deleted while the run was writing it")
        line = memoryview(text)
        try:
            while line:  # a disk that fills up takes part of a line first
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise write_error(self.path, error) from None
        return offset

    def _line(self, offset: int) -> bytes:
        self._reader.seek(offset)
        return self._reader.readline()


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _run_json(line: bytes) -> bytes:
    """The run inside a line as `append` writes it; anything else is not JSON afterwards."""
    return line.removeprefix(RUN_START).removesuffix(b"}\n")


def write_error(path: Path, error: OSError) -> SpdbenchError:
    """What to tell a user whose results cannot be written."""
    if error.errno in FULL:
        return ResultsFolderError(
            f"{path}: the disk is full. What was finished is kept; make room and run again with --resume."
        )
    return ResultsFolderError(f"{path}: cannot be written ({error.strerror}); choose another folder with --results DIR")


def create_journal(path: Path, created: str, identity: Mapping[str, Any]) -> Journal:
    """A new journal; the header is there whole or not at all. One left by an unfinished run is set aside as `.old`.

    Its lock goes with the file, so two runs can never write to one.

    Raises:
        InputError: the folder cannot be written, or another run is writing this journal now.
    """
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            with path.open("rb") as existing:
                _lock(existing, path)
            path.replace(path.with_name(path.name + ".old"))
        header = json.dumps({"journal": MAGIC, "created": created, "identity": identity})
        part.write_text(header + "\n", encoding="utf-8")
        part.replace(path)
        file = _open(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise write_error(path, error) from None
    _lock(file, path)
    return Journal(path, file, created, identity)


def resume_journal(path: Path, identity: Mapping[str, Any]) -> Journal:
    """The journal in `path`, ready for more; a last line that a kill cut short is dropped.

    Raises:
        InputError: it is damaged, measures something other than `identity`, or another run is writing it.
    """
    try:
        file = _open(path)
    except OSError as error:
        raise write_error(path, error) from None
    try:
        _lock(file, path)
        with path.open("rb") as lines:
            header = _read_header(path, lines.readline())
            _check_identity(path, header["identity"], identity)
            offsets, outcomes, whole = _read_lines(path, lines)
        file.truncate(whole)
    except BaseException:
        file.close()
        raise
    journal = Journal(path, file, header["created"], header["identity"])
    journal.offsets.update(offsets)
    journal.outcomes.update(outcomes)
    return journal


def _open(path: Path) -> RawIOBase:
    """For appending, unbuffered: what was written is with the operating system."""
    return cast(RawIOBase, path.open("r+b", buffering=0))


def _read_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        if header["journal"] != MAGIC:
            raise ValueError
        return {"created": str(header["created"]), "identity": dict(header["identity"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path}: line 1 is not a journal's header; it cannot be resumed. Run without --resume."
        ) from None


def _read_lines(path: Path, lines: IO[bytes]) -> tuple[dict[RunKey, int], dict[RunKey, Outcome], int]:
    """Where each run lies, the outcomes, and the length in bytes of all whole lines."""
    offsets: dict[RunKey, int] = {}
    outcomes: dict[RunKey, Outcome] = {}
    offset = lines.tell()
    for number, line in enumerate(lines, start=2):
        if not line.endswith(b"\n"):  # cut by a kill while it was written
            break
        try:
            if line.startswith(RUN_START):
                offsets[Run.model_validate_json(_run_json(line)).key] = offset
            else:
                prompt, turn, repeat, outcome = json.loads(line)["outcome"]
                if outcome not in get_args(Outcome):
                    raise ValueError
                outcomes[(prompt, turn, repeat)] = outcome
        except (ValueError, KeyError, TypeError, ValidationError):
            raise InputError(
                f"{path}: line {number} is damaged, so it cannot be resumed. Run without --resume."
            ) from None
        offset += len(line)
    return offsets, outcomes, offset


def _check_identity(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != json.loads(json.dumps(new.get(key))):
            raise InputError(
                f"--resume: {key} is {json.dumps(new.get(key))}, "
                f"but {path.name} was begun with {json.dumps(old.get(key))}. "
                "Resume with the same suite, model, decoding and options, or run without --resume."
            )


def _lock(file: IO[bytes] | RawIOBase, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # it was replaced between opening and locking
            raise OSError
    except OSError:
        raise InputError(
            f"{path}: another run is writing this now; give this one a --name or other --results"
        ) from None
