"""Conversations in rows of data sets: lists of messages under the names that published files use.

Both prompts and data to train on come as such rows, in JSON and in tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from spdbench.errors import InputError
from spdbench.input_files import parse_json
from spdbench.types import Message, encodable

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
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of what a model thought before its answer. A `Message` has it under the first, which chat templates read."""
SYSTEM = ("system", "system_prompt")
ASKED, GIVEN = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERED = ("output", "response", "completion", "answer")
"""Keys of rows with one question and one answer, as Alpaca, Dolly and OpenOrca have them."""
TOOLS = ("tool", "tools", "function", "function_call", "function_response", "observation")
"""Roles in conversations with tools. Those are not read: chat templates differ too much in how they write them."""


class OddRowError(InputError):
    """A row that is no conversation, though the file that it is in is fine."""


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
    messages = [message_of(turn, f"{where}: {key}.{number}") for number, turn in enumerate(turns)]
    system = _first_text(row, SYSTEM)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, message_of({"role": "system", "content": system}, where))
    return tuple(messages)


def _question_and_answer(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    asked, given, answered = (_first_text(row, keys) for keys in (ASKED, GIVEN, ANSWERED))
    if not asked or not answered:
        raise OddRowError(f"{where}: has no `messages`, `conversations` or `turns`, and no `instruction` with `output`")
    question = f"{asked}\n\n{given}" if given.strip() else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]


def _first_text(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((row[key] for key in keys if isinstance(row.get(key), str)), "")


def message_of(turn: Any, where: str) -> Message:
    """One message, with `reasoning_content` where it has thoughts.

    Raises:
        OddRowError: it is none that a chat template takes; the message begins with `where`.
    """
    if not isinstance(turn, dict):
        raise OddRowError(f"{where}: must be an object with role and content")
    name, content = (next((turn[key] for key in keys if turn.get(key) is not None), None) for keys in (NAMES, CONTENTS))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if name in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise OddRowError(f"{where}: calls a tool or holds its answer; conversations with tools are not read")
    if role is None:
        raise OddRowError(f"{where}: role {name!r:.60} is not known. Known: {', '.join(ROLES)}.")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise OddRowError(f"{where}: content must be text, not {type(content).__name__}")
    thoughts = _first_text(turn, THOUGHTS)
    try:
        message = {"role": role, "content": encodable(content)}
        return {**message, THOUGHTS[0]: encodable(thoughts)} if thoughts.strip() else message
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
