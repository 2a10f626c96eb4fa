"""A streamed answer as chunks, with their text and what they report of tokens; chat and plain completions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spdbench.types import UNKNOWN_ID, FinishReason
from spdbench_backends.openai.client import (
    MALFORMED,
    BrokenError,
    RefusedError,
    SilentError,
    error_message,
    one_line,
)
from spdbench_backends.openai.events import UNREADABLE, is_done, parse, read_events
from spdbench_backends.openai.response_drafts import DraftReport, find_report

ERROR = b"error"
WORDS = re.compile(r"(\[[\w\s]+\])?[\w\s.,:;!?/+-]*")
OF_ANSWERS = frozenset({"choices", "usage", "error", "detail"})
FIRST = (None, 0, "0")
"""The index of the first answer, if there are several."""
OK = 200
Notice = Callable[[str, str], None]
"""Says something odd of a server once, with an example, which may be empty."""
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
    its drafts. `finish` is the server's word for why the answer ended, in lower case; `ends_answer` is true from the
    chunk on with which the answer is whole.
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
    ends_answer: bool = False

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.thought)

    @property
    def has_content(self) -> bool:
        """False for a chunk that only keeps the connection alive."""
        return bool(self.has_text or self.ids or self.listed or self.finish) or self.completion_tokens is not None


class ReportedError(BrokenError):
    """An error that the server reports inside its stream. `status` is the HTTP status that it names, else that of the
    stream; `message` its explanation, in one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server failed in the middle of its answer: {message}")
        self.status = status
        self.message = message


def read_chunks(lines: Iterable[bytes], without_key: Callable[[str], str], notice: Notice) -> Iterator[Chunk]:
    """The events of a stream, to its end, with the server's reasons passed through `without_key`.

    An answer ends with `[DONE]` or with a chunk that has a finish reason. Some servers have a word in that place from
    the first chunk on, so a word is no reason once text has followed it. What goes wrong after a whole answer is
    ignored, and said.

    Raises:
        RefusedError: an error came in place of the answer.
        BrokenError: an event cannot be read or is an error, or the stream ends before the answer does.
    """
    word, has_text, not_ends, skipped = "", False, set[str](), ""

    def is_whole() -> bool:
        return has_text and word in FINISHES and word not in not_ends

    try:
        for data, event, name in read_events(lines):
            if is_done(data):
                return
            if name != ERROR and (words := _words_of_no_answer(data, event)):
                skipped = one_line(without_key(words))
                notice("events that are no part of an answer are skipped", skipped)
                continue
            try:
                chunk = _chunk(data, event, name, without_key)
            except BrokenError as error:
                if is_whole():
                    reason = error.message if isinstance(error, ReportedError) else ""
                    notice("what follows its whole answers is no part of them, and is ignored", reason)
                    continue
                if isinstance(error, ReportedError) and not has_text:
                    raise RefusedError(error.status, error.message, None) from None
                raise
            if chunk.has_text:
                not_ends |= {word} - {""}
                word, has_text = "", True
            word = chunk.finish or word
            yield replace(chunk, finish=None if chunk.finish in not_ends else chunk.finish, ends_answer=is_whole())
    except BrokenError as error:
        if not is_whole():
            raise
        if isinstance(error, SilentError):
            notice("its streams stay open after the answers, so each request takes longer than its answer", "")
        else:
            notice("its connections are lost after whole answers, which is ignored", "")
    if not word or word in not_ends - FINISHES.keys():
        reason = f"; it said: {skipped}" if skipped else ""
        raise BrokenError(f"the server ended in the middle of its answer{reason}")


def read_refusal(body: bytes, without_key: Callable[[str], str]) -> RefusedError | None:
    """The refusal in the body of an answer that is not streamed; None if it is none."""
    try:
        _chunk(body, parse(body), b"", without_key)
    except ReportedError as error:
        return RefusedError(error.status, error.message, None)
    except BrokenError:
        pass
    return None


def _words_of_no_answer(data: bytes, event: Any) -> str:
    """What an event says that only keeps the connection alive: words, a number, or a message; empty for others."""
    text = data.decode(errors="replace")
    if isinstance(event, Mapping):
        message = event.get("message")
        text = message if isinstance(message, str) and not OF_ANSWERS & event.keys() else ""
        return "" if _status(event) != OK or ERROR.decode() in (event.get("object"), event.get("type")) else text
    is_odd = not WORDS.fullmatch(text) if event is UNREADABLE else isinstance(event, list)
    return "" if is_odd or "error" in text.lower() else text


def _chunk(data: bytes, event: Any, name: bytes, without_key: Callable[[str], str]) -> Chunk:
    """One event of an answer. Raises `ReportedError` if it is an error, `BrokenError` if it cannot be read."""
    text = data.decode(errors="replace")
    choice: Any = {}
    is_error = name == ERROR or (event is UNREADABLE and "error" in text.lower() and bool(WORDS.fullmatch(text)))
    try:
        if not is_error:
            # Of several answers, the first one's alone is timed.
            choice = next((choice for choice in event.get("choices") or () if choice.get("index") in FIRST), {})
            bare = not {"choices", "usage"} & event.keys() and isinstance(
                event.get("message") or event.get("detail"), str
            )
            is_error = bare or "error" in (event.get("object"), event.get("type"))
        if not (is_error or event.get("error") or choice.get("error")):
            chunk = _chunk_of_choice(choice, _usage(event, choice), without_key)
            return _with_timings(replace(chunk, drafts=find_report(event, choice)), event.get("timings"))
    except MALFORMED:
        raise BrokenError("the server sent an event that is not a part of an answer") from None
    message = error_message(json.dumps(choice) if choice.get("error") else text, without_key)
    raise ReportedError(_status(event, choice), message)


def _status(*holders: Any) -> int:
    """The HTTP status that an error names; 200, which it came with, if it names none."""
    known = [holder for holder in holders if isinstance(holder, Mapping)]
    known += [holder["error"] for holder in known if isinstance(holder.get("error"), Mapping)]
    codes = [str(holder.get(key)) for holder in known for key in ("code", "status", "status_code")]
    return next((int(code) for code in codes if re.fullmatch(r"[45][0-9]{2}", code, re.ASCII)), OK)


def _usage(event: Mapping[str, Any], choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The usage wherever a server puts it; `x_groq` is Groq's."""
    holders = (event, choice, choice.get("delta") or {}, event.get("x_groq") or {})
    return next((usage for holder in holders if (usage := holder.get("usage"))), {})


def _chunk_of_choice(choice: Mapping[str, Any], usage: Mapping[str, Any], without_key: Callable[[str], str]) -> Chunk:
    delta = choice.get("delta", choice.get("message")) or {}
    ids, listed, finish = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, Mapping) else finish  # SGLang's own form
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
