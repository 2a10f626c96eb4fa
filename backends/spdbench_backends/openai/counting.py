"""Counts the tokens of an answer that comes as text, by what the server reports of them, in one of seven ways.

Chunks are not tokens: a server that drafts sends several tokens at once, and holds back an incomplete character. So the
count is the server's own, and the result says which way it was. A report for each token is preferred to one at the end;
of two such, usage comes before log-probabilities, whose computation takes time that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from spdbench.errors import InputError, PromptFailedError
from spdbench.types import UNKNOWN_ID, MeasurementKind
from spdbench_backends.openai.chunks import Chunk

Api = Literal["chat", "completions"]
Way = Literal["ids", "running_usage", "chunk_usage", "timings", "usage", "logprobs", "chunks"]
CountOption = Literal["auto", "ids", "usage", "logprobs", "chunks"]
Extras = Mapping[str, Any]

WAY_TITLES: Mapping[Way, str] = {
    "ids": "the server's token ids",
    "running_usage": "the server's usage, reported with each chunk",
    "chunk_usage": "the server's usage, reported of each chunk alone",
    "timings": "llama.cpp's timings, reported with each chunk, and its usage",
    "usage": "the server's usage, reported at the end",
    "logprobs": "the server's log-probabilities, one a token",
    "chunks": "one token a chunk, as the server's usage confirmed for one answer",
}
TRIES: Mapping[CountOption, tuple[tuple[Way, ...], ...]] = {
    "auto": (
        ("ids", "usage"),
        ("running_usage",),
        ("chunk_usage",),
        ("timings", "usage"),
        ("logprobs", "usage"),
        ("logprobs",),
        ("usage",),
        ("chunks",),
    ),
    "ids": (("ids", "usage"), ("ids",)),
    "usage": (("running_usage",), ("chunk_usage",), ("timings", "usage"), ("usage",)),
    "logprobs": (("logprobs", "usage"), ("logprobs",)),
    "chunks": (("chunks",),),
}
"""Option -> tries, in order. A try counts in its first way, and requests the extras of all its ways. There are several
since a server may refuse a request with an extra that it does not know."""
LISTING: frozenset[Way] = frozenset({"ids", "logprobs"})
"""The ways in which a server lists tokens one by one, so that its usage can contradict them."""
MAX_UNCOUNTED = 1
"""Tokens that a server may report above the limit: it may count the end of sequence, too."""
SPARE_CHUNKS = 2
"""By how many the chunks with text may exceed the tokens: text that was held back comes at the end."""


class Counter:
    """The tokens of one answer: `take` every chunk, then `rest`; both return the ids of tokens not counted before."""

    def __init__(self, way: Way, limit: int, *, whole: bool, end: int | None = UNKNOWN_ID) -> None:
        """`limit` is the requested maximum of tokens; `whole` if the server's chunks hold whole tokens. `end` is the id
        to count for an end of sequence that only the usage includes; None to leave it out. `excess` says how the parts
        of the usage are more than its total; it is empty where they are not."""
        self._end = end
        self._way = way
        self._limit = limit
        self._whole = whole
        self._stated: int | None = None
        self._num_text_chunks = 0
        self._num_listed = 0
        self.excess = ""
        self.total = 0

    def take(self, chunk: Chunk) -> tuple[int, ...]:
        """Ids of the tokens that came with `chunk`.

        Raises:
            PromptFailedError: it lacks what the server reported before the run, or reports more tokens than possible.
        """
        self.check(chunk)
        found = self._new_ids(chunk)
        self._num_text_chunks += chunk.has_text
        self.total += len(found)
        if self._way != "chunks":
            self._refuse_above_limit(self.total)
        return found

    def check(self, chunk: Chunk) -> None:
        """Takes note of what a chunk reports. Raises `PromptFailedError` if that is more tokens than were asked for."""
        self._num_listed += len((chunk.ids if self._way == "ids" else chunk.listed) or ())
        if chunk.completion_tokens is not None:
            self._stated = max(self._stated or 0, chunk.completion_tokens)  # it may be 0 before and after the answer
            self.excess = _excess(chunk)
            if not (self.excess and self._way in LISTING):  # then this usage is not believed
                self._refuse_above_limit(self._stated)

    def _refuse_above_limit(self, count: int) -> None:
        if count > self._limit + MAX_UNCOUNTED:
            raise PromptFailedError(f"the server reports {count} tokens, and was asked for {self._limit} at most")

    def _new_ids(self, chunk: Chunk) -> tuple[int, ...]:
        if self._way in ("ids", "logprobs", "chunk_usage"):
            found = chunk.ids if self._way == "ids" else chunk.listed
            if self._way == "chunk_usage":  # a chunk without text may report the whole answer
                count = chunk.completion_tokens if chunk.has_text else None
                found = None if count is None else (UNKNOWN_ID,) * count
            if found is None and chunk.has_text:
                raise PromptFailedError(
                    f"a chunk came without {WAY_TITLES[self._way]}, so its tokens cannot be counted"
                )
            return found or ()
        if self._way == "running_usage":
            return (UNKNOWN_ID,) * max(0, (self._stated or 0) - self.total)
        if self._way == "timings":
            return (UNKNOWN_ID,) * max(0, min(self._limit, chunk.predicted_tokens or 0) - self.total)
        first_only = self._way == "usage" and self.total > 0
        return (UNKNOWN_ID,) if chunk.has_text and not first_only else ()

    @property
    def contradiction(self) -> str:
        """How the tokens that the server listed, once it has listed all, differ from its usage, which may also count
        the end of sequence; empty where they do not, or where that usage contradicts itself (`excess`), so that it says
        nothing. Both are the server's, and those that it listed count."""
        stated, listed = self._stated or 0, self._num_listed
        if self._way not in LISTING or not listed or self.excess or is_consistent(listed, stated):
            return ""
        return f"{listed} listed, a usage of {stated}"

    @property
    def has_plausible_usage(self) -> bool:
        """True if the server has stated no fewer tokens than the answer has so far."""
        fewest = self._num_text_chunks - SPARE_CHUNKS if self._whole else 1
        return self._stated is not None and self._stated >= max(1, fewest)

    def rest(self) -> tuple[int, ...]:
        """Ids of tokens that only the end of the answer reports.

        Raises:
            PromptFailedError: the server reported no usage, or one that contradicts its answer.
        """
        if self._way in ("ids", "logprobs"):
            is_missing = self.total > 0 and self._stated == self.total + 1
            if self._end is None or not is_missing:
                return ()
            self.total += 1
            return (self._end,)
        if self._way in ("chunks", "chunk_usage"):
            return ()
        if self._stated is None:
            raise PromptFailedError("the server reported no usage, so its tokens cannot be counted")
        if self._num_text_chunks and not self.has_plausible_usage:
            raise PromptFailedError(
                f"the server's usage is {self._stated} tokens, and its answer came in {self._num_text_chunks} chunks, "
                "so its tokens cannot be counted"
            )
        if self._stated and not self._num_text_chunks:
            raise PromptFailedError(
                f"the server's usage is {self._stated} tokens, and its answer has no text, so they cannot be timed"
            )
        found = (UNKNOWN_ID,) * max(0, self._stated - self.total)
        self.total += len(found)
        return found


