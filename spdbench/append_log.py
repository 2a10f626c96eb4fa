"""A file of lines that grows while a long run works, and from which a killed run continues.

The journal of a run, the data file of `distill` and the log of `train` are such files. A line is in the file whole or
not at all: a kill can only cut the last one, which is dropped when the file is read again. Appending costs the same at
line ten thousand as at line one, and an appended line is with the operating system when `append_line` returns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.output_files import FULL, replaced_file, try_lock


class AppendLog:
    """An open log, locked against other processes until `close`. Subclasses say what their lines hold."""

    name: ClassVar[str]
    elsewhere: ClassVar[str]
    """What to do where this file is being written by another process, or cannot be written."""
    resume_with: ClassVar[str]
    """What to run once a full disk has room again."""
    restart: ClassVar[str]
    """What to do with a file from which no run can continue."""

    def __init__(self, path: Path) -> None:
        """Opens the log at `path`, or a new, empty one.

        Raises:
            InputError: it cannot be written, or another process is writing it.
        """
        self.path = path
        try:
            # Unbuffered, so that a written line is with the operating system. Not truncated: it is not locked yet.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = cast(RawIOBase, os.fdopen(descriptor, "r+b", buffering=0))
        except OSError as error:
            raise self.write_error(path, error) from None
        try:
            locked = try_lock(descriptor)
            taken = locked is False or os.fstat(descriptor).st_ino != path.stat().st_ino
        except FileNotFoundError:
            taken = True  # as where the number differs, it was replaced between opening and locking
        except OSError as error:
            self._file.close()
            raise self.write_error(path, error) from None
        else:
            if locked is None:
                say(f"NOTE: {path}: its file system has no locks; take care that no other run writes it.")
        if taken:
            self._file.close()
            raise InputError(f"{path}: another run is writing this now; {self.elsewhere}")

    @classmethod
    def write_error(cls, path: Path, error: OSError) -> InputError:
        """The error to raise where `path` cannot be written."""
        if error.errno in FULL:
            text = f"{path}: the disk is full. What was finished is kept; make room, then run {cls.resume_with}."
            return InputError(text)
        return InputError(f"{path}: cannot be written ({error.strerror}); {cls.elsewhere}")

    @classmethod
    def replace_file(cls, path: Path, content: bytes) -> None:
        """Writes `content` to `path` in one piece: after a kill the file is the old one or the new one.

        Raises:
            InputError: the file cannot be written; it is as it was.
        """
        try:
            with replaced_file(path) as file:
                file.write(content)
        except OSError as error:
            raise cls.write_error(path, error) from None

    def append_line(self, line: bytes) -> int:
        """Adds a line that ends in a newline; returns its offset in bytes.

        Raises:
            InputError: the disk is full, or the file was deleted.
        """
        offset = self._file.seek(0, os.SEEK_END)
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise InputError(f"{self.path}: was deleted while the run was writing it")
        rest = memoryview(line)
        try:
            while rest:  # a disk that fills up takes part of a line first
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise self.write_error(self.path, error) from None
        return offset

    def read(self, parse: Callable[[int, int, bytes], None]) -> None:
        """Passes number (from 1), offset and bytes of each whole line to `parse`, then drops a last line that was cut.

        `parse` raises `ValueError`, `KeyError`, `TypeError` or `RecursionError` for a line that it cannot read.

        Raises:
            InputError: a line cannot be read; the file is as it was.
        """
        size = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    if b"\r" in line:  # which our lines do not hold, so it is not one that a kill cut
                        raise self._unreadable(number)
                    break
                try:
                    parse(number, size, line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise self._unreadable(number) from None
                size += len(line)
        if not size:
            raise self._unreadable(1)
        self.cut(size)

    def _unreadable(self, number: int) -> InputError:
        what = f"not the header of a {self.name}" if number == 1 else "damaged"
        return InputError(f"{self.path}: line {number} is {what}, so it cannot be resumed; {self.restart}")

    def cut(self, size: int) -> None:
        """Drops everything after the first `size` bytes."""
        self._file.truncate(size)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Returns when what was appended survives a crash of the machine."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """`KEY OLD, now NEW` of the first key whose values differ as JSON; empty where all are the same."""
    for key in sorted((old.keys() | new.keys()) - set(ignored)):
        before, now = (json.loads(json.dumps(settings.get(key))) for settings in (old, new))
        if before != now:
            return f"{key} {before}, now {now}"
    return ""


def require_same_settings(
    where: object, old: Mapping[str, Any], new: Mapping[str, Any], remedy: str, ignored: Collection[str] = ()
) -> None:
    """Raises `InputError` where the run that `where` belongs to had other settings; names the first that differs."""
    if difference := first_difference(old, new, ignored):
        raise InputError(f"{where}: was begun with other settings: {difference}. {remedy}")
