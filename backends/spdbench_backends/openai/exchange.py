"""One try of a request to a server: the answer's chunks as steps, and what else it reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

from spdbench.errors import PromptFailedError, TryAgainError
from spdbench.types import FinishReason, GenerationRequest, Step
from spdbench_backends.openai.chunks import BROKEN_OFF, FINISHES, Chunk
from spdbench_backends.openai.counters import Counters
from spdbench_backends.openai.counting import Counter
from spdbench_backends.openai.response_drafts import DraftReport
from spdbench_backends.openai.transport.client import Connection
from spdbench_backends.openai.transport.errors import BrokenError

MAX_WAIT_S = 30.0
MAX_REQUESTED_WAIT_S = 300.0
FIRST_WAIT_S = 0.5
MAX_TRAILING_CHUNKS = 64
INLINE_THOUGHTS = ("<", "[", "\u25c1")
"""How answers begin that hold their thoughts as text, such as `<think>` or `[THINK]`."""
END_OF_THOUGHTS = "</think>"
"""Stands alone where the chat template has begun the thoughts."""


class Exchange:
    """One try of a request, and its outcome; `tries` counts this one and those before it. `finish_word` is the server's
    own word for why it ended; empty if it gave none. `contradiction` and `excess` are `Counter`'s."""

    def __init__(self, request: GenerationRequest, timeout_s: float) -> None:
        self.request = request
        self.timeout_s = timeout_s
        self.tries = 0
        self.is_to_be_repeated = False
        self.connection: Connection | None = None
        self.before: Counters | None = None
        self.parts: list[str] = []
        self.has_thoughts = False
        self.finish_word = ""
        self.num_prompt_tokens: int | None = None
        self.num_cached_tokens: int | None = None
        self.decode_s: float | None = None
        self.drafts: DraftReport | None = None
        self.num_tokens = 0
        self.contradiction = self.excess = ""

    def repeat_later(self, reason: str, wait_s: float | None) -> TryAgainError:
        """The error that has the request repeated, after `wait_s` if the server named a time."""
        self.is_to_be_repeated = True
        return TryAgainError(reason, retry_wait_s(self.tries - 1, wait_s))

    def steps(self, chunks: Iterator[Chunk], counter: Counter) -> Iterator[Step]:
        """A step for each chunk with tokens. If it is closed after the last token, it still reads the stream's end."""
        for chunk in chunks:
            self._record(chunk)
            ids = counter.take(chunk)
            if chunk.ends_answer and counter.has_plausible_usage:
                ids += counter.rest()  # now, since the server may take its time to close the stream
            if ids:
                yield from self._step(ids, chunks, counter)
        self.contradiction, self.excess = counter.contradiction, counter.excess
        if ids := counter.rest():
            yield from self._step(ids, chunks, counter)

    def _step(self, ids: tuple[int, ...], chunks: Iterator[Chunk], counter: Counter) -> Iterator[Step]:
        self.num_tokens += len(ids)
        try:
            yield Step(ids, 0, 0, 0, 0.0)
        except GeneratorExit:
            if self.num_tokens >= self.request.max_new_tokens or not self.request.eos_ids.isdisjoint(ids):
                self._read_rest(chunks, counter)
            raise

    def _read_rest(self, chunks: Iterator[Chunk], counter: Counter) -> None:
        """Reads what follows the last token that counts: the finish reason, usage, and text that was held back."""
        until = time.monotonic() + self.timeout_s
        with suppress(BrokenError):
            for number, chunk in enumerate(chunks, start=1):
                self._record(chunk)
                counter.check(chunk)
                if number > MAX_TRAILING_CHUNKS or time.monotonic() > until:
                    raise PromptFailedError("the server does not stop after the last token that it was asked for")
        self.contradiction, self.excess = counter.contradiction, counter.excess

    @property
    def doubt(self) -> str:
        """Which of the server's counts contradict each other; empty where none do."""
        return self.contradiction or self.excess

    @property
    def finish(self) -> FinishReason:
        """Why a whole answer ended: at a limit, or by itself, whatever the server calls that."""
        return FINISHES.get(self.finish_word, "eos")

    def _record(self, chunk: Chunk) -> None:
        if chunk.replaces:
            self.parts.clear()
        self.parts.append(chunk.text)
        self.has_thoughts = self.has_thoughts or bool(chunk.thought)
        if chunk.prompt_tokens is not None:
            self.num_prompt_tokens = chunk.prompt_tokens
        self.num_cached_tokens = self.num_cached_tokens if chunk.cached_tokens is None else chunk.cached_tokens
        self.decode_s = chunk.decode_s or self.decode_s
        self.drafts = chunk.drafts or self.drafts
        if chunk.has_text:
            self.finish_word = ""
        self.finish_word = chunk.finish or self.finish_word
        if self.finish_word in BROKEN_OFF:
            raise PromptFailedError(f"the server broke the answer off: {self.finish_word}")
        if chunk.thought_tokens and not self.has_thoughts and not self._has_inline_thoughts:
            raise PromptFailedError(
                f"{chunk.thought_tokens} tokens are thoughts that the server keeps to itself, so its tokens cannot be "
                "timed; let it send its thoughts, or not think"
            )

    @property
    def _has_inline_thoughts(self) -> bool:
        text = "".join(self.parts)
        return text.lstrip().startswith(INLINE_THOUGHTS) or END_OF_THOUGHTS in text


def retry_wait_s(tries: int, requested_s: float | None) -> float:
    """How long to wait before the next try: twice as long each time, or longer if the server requests it; limited."""
    own_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**tries)
    return max(own_s, min(MAX_REQUESTED_WAIT_S, requested_s or 0.0))
