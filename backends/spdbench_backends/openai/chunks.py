"""One event of a streamed answer as a chunk: its text and what it reports of tokens; chat and plain completions.

A field that cannot be read is as good as absent, and said once: only the text of an answer cannot be done without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spdbench.types import UNKNOWN_ID, FinishReason
from spdbench_backends.openai.response_drafts import DraftReport, find_report
from spdbench_backends.openai.transport.errors import MALFORMED

FIRST = (None, 0, "0")
"""The index of the first answer, if there are several."""
OTHER_ANSWERS = "choice with an index of 1 or more"
Odd = Callable[[str], None]
"""Hears the name of what cannot be read, or does not count."""
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
    "max_length": "length",
    "max_new_tokens": "length",
}
"""What servers call the end of an answer, in lower case."""
CALLS = ("tool_calls", "function_call")
"""Keys of a delta that holds a call, and the finish reasons of answers that end with one."""
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
        *CALLS,
    ]
)
"""Ends that are none of the answer that was asked for: breaks, filters, and calls of tools, of which no text comes."""
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
CACHED = ("cached_tokens", "prompt_cache_hit_tokens")
"""Keys of a usage for the prompt's tokens that a cache knew: OpenAI's, and DeepSeek's."""
OF_ENUM = re.compile(r"^finish_?reason[._]")
"""How finish reasons begin where a server writes the name of an enumeration's member, in lower case."""
NOT_FINISHED = frozenset({"", "null", "none", "not_finished"})
"""Finish reasons that say that there is none yet."""


@dataclass(frozen=True)
class Chunk:
    """One event of a stream.

    `text` is part of the answer, `thought` of the reasoning before it. `ids` are the chunk's tokens as the server lists
    them, `listed` those that it lists with log-probabilities, `UNKNOWN_ID` where they have no id there. The two numbers
    of tokens count from the start of the request, `total_tokens` are a usage's of prompt and answer, which may be more
    than both, `thought_tokens` those of thoughts; `cached_tokens` are those of the
    prompt that a cache answered; `predicted_tokens` are llama.cpp's count while the answer comes, which may go beyond
    its end. `decode_s` is the server's own time for the tokens so far, `drafts` what it reports of its drafts. `finish`
    is the server's word for why the answer ended, in lower case; `ends_answer` is true from the chunk on with which the
    answer is whole. `is_message` if its text came as a message, which most servers send only where they do not stream.
    With `replaces`, `text` is all of the answer so far, in place of what came before.
    """

    text: str = ""
    thought: str = ""
    ids: tuple[int, ...] | None = None
    listed: tuple[int, ...] | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    total_tokens: int | None = None
    thought_tokens: int = 0
    cached_tokens: int | None = None
    predicted_tokens: int | None = None
    decode_s: float | None = None
    drafts: DraftReport | None = None
    finish: str | None = None
    ends_answer: bool = False
    is_message: bool = False
    replaces: bool = False

    @property
    def has_text(self) -> bool:
        return bool(self.text or self.thought)

    @property
    def has_content(self) -> bool:
        """False for a chunk that only keeps the connection alive."""
        return bool(self.has_text or self.ids or self.listed or self.finish) or self.completion_tokens is not None


def choice_of(event: Mapping[str, Any], odd: Odd) -> Mapping[str, Any]:
    """The first answer's choice in an event, of which alone the times count; empty where it has none."""
    choices = event.get("choices") or []
    found = [choice for choice in choices if isinstance(choice, Mapping)] if isinstance(choices, list) else None
    if found is None or len(found) < len(choices):
        odd("choices")
    first = next((choice for choice in found or () if choice.get("index") in FIRST), None)
    if found and first is None:
        odd(OTHER_ANSWERS)
    return first or {}


