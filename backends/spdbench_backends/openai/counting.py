"""How tokens are counted that come as text: by what the server tells of them, in one of five ways.

Chunks are not tokens: a server that drafts sends several at once, and half a letter waits for its other half. So the
server's own word is taken, and which word it was stands in the result. Log-probabilities come after usage, although
they tell more: having them computed is work that a server does not do for its users, on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
TRIES: Mapping[Asked, tuple[tuple[Way, ...], tuple[Way, ...]]] = {
    "auto": (("ids", "usage", "logprobs", "chunks"), ("ids", "running_usage", "usage", "logprobs", "chunks")),
    "ids": (("ids",), ("ids",)),
    "usage": (("ids", "usage"), ("running_usage", "usage")),
    "logprobs": (("logprobs",), ("logprobs",)),
    "chunks": (("chunks",), ("chunks",)),
}
"""What `count` asks for: whose extras are tried, one after the other, and which ways will do, the best one first."""
ALL_TOLD = {"include_usage": True, "continuous_usage_stats": True}
AT_THE_END = {"include_usage": True}


class Counter:
    """The tokens of one answer: `take` every chunk, then `rest`; both give ids of tokens that were not counted yet."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._stated: int | None = None
        self.total = 0

    def take(self, chunk: Chunk) -> tuple[int, ...]:
        """Tokens that came with `chunk`.

        Raises:
            PromptFailedError: it does not tell what the server told before the run.
        """
        if chunk.completion_tokens is not None:
            self._stated = chunk.completion_tokens
        found = self._found(chunk)
        self.total += len(found)
        return found

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
            PromptFailedError: the server told no usage.
        """
        if self._way != "usage":
            return ()
        if self._stated is None:
            raise PromptFailedError("the server told no usage, so its tokens cannot be counted")
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


def extras(way: Way, api: Api) -> Extras:
    """What has to be asked for beside an answer."""
    if way in ("ids", "running_usage"):
        return {"return_token_ids": True, "stream_options": ALL_TOLD}
    if way == "usage":
        return {"stream_options": AT_THE_END}
    if way == "logprobs":
        return {"logprobs": True if api == "chat" else 1}
    return {}


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
    tries, wanted = TRIES[asked]
    for way in tries:
        more = extras(way, api)
        told = probe(more)
        if told is None or (way == "chunks" and usage() != sum(chunk.says for chunk in told)):
            continue
        shown = _shown(way, told)
        if best := next((one for one in wanted if one in shown), None):
            return best, more, told
    allowed = ", ".join(name for name in TRIES if name not in ("auto", asked))
    if asked == "auto":
        raise InputError(
            f"-b {label}: the server tells no token ids, usage or log-probabilities in its stream, and its chunks are "
            "not one token each, so its tokens cannot be counted; switch one of these on (llama.cpp, vLLM and SGLang "
            "have usage)"
        )
    raise InputError(f"-o {label}.count={asked}: the server does not tell that. Others: auto, {allowed}.")


def _shown(way: Way, told: Sequence[Chunk]) -> Sequence[Way]:
    """Which ways of counting an answer allows that was asked for with the extras of `way`."""
    speaking = [chunk for chunk in told if chunk.says]
    stated = max((chunk.completion_tokens or 0 for chunk in told), default=0)
    shown: list[Way] = []
    if speaking and all(chunk.ids is not None for chunk in speaking):
        num_ids = sum(len(chunk.ids or ()) for chunk in told)
        shown += ["ids"] * (stated in (0, num_ids))  # a server might send all ids so far each time
    if len(speaking) > 1 and all(chunk.completion_tokens for chunk in speaking):
        shown.append("running_usage")
    if any(chunk.completion_tokens for chunk in told):
        shown.append("usage")
    if way == "logprobs" and speaking and all(chunk.listed for chunk in speaking):
        shown.append("logprobs")
    if way == "chunks" and speaking:
        shown.append("chunks")
    return shown
