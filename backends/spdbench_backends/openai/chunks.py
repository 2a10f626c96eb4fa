"""A streamed answer as chunks: what each of them says and tells of its tokens. Both of OpenAI's protocols.

Must not know connections, nor how tokens are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spdbench.types import UNKNOWN_ID
from spdbench_backends.openai.client import MALFORMED, BrokenError, words_of

DATA, DONE = b"data:", b"[DONE]"
ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class Chunk:
    """One event. `text` is part of the answer and `thought` of what comes before it; `ids` and `listed` are its tokens
    by id and by log-probability, `UNKNOWN_ID` where the latter come without; the numbers count from the start."""

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] | None = None
    listed: tuple[int, ...] | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    finish: str | None = None

    @property
    def says(self) -> bool:
        return bool(self.text or self.thought)

    @property
    def tells(self) -> bool:
        """False for a mere sign of life."""
        return bool(self.says or self.ids or self.listed or self.finish) or self.completion_tokens is not None


def read_chunks(lines: Iterable[bytes], harmless: Callable[[str], str]) -> Iterator[Chunk]:
    """The events of a stream, to its end, with texts made `harmless`.

    Raises:
        BrokenError: an event cannot be read or is an error, or the stream ends without having come to an end.
    """
    finished = False
    for line in lines:
        if not line.startswith(DATA):
            continue
        data = line.removeprefix(DATA).strip()
        if data == DONE:
            return
        chunk = _chunk(data, harmless)
        finished = finished or chunk.finish is not None
        yield chunk
    if not finished:
        raise BrokenError("the server ended in the middle of its answer")


def _chunk(data: bytes, harmless: Callable[[str], str]) -> Chunk:
    try:
        event = json.loads(data)
        if event.get("error"):
            raise BrokenError(f"the server failed in the middle of its answer: {words_of(json.dumps(event), harmless)}")
        usage = event.get("usage") or {}
        choices = event.get("choices") or [{}]
        return _from(choices[0], usage, harmless)
    except MALFORMED:
        raise BrokenError("the server sent an event that is not a part of an answer") from None


def _from(choice: Mapping[str, Any], usage: Mapping[str, Any], harmless: Callable[[str], str]) -> Chunk:
    delta = choice.get("delta") or {}
    ids, listed, finish = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
    return Chunk(
        text=harmless(str(choice.get("text") or delta.get("content") or "")),
        thought=str(delta.get("reasoning_content") or delta.get("reasoning") or ""),
        ids=None if ids is None else tuple(map(_number, ids)),
        listed=None if listed is None else _listed(listed),
        completion_tokens=_number_or_none(usage.get("completion_tokens")),
        prompt_tokens=_number_or_none(usage.get("prompt_tokens")),
        finish=harmless(str(finish)) if finish else None,
    )


def _number(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError("neither ids nor counts are negative")
    return number


def _number_or_none(value: Any) -> int | None:
    return None if value is None else _number(value)


def _listed(logprobs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """A token each, by id where the server writes ids in their place, as vLLM does if it is asked to."""
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    if content is not None:
        tokens = [entry["token"] for entry in content]
    if tokens is None:
        return None
    return tuple(
        int(token.removeprefix(ID_PREFIX)) if str(token).startswith(ID_PREFIX) else UNKNOWN_ID for token in tokens
    )