def _excess(chunk: Chunk) -> str:
    """How the parts of a usage are more than the whole, as of a server that counts the prompt as a part of the answer;
    empty where they are not."""
    prompt, answer, total = chunk.prompt_tokens, chunk.completion_tokens, chunk.total_tokens
    if not prompt or not answer or not total or prompt + answer <= total + MAX_UNCOUNTED:
        return ""
    return f"{prompt} tokens of the prompt and {answer} of the answer, {total} in all"


def is_consistent(listed: int, stated: int) -> bool:
    """True if a server may list so many tokens and state that usage, which is 0 where it states none."""
    return stated == 0 or 0 <= stated - listed <= MAX_UNCOUNTED


def missing_measurements(way: Way, ids: bool) -> tuple[MeasurementKind, ...]:
    """What is unknown of steps that are counted in this way; `ids` if the tokens came with theirs."""
    found: list[MeasurementKind] = ["drafts", "forwards", "devices"]
    if not ids:
        found.append("ids")
    if way == "usage":
        found.append("times")
    return tuple(found)


def has_whole_tokens(answer: Sequence[Chunk]) -> bool:
    """True if an answer came in no more chunks than its usage has tokens."""
    return sum(chunk.has_text for chunk in answer) <= _stated_tokens(answer)


def extras(ways: Iterable[Way], api: Api) -> Extras:
    """Keys of a request that make the server report what these ways need."""
    parts: Mapping[Way, Extras] = {
        "ids": {"return_token_ids": True},
        "running_usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "chunk_usage": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "timings": {"timings_per_token": True},
        "usage": {"stream_options": {"include_usage": True}},
        "logprobs": {"logprobs": True if api == "chat" else 1},
        "chunks": {},
    }
    return {key: value for way in ways for key, value in parts[way].items()}


