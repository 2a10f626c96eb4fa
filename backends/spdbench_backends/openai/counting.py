"""How tokens are counted that come as text: by what the server tells of them, in one of five ways.

Chunks are not tokens: a server that drafts sends several at once, and half a letter waits for its other half. So the
server's own word is taken, and which word it was stands in the result. What tells of each token comes before what tells
of all of them at the end; of two that do, usage comes first, since log-probabilities are work on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from spdbench.errors import InputError, PromptFailedError
from spdbench.types import UNKNOWN_ID, Unknown
from spdbench_backends.openai.chunks import Chunk

Api = Literal["chat", "completions"]
Way = Literal["ids", "running_usage", "usage", "logprobs", "chunks"]
Asked = Literal["auto", "ids", "usage", "logprobs", "chunks"]
Extras = Mapping[str, Any]

WORDS: Mapping[Way, str] = {
    "ids": "the server's token ids",
    "running_usage": "the server's usage, told with each chunk",
    "usage": "the server's usage, told at the end",
    "logprobs": "the server's log-probabilities, one a token",
    "chunks": "one token a chunk, as the server's usage confirmed for one answer",
}
TRIES: Mapping[Asked, tuple[tuple[Way, ...], ...]] = {
    "auto": (("ids", "usage"), ("running_usage",), ("logprobs", "usage"), ("logprobs",), ("usage",), ("chunks",)),
    "ids": (("ids", "usage"), ("ids",)),
    "usage": (("running_usage",), ("usage",)),
    "logprobs": (("logprobs", "usage"), ("logprobs",)),
    "chunks": (("chunks",),),
}
"""What is tried for each that can be asked for, one after the other: the first way of a try is how it would count, and
the extras of all its ways are asked for. A server that does not know one extra may refuse the request."""
MAX_UNCOUNTED = 1
"""An end of sequence that the server counts beside the tokens that it was asked for."""
SPARE_CHUNKS = 2
"""More chunks with text than tokens: what was held back and comes at the end."""


class Counter:
    """The tokens of one answer: `take` every chunk, then `rest`; both give ids of tokens that were not counted yet."""

    def __init__(self, way: Way, limit: int, *, whole: bool) -> None:
        """`limit` is the most tokens that were asked for; `whole` if the server's chunks hold whole tokens."""
        self._way = way
        self._limit = limit
        self._whole = whole
        self._stated: int | None = None
        self._num_saying = 0
        self.total = 0

    def take(self, chunk: Chunk) -> tuple[int, ...]:
        """Tokens that came with `chunk`.

        Raises:
            PromptFailedError: it does not tell what the server told before the run, or more than can be.
        """
        self.check(chunk)
        found = self._found(chunk)
        self._num_saying += chunk.says
        self.total += len(found)
        if self._way != "chunks":
            self._refuse_above_limit(self.total)
        return found

    def check(self, chunk: Chunk) -> None:
        """Raises `PromptFailedError` if the server says that it made more tokens than it was asked for."""
        if chunk.completion_tokens is not None:
            self._stated = chunk.completion_tokens
            self._refuse_above_limit(self._stated)

    def _refuse_above_limit(self, count: int) -> None:
        if count > self._limit + MAX_UNCOUNTED:
            raise PromptFailedError(f"the server tells of {count} tokens, and was asked for {self._limit} at most")

    def _found(self, chunk: Chunk) -> tuple[int, ...]:
        if self._way in ("ids", "logprobs"):
            told = chunk.ids if self._way == "ids" else chunk.listed
            if told is None and chunk.says:
                raise PromptFailedError(f"a chunk came without {WORDS[self._way]}, so its tokens cannot be counted")
            return told or ()
        if self._way == "running_usage":
            return (UNKNOWN_ID,) * max(0, (self._stated or 0) - self.total)
        first_only = self._way == "usage" and self.total > 0
        return (UNKNOWN_ID,) if chunk.says and not first_only else ()

    def rest(self) -> tuple[int, ...]:
        """Tokens that only the end tells of.

        Raises:
            PromptFailedError: the server told no usage, or one that its answer contradicts.
        """
        if self._way not in ("usage", "running_usage"):
            return ()
        if self._stated is None:
            raise PromptFailedError("the server told no usage, so its tokens cannot be counted")
        fewest = self._num_saying - SPARE_CHUNKS if self._whole else 1
        if self._num_saying and self._stated < max(1, fewest):
            raise PromptFailedError(
                f"the server's usage is {self._stated} tokens, and its answer came in {self._num_saying} chunks, so "
                "its tokens cannot be counted"
            )
        found = (UNKNOWN_ID,) * max(0, self._stated - self.total)
        self.total += len(found)
        return found


