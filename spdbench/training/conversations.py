"""Reads conversations to train on: our own data files, and any JSONL or JSON array of chats or of ShareGPT rows.

A data file of ours begins with a header, an object with `schema`; all other lines are conversations. Published data
sets hold odd rows: empty ones, calls of tools, pictures. These are skipped and counted; a file that is damaged is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.chat_rows import THOUGHTS, OddRowError, messages_of
from spdbench.errors import InputError
from spdbench.input_files import json_rows, parse_json, read_input
from spdbench.types import Message

SCHEMA = "spdbench.data/1"
OUR_START = b'{"schema": "' + SCHEMA.encode()
"""How a data file begins that spdbench wrote."""
MAX_DATA_BYTES = 2**36


@dataclass(frozen=True)
class Conversations:
    """The conversations of one file, and the place of each, such as `line 3`. `header` is None if spdbench did not make
    the file; `sha256` is that of its bytes. `skipped` has a reason for each row that could not be used. Thoughts
    (`reasoning_content`) are not learned, since templates differ in which of them they show: `num_without_thoughts`
    counts the conversations that had some."""

    header: Mapping[str, Any] | None
    messages: list[tuple[Message, ...]]
    sha256: str
    places: list[str]
    skipped: list[str]
    num_without_thoughts: int = 0


def read_conversations(path: Path) -> Conversations:
    """All conversations in `path`, in order. In a file of ours, a last line that a kill cut short is skipped.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds no conversation (says why its first row is none).
    """
    raw = read_input(path, MAX_DATA_BYTES)
    header: Mapping[str, Any] | None = None
    whole = raw
    if raw.startswith(OUR_START):  # only our files are cut, and only behind the last newline
        whole = raw[: raw.rfind(b"\n") + 1] if _is_cut(raw.rpartition(b"\n")[2]) else raw
    found: list[tuple[Message, ...]] = []
    places: list[str] = []
    skipped: list[str] = []
    num_without_thoughts = 0
    for where, row in json_rows(whole, str(path), skipped):
        if row.get("schema") == SCHEMA:
            if not isinstance(row.get("model", {}), dict):
                raise InputError(f"{where}: model: must be an object with the id and sha256 of who made these answers")
            header = row if header is None else header
        elif str(row.get("schema")).startswith("spdbench."):  # others may call a column so
            raise InputError(f"{where}: schema {row['schema']!r:.60} is not known here. Known: {SCHEMA}.")
        else:
            try:
                messages = messages_of(row, where)
                found.append(tuple({key: message[key] for key in ("role", "content")} for message in messages))
                num_without_thoughts += any(THOUGHTS[0] in message for message in messages)
                places.append(where.removeprefix(f"{path} "))
            except OddRowError as error:
                skipped.append(str(error))
    if not found:
        raise InputError(skipped[0] if skipped else f"{path}: holds no conversation")
    return Conversations(header, found, hashlib.sha256(raw).hexdigest(), places, skipped, num_without_thoughts)


def skipped_note(option: str, reasons: Sequence[str], total: int) -> str:
    """A sentence about the rows, of `total`, that were skipped for `reasons`."""
    return f"NOTE: {option}: {len(reasons):,} of {total:,} conversations are skipped. The first: {reasons[0]}"


def _is_cut(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return True
    return False
