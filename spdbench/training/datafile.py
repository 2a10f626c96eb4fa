"""A data file while it grows: a header that says how it is made, then a line for each conversation kept.

A line is whole or it is not there: a kill can only cut the last one, which is dropped when the file is opened again.
Beside it lies `FILE.summary.json` with counts of what was dropped or cut short, and why. Must not know how
conversations are made.

    {"schema": "spdbench.data/1", "created": ..., "model": {...}, "seed": 0, "tokens": 500000, ...}
    {"messages": [...], "sampling": {"index": 0, ...}, "num_tokens": 214}
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any, Self, cast

from spdbench.errors import FULL, InputError
from spdbench.training.conversations import SCHEMA, messages_of
from spdbench.training.distill.talk import Dropped, Kept
from spdbench.types import Message

SUMMARY_SCHEMA = "spdbench.data-summary/1"
FREE_TO_CHANGE = ("created", "tokens", "spdbench", "batch")
"""What may differ in the header when a file is gone on with: the file may grow, on another version."""


class DataFile:
    """An open data file, closed by `with`; another process cannot open it meanwhile."""

    def __init__(self, path: Path, file: RawIOBase, header: Mapping[str, Any], kept: list[Kept]) -> None:
        self.path = path
        self.header = header
        self.found = kept
        """The conversations that were there when the file was opened."""
        self.num_conversations = len(kept)
        self.num_tokens = sum(one.num_tokens for one in kept)
        self.dropped, self.num_written, self.seconds = (
            _read_summary(summary_path(path)) if kept else (Counter(), 0, 0.0)
        )
        self.cut_short = Counter(one.cut_short for one in kept if one.cut_short is not None)
        """Conversations that were kept up to a turn that was not, by the reason."""
        self._file = file

    def add(self, outcome: Kept | Dropped) -> None:
        """Counts the outcome; a kept one is with the operating system when this returns."""
        if isinstance(outcome, Dropped):
            self.dropped[outcome.reason] += 1
            return
        line = {"messages": outcome.messages, "sampling": outcome.sampling, "num_tokens": outcome.num_tokens}
        _write(self._file, self.path, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.num_conversations += 1
        self.num_tokens += outcome.num_tokens
        if outcome.cut_short is not None:
            self.cut_short[outcome.cut_short] += 1

    def write_summary(self, *, complete: bool) -> None:
        """The counts so far as `FILE.summary.json`, there whole or as they were before."""
        path = summary_path(self.path)
        summary = {
            "schema": SUMMARY_SCHEMA,
            "complete": complete,
            "conversations": self.num_conversations,
            "tokens": self.num_tokens,
            "dropped": dict(self.dropped.most_common()),
            "num_dropped": self.dropped.total(),
            "cut_short": dict(self.cut_short.most_common()),
            "generated_tokens": self.num_written,
            "seconds": round(self.seconds, 1),
        }
        _replace(path, json.dumps(summary, indent=2).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def summary_path(path: Path) -> Path:
    return path.with_name(path.name + ".summary.json")


def open_data(path: Path, header: Mapping[str, Any]) -> DataFile:
    """A new file at `path`, or the one that is there, to go on with; a last line that a kill cut short is dropped.

    Raises:
        InputError: the file is not ours, was made in another way or is damaged, cannot be written, or is being written.
    """
    header = {"schema": SCHEMA, **header}
    try:
        if not path.exists() or _is_cut_header(path):
            _replace(path, _line(header))
        file = cast(RawIOBase, path.open("r+b", buffering=0))
    except OSError as error:
        raise _write_error(path, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{path}: another process is writing this now; choose another --out") from None
    try:
        raw = path.read_bytes()
        old, kept, whole = _parse(path, raw)
        _check_header(path, old, header)
        file.truncate(whole)
        if old["tokens"] != header["tokens"]:
            first = raw.index(b"\n") + 1
            _replace(path, _line({**old, "tokens": header["tokens"]}) + raw[first:whole])
            file.close()
            return open_data(path, {**old, "tokens": header["tokens"]})
        file.seek(0, os.SEEK_END)
    except BaseException:
        file.close()
        raise
    return DataFile(path, file, old, kept)


def _is_cut_header(path: Path) -> bool:
    """True for an empty file, and for the beginning of a header of ours."""
    start = b'{"schema": "' + SCHEMA.encode()
    raw = path.read_bytes()
    return b"\n" not in raw and (raw.startswith(start) or start.startswith(raw))


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], list[Kept], int]:
    """Header, conversations, and the length in bytes of all whole lines."""
    kept: list[Kept] = []
    header: dict[str, Any] = {}
    whole = 0
    for number, line in enumerate(raw.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
            if number == 1:
                if row["schema"] != SCHEMA or "tokens" not in row:
                    raise ValueError
                header = row
            else:
                kept.append(_kept(row, where))
        except (ValueError, KeyError, TypeError, RecursionError):
            what = "is not the header of a data file" if number == 1 else "is damaged"
            raise InputError(f"{where}: {what}, so the file cannot be gone on with; choose another --out") from None
        whole += len(line)
    if not header:
        raise InputError(f"{path}: is there but no data file, and is left as it is; choose another --out")
    return header, kept, whole


def _kept(row: Mapping[str, Any], where: str) -> Kept:
    messages: tuple[Message, ...] = messages_of(row, where)
    return Kept(int(row["sampling"]["index"]), messages, dict(row["sampling"]), int(row["num_tokens"]))


def _check_header(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted((old.keys() | new.keys()) - set(FREE_TO_CHANGE)):
        if old.get(key) != json.loads(json.dumps(new.get(key))):
            raise InputError(
                f"{path}: was begun with {key} {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}. "
                "Go on with the same settings, or choose another --out."
            )


def _read_summary(path: Path) -> tuple[Counter[str], int, float]:
    """What was dropped, written and spent before; nothing where that is not known any more."""
    try:
        row = json.loads(path.read_bytes())
        return (
            Counter({str(k): int(v) for k, v in row["dropped"].items()}),
            int(row["generated_tokens"]),
            row["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Counter(), 0, 0.0


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _write_error(path, error) from None


def _write(file: RawIOBase, path: Path, content: bytes) -> None:
    rest = memoryview(content)
    try:
        while rest:  # a disk that fills up takes part of a line first
            rest = rest[file.write(rest) or 0 :]
    except OSError as error:
        raise _write_error(path, error) from None


def _write_error(path: Path, error: OSError) -> InputError:
    if error.errno in FULL:
        return InputError(
            f"{path}: the disk is full. What was finished is kept; make room, then the same command again."
        )
    return InputError(f"{path}: cannot be written ({error.strerror}); choose another --out")
