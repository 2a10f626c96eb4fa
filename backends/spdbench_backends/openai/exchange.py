"""One try of a request to a server: its chunks taken as steps, and what the answer says besides.

Must not know addresses, bodies or refusals.
"""

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

LONGEST_WAIT_S = 30.0
FIRST_WAIT_S = 0.5
FINISHES: Mapping[str, FinishReason] = {
    "stop": "eos",
    "length": "length",
    "eos_token": "eos",  # this and the next are TGI's
    "stop_sequence": "eos",
}
MAX_AFTERWORDS = 64


class Exchange:
    """One try of a request, and what came of it; `tries` counts this one and those before it."""

    def __init__(self, request: GenerationRequest, patience_s: float) -> None:
        self.request = request
        self.patience_s = patience_s
        self.tries = 0
        self.to_be_asked_again = False
        self.connection: Connection | None = None
        self.before: Counters | None = None
        self.parts: list[str] = []
        self.finish: FinishReason | None = None
        self.num_prompt_tokens: int | None = None
        self.num_tokens = 0

    def again(self, reason: str, asked_s: float | None) -> TryAgainError:
        self.to_be_asked_again = True
        return TryAgainError(reason, wait_s(self.tries - 1, asked_s))

    def steps(self, chunks: Iterator[Chunk], counter: Counter) -> Iterator[Step]:
        """A step for each chunk with tokens. Closed at the end of the answer, it still hears the server out."""
        for chunk in chunks:
            self._note(chunk)
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
                self._hear_out(chunks, counter)
            raise

    def _hear_out(self, chunks: Iterator[Chunk], counter: Counter) -> None:
        """What comes behind the last token that counts: why it ended, usage, and text that was held back."""
        until = time.monotonic() + self.patience_s
        with suppress(BrokenError):
            for number, chunk in enumerate(chunks, start=1):
                self._note(chunk)
                counter.check(chunk)
                if number > MAX_AFTERWORDS or time.monotonic() > until:
                    raise PromptFailedError("the server does not stop after the last token that it was asked for")

    def _note(self, chunk: Chunk) -> None:
        self.parts.append(chunk.text)
        if chunk.prompt_tokens is not None:
            self.num_prompt_tokens = chunk.prompt_tokens
        if chunk.finish is not None:
            if chunk.finish not in FINISHES:
                raise PromptFailedError(
                    f"the server ended the answer for a reason of its own: {one_line(chunk.finish)}"
                )
            self.finish = FINISHES[chunk.finish]


def wait_s(tries: int, asked_s: float | None) -> float:
    """How long to wait before the next try: what the server asks for, else twice as long each time."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**tries if asked_s is None else asked_s)