def chunk_of(event: Mapping[str, Any], choice: Mapping[str, Any], without_key: Callable[[str], str], odd: Odd) -> Chunk:
    """The chunk in an event and its `choice`, with the server's words passed through `without_key`."""
    delta = _mapping(choice.get("delta"), "delta", odd)
    is_message = bool(choice.get("message")) and not any(map(delta.get, ("content", "refusal", *THOUGHT_KEYS)))
    delta = _mapping(choice.get("message"), "message", odd) if is_message else delta
    finish = choice.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, Mapping) else finish  # SGLang's own form
    word = OF_ENUM.sub("", without_key(str(finish or "")).lower())
    word = next((key for key in CALLS if _is_call(delta.get(key))), word)  # some end such answers as any other
    content = choice.get("text") or delta.get("content") or delta.get("refusal")
    thoughts = (next(filter(None, map(delta.get, THOUGHT_KEYS)), None), _text(content, "thinking"))
    usage, timings = _usage(event, choice, odd), _mapping(event.get("timings"), "timings", odd)
    details = _mapping(usage.get("completion_tokens_details"), "completion_tokens_details", odd)
    of_prompt = _mapping(usage.get("prompt_tokens_details"), "prompt_tokens_details", odd)
    known = (holder.get(key) for holder, key in ((of_prompt, CACHED[0]), *((usage, key) for key in CACHED)))
    cached = _read(next((number for number in known if number is not None), None), _whole, CACHED[0], odd)
    prompt_tokens = _count(usage, _known(usage, "prompt_tokens", "input_tokens"), odd)
    completion_tokens = _count(usage, _known(usage, "completion_tokens", "output_tokens"), odd)
    total_tokens = _count(usage, "total_tokens", odd)
    thought_tokens = _count(details, "reasoning_tokens", odd) or 0
    if thought_tokens and total_tokens == (prompt_tokens or 0) + (completion_tokens or 0) + thought_tokens:
        completion_tokens = (completion_tokens or 0) + thought_tokens  # xAI's do not include those of thoughts
    return Chunk(
        text=_text(content, "text"),
        thought="".join(str(thought) for thought in thoughts if thought),
        ids=_read(choice.get("token_ids"), _ids, "token_ids", odd),
        listed=_read(choice.get("logprobs"), _listed_tokens, "logprobs", odd),
        completion_tokens=completion_tokens,
        prompt_tokens=prompt_tokens,
        total_tokens=total_tokens,
        thought_tokens=thought_tokens,
        cached_tokens=_read(timings.get("cache_n"), _whole, "cache_n", odd) if cached is None else cached,
        predicted_tokens=_read(timings.get("predicted_n"), _whole, "predicted_n", odd),
        decode_s=_read(timings.get("predicted_ms"), _seconds, "predicted_ms", odd),
        drafts=find_report(event, choice),
        finish=None if word in NOT_FINISHED else word,
        is_message=is_message,
    )


def _is_call(value: Any) -> bool:
    """False for a call of which nothing is filled in."""
    return any(value.values()) if isinstance(value, Mapping) else bool(value)


def _usage(event: Mapping[str, Any], choice: Mapping[str, Any], odd: Odd) -> Mapping[str, Any]:
    """The usage wherever a server puts it; `x_groq` is Groq's."""
    holders = (event, choice, choice.get("delta"), event.get("x_groq"))
    return next(
        (
            _mapping(usage, "usage", odd)
            for holder in holders
            if isinstance(holder, Mapping) and (usage := holder.get("usage"))
        ),
        {},
    )


def _known(usage: Mapping[str, Any], name: str, other: str) -> str:
    """The name under which usage has a count: OpenAI's, or else Anthropic's."""
    return name if usage.get(name) is not None else other


def _mapping(value: Any, name: str, odd: Odd) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if value is not None:
        odd(name)
    return {}


def _read(value: Any, read: Callable[[Any], Any], name: str, odd: Odd) -> Any:
    """What `read` makes of a value; None where there is none, or where it has another form."""
    try:
        return None if value is None else read(value)
    except MALFORMED:
        odd(name)
        return None


def _count(holder: Mapping[str, Any], name: str, odd: Odd) -> int | None:
    count: int | None = _read(holder.get(name), _number, name, odd)
    return count


def _number(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or number != float(value) or not 0 <= number < MAX_COUNT:
        raise ValueError("no id and no count")
    return number


def _whole(value: Any) -> int:
    """A count that nothing depends on."""
    if not isinstance(value, int):
        raise TypeError("not a whole number")
    return _number(value)


def _seconds(milliseconds: Any) -> float:
    seconds = float(milliseconds) / 1000
    if isinstance(milliseconds, bool) or not 0 <= seconds < MAX_SECONDS:
        raise ValueError("no time")
    return seconds


def _text(content: Any, kind: str) -> str:
    """The parts of this kind, `text` or `thinking`, of a content that is text, or a list of parts."""
    if isinstance(content, Mapping):
        return _text(content.get(kind), "text")
    if isinstance(content, list):
        return "".join(_text(part, kind) for part in content)
    return str(content or "") if kind == "text" else ""


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(map(_number, values))


def _listed_tokens(logprobs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The tokens that have log-probabilities. vLLM writes `token_id:ID` for their text if it is asked to, llama.cpp
    adds the id."""
    content, tokens = logprobs.get("content"), logprobs.get("tokens")
    if content is not None:
        tokens = [f"{ID_PREFIX}{entry['id']}" if _has_id(entry) else entry["token"] for entry in content]
    if tokens is None:
        return None
    return tuple(
        int(token.removeprefix(ID_PREFIX)) if str(token).startswith(ID_PREFIX) else UNKNOWN_ID for token in tokens
    )


def _has_id(entry: Mapping[str, Any]) -> bool:
    return type(entry.get("id")) is int and 0 <= entry["id"] < MAX_COUNT
