"""A streamed answer as chunks, with their text and what they report of tokens; chat and plain completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spdbench.types import UNKNOWN_ID, FinishReason
from spdbench_backends.openai.client import MALFORMED, BrokenError, error_message
from spdbench_backends.openai.response_drafts import DraftReport, find_report

BOM = b"\xef\xbb\xbf"
DATA, EVENT, DONE = b"data:", b"event:", b"[DONE]"
ID_PREFIX = "token_id:"
MAX_COUNT, MAX_SECONDS = 2**31, 1e9
FINISHES: Mapping[str, FinishReason] = {
    "stop": "eos",
    "length": "length",
    "eos_token": "eos",  # this and the next are TGI's
    "stop_sequence": "eos",
    "eos": "eos",
    "end_turn": "eos",
    "max_tokens": "length",
    "model_length": "length",
}
"""What servers call the end of an answer, in lower case."""
BROKEN_OFF = frozenset(
    [
        "error",
        "content_filter",
        "abort",
        "cancelled",
        "timeout",
        "insufficient_system_resource",
        "safety",
        "recitation",
        "prohibited_content",
        "blocklist",
        "spii",
        "tool_calls",
        "function_call",
    ]
)
"""Ends that are none of the answer that was asked for: breaks, filters, and calls of tools, of which no text comes."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
NOT_FINISHED = frozenset({"", "null", "none", "not_finished"})
"""Finish reasons that say that there is none yet."""


@dataclass(frozen=True)
class Chunk:
    """One event of a stream.

    `text` is part of the answer, `thought` of the reasoning before it. `ids` are the chunk's tokens as the server lists
    them, `listed` those that it lists with log-probabilities, `UNKNOWN_ID` where they have no id there. The two numbers
    of tokens count from the start of the request, `thought_tokens` those of thoughts; `cached_tokens` are those of the
    prompt that a cache answered; `predicted_tokens` are llama.cpp's count while the answer comes, which may go beyond
    its end. `decode_s` is the server's own time for the tokens so far, `drafts` what it reports of
    its drafts. `finish` is the server's word for why the answer ended, in lower case.
    """

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] | None = None
    listed: tuple[int, ...] | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    thought_tokens: int = 0
    cached_tokens: int | None = None
    predicted_tokens: int | None = None
    decode_s: float | None = None
    drafts: DraftReport | None = None
    finish: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.thought)

    @property
    def has_content(self) -> bool:
        """False for a chunk that only keeps the connection alive."""
        return bool(self.has_text or self.ids or self.listed or self.finish) or self.completion_tokens is not None


def read_chunks(lines: Iterable[bytes], without_key: Callable[[str], str]) -> Iterator[Chunk]:
    """The events of a stream, to its end, with the server's reasons passed through `without_key`.

    An answer ends with `[DONE]` or with a chunk that has a finish reason. Some servers have a word in that place from
    the first chunk on, so an unknown word is no reason once text has followed it.

    Raises:
        BrokenError: an event cannot be read or is an error, or the stream ends before the answer does.
    """
    is_error, word, not_ends = False, "", set[str]()
    for number, line in enumerate(lines):
        line = line.removeprefix(BOM) if number == 0 else line
        if not line or line.startswith(EVENT):
            is_error = line.removeprefix(EVENT).strip() == b"error"
        data = line.removeprefix(DATA).strip()
        if not line.startswith(DATA) or not data or data.startswith(b":"):  # a comment is not always sent as one
            continue
        if data == DONE:
            return
        chunk = _chunk(data, is_error, without_key)
        if chunk.has_text and word:
            not_ends |= {word} - FINISHES.keys()
            word = ""
        if chunk.finish in not_ends:
            chunk = replace(chunk, finish=None)
        word = chunk.finish or word
        yield chunk
    if not word:
        raise BrokenError("the server ended in the middle of its answer")


