"""Backends whose steps exist already, so that only the harness takes time, and what a runner needs besides."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.types import BackendKind, Drafted, GenerationRequest, Message, Span, SpanKind, Step

NUM_TOKENS, DEPTH = 64, 4


class NothingToLoad:
    """What a backend without a model answers to a runner."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions

    def load(self) -> None: ...
    def close(self) -> None: ...
    def prepare(self, request: GenerationRequest) -> None: ...

    def describe(self) -> BackendInfo:
        return BackendInfo(("cpu",), (1,))

    def spans(self) -> Sequence[Span]:
        return ()


class FreeSteps(NothingToLoad):
    """A backend whose steps exist already, so that generating costs nothing."""

    kind: ClassVar[BackendKind] = "autoregressive"
    lossless = True

    def __init__(self) -> None:
        tokens = tuple(7919 * index % 49_152 for index in range(NUM_TOKENS))
        self._steps = [Step(tokens[:1], 0, 0, 0, 1.0)]
        while done := sum(len(step.token_ids) for step in self._steps):
            if done == NUM_TOKENS:
                break
            self._steps.append(self.step(tokens[done : done + 1 + done % (DEPTH + 1)]))

    def step(self, tokens: tuple[int, ...]) -> Step:
        return Step(tokens[:1], 0, 0, 0, 1.0)

    def generate(self, request: GenerationRequest) -> Iterator[Step]:  # noqa: ARG002
        yield from self._steps


class FreeDrafts(FreeSteps):
    """The same tokens in rounds of one to five."""

    kind: ClassVar[BackendKind] = "draft_verify"

    def step(self, tokens: tuple[int, ...]) -> Step:
        return Step(tokens, DEPTH, min(len(tokens), DEPTH), len(tokens) - 1, DEPTH + 1.0)


class KeptDrafts(FreeDrafts):
    """The same with the drafted tokens in each step, and the spans of every round."""

    SHARES: ClassVar[Sequence[tuple[SpanKind, int]]] = (("draft", 2), ("target", 6), ("verify", 1), ("host", 1))

    def step(self, tokens: tuple[int, ...]) -> Step:
        drafts = Drafted((*tokens, *range(DEPTH))[:DEPTH], tuple(range(-1, DEPTH - 1)))
        return super().step(tokens)._replace(drafts=drafts)

    def spans(self) -> Sequence[Span]:
        now, found = time.perf_counter_ns(), []
        for position in range(len(self._steps)):
            for kind, ns in self.SHARES:
                found.append(Span(0, kind, now, now + ns, position, True))
                now += ns
        return found


BACKENDS = {"vanilla": FreeSteps, "drafts": FreeDrafts, "kept": KeptDrafts}


class Letters:
    """A chat with one token a letter."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(ord(letter) for message in messages for letter in message["content"])

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
