"""Reads conversations to train on: our own data files, and any JSONL of chats or of ShareGPT rows.

A data file of ours begins with a header, an object with `schema`; all other lines are conversations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.errors import InputError
from spdbench.types import Message, encodable

SCHEMA = "spdbench.data/1"
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles where they differ."""


@dataclass(frozen=True)
class Conversations:
    """The conversations of one file, and the line number of each. `header` is None if spdbench did not make the file;
    `sha256` is that of its bytes."""

    header: Mapping[str, Any] | None
    messages: list[tuple[Message, ...]]
    sha256: str
    lines: list[int]


def read_conversations(path: Path) -> Conversations:
    """All conversations in `path`, in order. In a file of ours, a last line that a kill cut short is skipped.

    Raises:
        InputError: the file cannot be read or holds no conversation, or a line is not one (names its number).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    header: Mapping[str, Any] | None = None
    found: list[tuple[Message, ...]] = []
    places: list[int] = []
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        cut = header is not None and number == len(lines)  # only the last one has no newline, and only ours are cut
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if cut:
                break
            raise InputError(f"{where}: not JSON; a line must hold one conversation") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be a JSON object with `messages` or `conversations`")
        if row.get("schema") == SCHEMA:
            if not isinstance(row.get("model", {}), dict):
                raise InputError(f"{where}: model: must be an object with the id and sha256 of who made these answers")
            header = row if header is None else header
        elif "schema" in row:
            raise InputError(f"{where}: schema {row['schema']!r} is not known here. Known: {SCHEMA}.")
        else:
            found.append(messages_of(row, where))
            places.append(number)
    if not found:
        raise InputError(f"{path}: holds no conversation")
    return Conversations(header, found, hashlib.sha256(raw).hexdigest(), places)


def messages_of(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The messages of one row, under `messages` or `conversations`.

    Raises:
        InputError: it is not a conversation; the message begins with `where`.
    """
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        raise InputError(f"{where}: has neither `messages` nor `conversations`")
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: {key}: must be a list of messages that is not empty")
    return tuple(_message(turn, f"{where}: {key}.{number}") for number, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: must be an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        allowed = ", ".join((*ROLES, *SHAREGPT_ROLES))
        raise InputError(f"{where}: role {role!r} is not known. Known: {allowed}.")
    if not isinstance(content, str):
        raise InputError(f"{where}: content must be text, not {type(content).__name__}")
    try:
        return {"role": role, "content": encodable(content)}
    except ValueError as error:
        raise InputError(f"{where}: content {error}") from None
