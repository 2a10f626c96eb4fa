"""Reads conversations to train on: our own data files, and any JSONL or JSON array of chats or of ShareGPT rows.

A data file of ours begins with a header, an object with `schema`; all other lines are conversations. Published data
sets hold odd rows: empty ones, calls of tools, pictures. These are skipped and counted; a file that is damaged is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.errors import InputError
from spdbench.input_files import json_rows, parse_json, read_input
from spdbench.types import Message, encodable

SCHEMA = "spdbench.data/1"
OUR_START = b'{"schema": "' + SCHEMA.encode()
"""How a data file begins that spdbench wrote."""
MAX_DATA_BYTES = 2**36
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
}
"""The names that data sets give to roles, in lower case, and the roles of chat templates that they mean."""
CONVERSATIONS = ("messages", "conversations", "conversation", "items")
NAMES, CONTENTS = ("role", "from", "speaker"), ("content", "value", "text", "message")
SYSTEM = ("system", "system_prompt")
ASKED, GIVEN = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERED = ("output", "response", "completion", "answer")
"""Keys of rows with one question and one answer, as Alpaca, Dolly and OpenOrca have them."""
TOOLS = ("tool", "tools", "function", "function_call", "function_response", "observation")
"""Roles in conversations with tools. Those are not learned: chat templates differ too much in how they write them."""


@dataclass(frozen=True)
class Conversations:
    """The conversations of one file, and the place of each, such as `line 3`. `header` is None if spdbench did not make
    the file; `sha256` is that of its bytes. `skipped` has a reason for each row that could not be used."""

    header: Mapping[str, Any] | None
    messages: list[tuple[Message, ...]]
    sha256: str
    places: list[str]
    skipped: list[str]


class OddRowError(InputError):
    """A row of a data file that is no conversation to learn from, though the file is fine."""


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
    for where, row in json_rows(whole, str(path), skipped):
        if row.get("schema") == SCHEMA:
            if not isinstance(row.get("model", {}), dict):
                raise InputError(f"{where}: model: must be an object with the id and sha256 of who made these answers")
            header = row if header is None else header
        elif str(row.get("schema")).startswith("spdbench."):  # others may call a column so
            raise InputError(f"{where}: schema {row['schema']!r:.60} is not known here. Known: {SCHEMA}.")
        else:
            try:
                found.append(messages_of(row, where))
                places.append(where.removeprefix(f"{path} "))
            except OddRowError as error:
                skipped.append(str(error))
    if not found:
        raise InputError(skipped[0] if skipped else f"{path}: holds no conversation")
    return Conversations(header, found, hashlib.sha256(raw).hexdigest(), places, skipped)


def skipped_note(option: str, reasons: Sequence[str], total: int) -> str:
    """A sentence about the rows, of `total`, that were skipped for `reasons`."""
    return f"NOTE: {option}: {len(reasons):,} of {total:,} conversations are skipped. The first: {reasons[0]}"


def _is_cut(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return True
    return False


def messages_of(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The messages of one row: a list of them, or one question and its answer. A system prompt of the row's own comes
    first.

    Raises:
        OddRowError: it is not a conversation; the message begins with `where`.
    """
    key = next((key for key in CONVERSATIONS if row.get(key) is not None), None)
    if key is None:
        key = "row"
    turns: Any = _question_and_answer(row, where) if key == "row" else row[key]
    if isinstance(turns, str):  # as tables without nested types keep them
        with suppress(ValueError):
            turns = parse_json(turns)
    if not isinstance(turns, list) or not turns:
        raise OddRowError(f"{where}: {key}: must be a list of messages that is not empty")
    messages = [_message(turn, f"{where}: {key}.{number}") for number, turn in enumerate(turns)]
    system = _first_text(row, SYSTEM)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": system}, where))
    return tuple(messages)


def _question_and_answer(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    asked, given, answered = (_first_text(row, keys) for keys in (ASKED, GIVEN, ANSWERED))
    if not asked or not answered:
        raise OddRowError(f"{where}: has no `messages`, `conversations` or `turns`, and no `instruction` with `output`")
    question = f"{asked}\n\n{given}" if given.strip() else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]


def _first_text(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((row[key] for key in keys if isinstance(row.get(key), str)), "")


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise OddRowError(f"{where}: must be an object with role and content")
    name, content = (next((turn[key] for key in keys if turn.get(key) is not None), None) for keys in (NAMES, CONTENTS))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if name in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise OddRowError(f"{where}: calls a tool or holds its answer; conversations with tools are not learned")
    if role is None:
        raise OddRowError(f"{where}: role {name!r:.60} is not known. Known: {', '.join(ROLES)}.")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise OddRowError(f"{where}: content must be text, not {type(content).__name__}")
    try:
        return {"role": role, "content": encodable(content)}
    except ValueError as error:
        raise OddRowError(f"{where}: content {error}") from None


def _joined(parts: list[Any], where: str) -> str:
    """The text of a message whose content is a list of parts."""
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise OddRowError(f"{where}: content must be text, and a part of it is {kind!r:.60}")
        texts.append(text)
    return "".join(texts)