def _chunk(data: bytes, is_error: bool, without_key: Callable[[str], str]) -> Chunk:
    """One event; `is_error` if the server calls it an error."""
    text = data.decode(errors="replace")
    try:
        event = {} if is_error else json.loads(text)
        # Of several answers, the first one's alone is timed.
        choice: Any = next((choice for choice in event.get("choices") or () if not choice.get("index")), {})
        bare = "choices" not in event and isinstance(event.get("message") or event.get("detail"), str)
        is_error = is_error or bare or "error" in (event.get("object"), event.get("type"))
        if not (is_error or event.get("error") or choice.get("error")):
            chunk = _chunk_of_choice(choice, event.get("usage") or choice.get("usage") or {}, without_key)
            return _with_timings(replace(chunk, drafts=find_report(event, choice)), event.get("timings"))
    except MALFORMED:
        raise BrokenError("the server sent an event that is not a part of an answer") from None
    message = error_message(json.dumps(choice) if choice.get("error") else text, without_key)
    raise BrokenError(f"the server failed in the middle of its answer: {message}")


def _chunk_of_choice(choice: Mapping[str, Any], usage: Mapping[str, Any], without_key: Callable[[str], str]) -> Chunk:
    delta = choice.get("delta", choice.get("message")) or {}
    ids, listed, finish = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
    word = without_key(str(finish or "")).lower()
    content = choice.get("text") or delta.get("content") or delta.get("refusal")
    thoughts = (next(filter(None, map(delta.get, THOUGHT_KEYS)), None), _text(content, "thinking"))
    details, of_prompt = usage.get("completion_tokens_details") or {}, usage.get("prompt_tokens_details")
    return Chunk(
        text=_text(content, "text"),
        thought="".join(str(thought) for thought in thoughts if thought),
        ids=None if ids is None else tuple(map(_number, ids)),
        listed=None if listed is None else _listed_tokens(listed),
        completion_tokens=_number_or_none(usage.get("completion_tokens")),
        prompt_tokens=_number_or_none(usage.get("prompt_tokens")),
        thought_tokens=_number_or_none(details.get("reasoning_tokens")) or 0,
        cached_tokens=_count_or_none(of_prompt.get("cached_tokens")) if isinstance(of_prompt, Mapping) else None,
        finish=None if word in NOT_FINISHED else word,
    )


def _with_timings(chunk: Chunk, timings: Any) -> Chunk:
    """`chunk` with what llama.cpp's `timings` add to its usage."""
    if not isinstance(timings, Mapping):
        return chunk
    milliseconds, cached = timings.get("predicted_ms"), timings.get("cache_n")
    seconds = milliseconds / 1000 if isinstance(milliseconds, int | float) else -1.0
    return replace(
        chunk,
        predicted_tokens=_count_or_none(timings.get("predicted_n")),
        decode_s=seconds if 0 <= seconds < MAX_SECONDS else None,
        cached_tokens=_count_or_none(cached) if chunk.cached_tokens is None else chunk.cached_tokens,
    )


def _count_or_none(value: Any) -> int | None:
    """A count that nothing depends on: another shape is as good as none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT else None


def _text(content: Any, kind: str) -> str:
    """The parts of this kind, `text` or `thinking`, of a content that is text, or a list of parts."""
    if isinstance(content, list):
        return "".join(_text(part.get(kind), "text") for part in content)
    return str(content or "") if kind == "text" else ""


def _number(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool):
        raise ValueError("true and false are no counts")
    if number < 0:
        raise ValueError("ids and counts must not be negative")
    return number


def _number_or_none(value: Any) -> int | None:
    return None if value is None else _number(value)


def _listed_tokens(logprobs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The tokens that have log-probabilities. vLLM writes `token_id:ID` for their text if it is asked to, llama.cpp
    adds the id."""
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    if content is not None:
        tokens = [
            entry["token"] if _count_or_none(entry.get("id")) is None else f"{ID_PREFIX}{entry['id']}"
            for entry in content
        ]
    if tokens is None:
        return None
    return tuple(
        int(token.removeprefix(ID_PREFIX)) if str(token).startswith(ID_PREFIX) else UNKNOWN_ID for token in tokens
    )
