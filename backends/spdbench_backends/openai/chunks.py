"""A streamed answer as chunks, with their text and what they report of tokens; chat and plain completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spdbench.types import UNKNOWN_ID
from spdbench_backends.openai.client import MALFORMED, BrokenError, error_message

DATA, DONE = b"data:", b"[DONE]"
ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class Chunk:
    """One event of a stream.

    `text` is part of the answer, `thought` of the reasoning before it. `ids` are the chunk's tokens as the server lists
    them, `listed` those that it lists with log-probabilities, `UNKNOWN_ID` where they have no id there. The two numbers
    of tokens count from the start of the request.
    """

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] | None = None
    listed: tuple[int, ...] | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.thought)

    @property
    def has_content(self) -> bool:
        """False for a chunk that only keeps the connection alive."""
        return bool(self.has_text or self.ids or self.listed or self.finish) or self.completion_tokens is not None


def read_chunks(lines: Iterable[bytes], without_key: Callable[[str], str]) -> Iterator[Chunk]:
    """The events of a stream, to its end, with the server's texts passed through `without_key`.

    Raises:
        BrokenError: an event cannot be read or is an error, or the stream ends before the answer does.
    """
    finished = False
    for line in lines:
        if not line.startswith(DATA):
            continue
        data = line.removeprefix(DATA).strip()
        if data == DONE:
            return
        chunk = _chunk(data, without_key)
        finished = finished or chunk.finish is not None
        yield chunk
    if not finished:
        raise BrokenError("the server ended in the middle of its answer")


def _chunk(data: bytes, without_key: Callable[[str], str]) -> Chunk:
    try:
        event = json.loads(data)
        if event.get("error"):
            message = error_message(json.dumps(event), without_key)
            raise BrokenError(f"the server failed in the middle of its answer: {message}")
        usage = event.get("usage") or {}
        choices = event.get("choices") or [{}]
        return _chunk_of_choice(choices[0], usage, without_key)
    except MALFORMED:
        raise BrokenError("the server sent an event that is not a part of an answer") from None


def _chunk_of_choice(choice: Mapping[str, Any], usage: Mapping[str, Any], without_key: Callable[[str], str]) -> Chunk:
    delta = choice.get("delta") or {}
    ids, listed, finish = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
    return Chunk(
        text=without_key(str(choice.get("text") or delta.get("content") or "")),
        thought=str(delta.get("reasoning_content") or delta.get("reasoning") or ""),
        ids=None if ids is None else tuple(map(_number, ids)),
        listed=None if listed is None else _listed_tokens(listed),
        completion_tokens=_number_or_none(usage.get("completion_tokens")),
        prompt_tokens=_number_or_none(usage.get("prompt_tokens")),
        finish=without_key(str(finish)) if finish else None,
    )


def _number(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError("ids and counts must not be negative")
    return number


def _number_or_none(value: Any) -> int | None:
    return None if value is None else _number(value)


def _listed_tokens(logprobs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The tokens that have log-probabilities. vLLM writes `token_id:ID` for their text if it is asked to."""
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    if content is not None:
        tokens = [entry["token"] for entry in content]
    if tokens is None:
        return None
    return tuple(
        int(token.removeprefix(ID_PREFIX)) if str(token).startswith(ID_PREFIX) else UNKNOWN_ID for token in tokens
    )
