"""Prompts for `spdbench distill`: those to answer, those to keep out, and how much room they take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdbench.chat_rows import OddRowError, messages_of
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.input_files import json_rows, read_input
from spdbench.training.conversations import MAX_DATA_BYTES, SCHEMA, skipped_note
from spdbench.types import Message, encodable

if TYPE_CHECKING:
    from spdbench.prompts.chat import ChatFormat

TEMPLATE_TOKENS = 64
"""An upper bound of what a chat template adds to a turn."""


@dataclass(frozen=True)
class PromptConversation:
    """A conversation to answer: the messages before its first user turn, and the user's turns."""

    system: tuple[Message, ...]
    turns: tuple[str, ...]


def excluded(paths: tuple[Path, ...], data: Path | None) -> dict[str, tuple[str, ...]]:
    """User turns to keep out, by the suite or file that they are from."""
    from spdbench.prompts.suite import prompts_at_hand

    found = {
        name: tuple(turn for prompt in prompts for turn in prompt.turns)
        for name, prompts in prompts_at_hand(data).items()
    }
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if os.path.isdir(path) else [path]  # `Path.is_dir` raises for some names
        if not files:
            raise InputError(f"--exclude {path}: the folder holds no .jsonl file")
        for file in files:
            found[str(file)] = tuple(turn for one in read_conversations_to_answer(file) for turn in one.turns)
    return found


def read_conversations_to_answer(path: Path) -> list[PromptConversation]:
    """Conversations of a JSONL file, with EAGLE's and Spec-Bench's `turns` or with messages; answers are omitted.

    Odd rows are skipped, and counted on stderr.

    Raises:
        InputError: the file cannot be read, or holds no prompts.
    """
    found: list[PromptConversation] = []
    skipped: list[str] = []
    for where, row in json_rows(read_input(path, MAX_DATA_BYTES), str(path), skipped):
        if row.get("schema") == SCHEMA:
            continue
        try:
            found.append(_conversation(row, where))
        except OddRowError as error:
            skipped.append(str(error))
    if not found:
        raise InputError(skipped[0] if skipped else f"{path}: holds no prompts")
    if skipped:
        say(skipped_note(str(path), skipped, len(found) + len(skipped)))
    return found


def _conversation(row: Mapping[str, Any], where: str) -> PromptConversation:
    """One row's prompts. Raises `OddRowError` where it has none."""
    if "turns" not in row:
        messages = messages_of(row, where)
        users = tuple(message["content"] for message in messages if message["role"] == "user")
        if not users:
            raise OddRowError(f"{where}: has no message of a user")
        return PromptConversation(messages[:1] if messages[0]["role"] == "system" else (), users)
    turns = [row["turns"]] if isinstance(row["turns"], str) else row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise OddRowError(f"{where}: turns: must be a text or a list of texts")
    try:
        return PromptConversation((), tuple(map(encodable, turns)))
    except ValueError as error:
        raise OddRowError(f"{where}: turns: {error}") from None


def taken_by_template(chat: ChatFormat, prompts: list[PromptConversation]) -> list[PromptConversation]:
    """The conversations that the chat template takes; reports on stderr how many it does not.

    Raises:
        InputError: it takes none of them, or fails for a reason that is not the conversation's.
    """
    from spdbench.prompts.chat import ConversationRefusedError

    found, refused = [], []
    for number, one in enumerate(prompts, start=1):
        try:
            _num_tokens(chat, one)
        except ConversationRefusedError as error:
            refused.append(f"conversation {number}: {error}")
        except InputError as error:
            raise InputError(f"--prompts: conversation {number}: {error}") from None
        else:
            found.append(one)
    if not found:
        raise InputError(f"--prompts: {refused[0]}")
    if refused:
        say(skipped_note("--prompts", refused, len(prompts)))
    return found


def room_needed(chat: ChatFormat, prompts: list[PromptConversation] | None, max_new_tokens: int, context: int) -> int:
    """Tokens that the longest conversation may come to, within the model's `context`.

    Raises:
        InputError: not even one turn and its answer fit.
    """
    from spdbench.training.distill.seed_prompts import LONGEST_PROMPT
    from spdbench.training.distill.talk import MAX_USER_TOKENS

    if prompts is None:
        shortest = len(chat.encode([{"role": "user", "content": LONGEST_PROMPT}])) + MAX_USER_TOKENS + max_new_tokens
        longest = shortest + MAX_USER_TOKENS + max_new_tokens + TEMPLATE_TOKENS
    else:
        lengths = [_num_tokens(chat, one) for one in prompts]
        turns = [len(one.turns) * (max_new_tokens + TEMPLATE_TOKENS) for one in prompts]
        shortest = min(lengths) + max_new_tokens
        longest = max(length + more for length, more in zip(lengths, turns, strict=True))
    if shortest > context:
        raise InputError(
            f"--max-new-tokens {max_new_tokens}: a conversation takes {shortest:,} tokens with it, more than "
            f"the model's context of {context:,}"
        )
    return min(context, longest)


def _num_tokens(chat: ChatFormat, one: PromptConversation) -> int:
    """Tokens of all user turns, as if they were one."""
    return len(chat.encode([*one.system, {"role": "user", "content": "\n".join(one.turns)}]))