def unknown(way: Way, ids: bool) -> tuple[Unknown, ...]:
    """What cannot be known of steps that are counted in this way; `ids` if the tokens came with theirs."""
    found: list[Unknown] = ["drafts", "forwards", "devices"]
    if not ids:
        found.append("ids")
    if way == "usage":
        found.append("times")
    return tuple(found)


def have_whole_tokens(told: Sequence[Chunk]) -> bool:
    """True if an answer came in no more chunks than its usage tells tokens."""
    return sum(chunk.says for chunk in told) <= _stated(told)


def extras(ways: Iterable[Way], api: Api) -> Extras:
    """What has to be asked for beside an answer."""
    parts: Mapping[Way, Extras] = {
        "ids": {"return_token_ids": True},
        "running_usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "usage": {"stream_options": {"include_usage": True}},
        "logprobs": {"logprobs": True if api == "chat" else 1},
        "chunks": {},
    }
    return {key: value for way in ways for key, value in parts[way].items()}


def choose_way(
    asked: Asked,
    api: Api,
    probe: Callable[[Extras], Sequence[Chunk] | None],
    usage: Callable[[], int | None],
    label: str,
) -> tuple[Way, Extras, Sequence[Chunk]]:
    """The way to count, what it has to be asked for, and the answer that showed it.

    `probe` has a short question answered with extras in the request, None if the server refuses these; `usage` tells
    how many tokens the same answer has when it is not streamed.

    Raises:
        InputError: the server tells nothing that tokens could be counted by, or not what was `asked`.
    """
    for ways in TRIES[asked]:
        way, more = ways[0], extras(ways, api)
        told = probe(more)
        if told is None or (way == "chunks" and usage() != sum(chunk.says for chunk in told)):
            continue
        if _shows(told, way):
            return way, more, told
    allowed = ", ".join(name for name in TRIES if name not in ("auto", asked))
    if asked == "auto":
        raise InputError(
            f"-b {label}: the server tells no token ids, usage or log-probabilities in its stream, and its chunks are "
            "not one token each, so its tokens cannot be counted; switch one of these on (llama.cpp, vLLM and SGLang "
            "have usage)"
        )
    raise InputError(f"-o {label}.count={asked}: the server does not tell that. Others: auto, {allowed}.")


def _shows(told: Sequence[Chunk], way: Way) -> bool:
    """True if an answer can be counted in this way."""
    saying = [chunk for chunk in told if chunk.says]
    if way == "usage":
        return _stated(told) > 0
    if way == "running_usage":
        counts = [chunk.completion_tokens or 0 for chunk in saying]
        return len(counts) > 1 and 0 < counts[0] < counts[-1] and all(counts)
    if way == "ids":
        num_ids = sum(len(chunk.ids or ()) for chunk in told)  # a server might send all ids so far each time
        return bool(saying) and all(chunk.ids is not None for chunk in saying) and _stated(told) in (0, num_ids)
    return bool(saying) and (way == "chunks" or all(chunk.listed for chunk in saying))


def _stated(told: Sequence[Chunk]) -> int:
    return max((chunk.completion_tokens or 0 for chunk in told), default=0)