def choose_way(
    option: CountOption,
    api: Api,
    probe: Callable[[Extras], Sequence[Chunk] | None],
    usage: Callable[[], int | None],
    label: str,
    notice: Callable[[str], None],
) -> tuple[Way, Extras, Sequence[Chunk]]:
    """The way to count, the extras that it needs in requests, and the answer that showed it.

    `probe` returns the answer to a short question with extras in the request, None if the server refuses these; `usage`
    returns how many tokens the same answer has when it is not streamed. A way that is contradicted goes to `notice`.

    Raises:
        InputError: the server reports nothing by which tokens can be counted, or not what the option asks for.
    """
    answer, asked, usage = None, None, cache(usage)
    contradicted = dict[Way, str]()
    for ways in TRIES[option]:
        way, more = ways[0], extras(ways, api)
        if way in contradicted:
            continue
        if more != asked:
            answer, asked = probe(more), more
        if answer is not None and (contradiction := _contradiction(answer, way)):
            contradicted[way] = f"{WAY_TITLES[way]} contradict its usage ({contradiction})"
            notice(f"{contradicted[way]}, so tokens are not counted by them")
            continue
        if answer is not None and _can_count(answer, way) and _is_confirmed(answer, way, usage):
            return way, more, answer
    allowed = ", ".join(name for name in TRIES if name not in ("auto", option))
    if option == "auto" and answer is not None and not any(chunk.has_text for chunk in answer):
        raise InputError(
            f"-b {label}: the server's answer to a short question has no text, so its tokens cannot be counted; ask it "
            "by hand, or see its log"
        )
    if option == "auto":
        raise InputError(
            f"-b {label}: the server reports no token ids, usage or log-probabilities in its stream, and its chunks "
            "are not one token each, so its tokens cannot be counted; switch one of these on (llama.cpp, vLLM and "
            "SGLang have usage)"
        )
    reason = next((f"{words}." for words in contradicted.values()), "the server does not report that.")
    raise InputError(f"-o {label}.count={option}: {reason} Others: auto, {allowed}.")


def _can_count(answer: Sequence[Chunk], way: Way) -> bool:
    """True if the answer reports what this way needs."""
    with_text = [chunk for chunk in answer if chunk.has_text]
    if way == "usage":
        return _stated_tokens(answer) > 0
    if way in ("running_usage", "chunk_usage", "timings"):
        if any(map(_excess, answer)):
            return False
        counts = [(chunk.predicted_tokens if way == "timings" else chunk.completion_tokens) or 0 for chunk in with_text]
        if len(counts) < 2 or not all(counts) or (way == "timings" and not _stated_tokens(answer)):
            return False
        rises = counts == sorted(counts) and counts[0] < counts[-1]
        return way == "chunk_usage" or (rises and (way == "timings" or counts[-1] >= len(counts) - SPARE_CHUNKS))
    if way == "ids":
        return bool(with_text) and all(chunk.ids is not None for chunk in with_text)
    return bool(with_text) and (way == "chunks" or all(chunk.listed for chunk in with_text))


def _contradiction(answer: Sequence[Chunk], way: Way) -> str:
    """How an answer's usage contradicts the tokens that it lists, as of a server that lists all tokens so far with each
    chunk; empty where it does not."""
    counter = Counter(way, limit=_stated_tokens(answer), whole=True)
    for chunk in answer:
        counter.check(chunk)
    return counter.contradiction


def _is_confirmed(answer: Sequence[Chunk], way: Way, usage: Callable[[], int | None]) -> bool:
    """False if this way is doubtful for the answer, and what it counts is not the usage of the whole answer. Usage of
    fewer tokens than there are chunks that report it may be that of each chunk."""
    with_text = [chunk for chunk in answer if chunk.has_text]
    counts = [chunk.completion_tokens or 0 for chunk in with_text]
    if way == "chunks":
        return usage() == len(with_text)
    if way == "chunk_usage":
        whole = _stated_tokens([chunk for chunk in answer if not chunk.has_text])
        return sum(counts) == whole or sum(counts) == usage()
    stated = _stated_tokens(answer)
    return way != "usage" or stated >= sum(map(bool, counts)) or stated == usage()


def _stated_tokens(answer: Sequence[Chunk]) -> int:
    return max((chunk.completion_tokens or 0 for chunk in answer), default=0)
