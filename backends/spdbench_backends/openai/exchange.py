"""One try of a request to a server: the answer's chunks as steps, and what it reports besides."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from spdbench.errors import PromptFailedError, TryAgainError
from spdbench.types import FinishReason, GenerationRequest, Step
from spdbench_backends.openai.chunks import Chunk
from spdbench_backends.openai.client import BrokenError, Connection, one_line
from spdbench_backends.openai.counters import Counters
from spdbench_backends.openai.counting import Counter

MAX_WAIT_S = 30.0
FIRST_WAIT_S = 0.5
FINISHES: Mapping[str, FinishReason] = {
    "stop": "eos",
    "length": "length",
    "eos_token": "eos",  # this and the next are TGI's
    "stop_sequence": "eos",
}
MAX_TRAILING_CHUNKS = 64


class Exchange:
    """One try of a request, and its outcome; `tries` counts this one and those before it."""

    def __init__(self, request: GenerationRequest, timeout_s: float) -> None:
        self.request = request
        self.timeout_s = timeout_s
        self.tries = 0
        self.is_to_be_repeated = False
        self.connection: Connection | None = None
        self.before: Counters | None = None
        self.parts: list[str] = []
        self.finish: FinishReason | None = None
        self.num_prompt_tokens: int | None = None
        self.num_tokens = 0

    def repeat_later(self, reason: str, wait_s: float | None) -> TryAgainError:
        """The error that has the request repeated, after `wait_s` if the server named a time."""
        self.is_to_be_repeated = True
        return TryAgainError(reason, retry_wait_s(self.tries - 1, wait_s))

    def steps(self, chunks: Iterator[Chunk], counter: Counter) -> Iterator[Step]:
        """A step for each chunk with tokens. If it is closed after the last token, it still reads the stream's end."""
        for chunk in chunks:
            self._record(chunk)
            if ids := counter.take(chunk):
                yield from self._step(ids, chunks, counter)
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

    def _record(self, chunk: Chunk) -> None:
        self.parts.append(chunk.text)
        if chunk.prompt_tokens is not None:
            self.num_prompt_tokens = chunk.prompt_tokens
        if chunk.finish is not None:
            if chunk.finish not in FINISHES:
                raise PromptFailedError(
                    f"the server ended the answer for a reason of its own: {one_line(chunk.finish)}"
                )
            self.finish = FINISHES[chunk.finish]


def retry_wait_s(tries: int, requested_s: float | None) -> float:
    """How long to wait before the next try: as the server requests, else twice as long each time; limited."""
    return min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**tries if requested_s is None else requested_s)
