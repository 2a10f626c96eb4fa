"""Backends that yield prepared steps, and the small mocks that a runner needs besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.judge.results.schema import Run
from spdbench.types import BackendKind, GenerationRequest, Message, Span, SpanKind, Step

MS = 1_000_000
Script = Callable[[GenerationRequest], Sequence[Step]]


def one_by_one(request: GenerationRequest) -> Sequence[Step]:
    """As vanilla: as many tokens as requested, one a step, numbered from 100."""
    return [Step((100 + i,), 0, 0, 0, 1.0) for i in range(request.max_new_tokens)]


class MockBackend:
    """Yields the steps of `script`; logs every call."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    kind: ClassVar[BackendKind] = "autoregressive"

    def __init__(self, script: Script = one_by_one, log: list[str] | None = None) -> None:
        self.script = script
        self.lossless = True
        self.log = log if log is not None else []
        self.requests: list[GenerationRequest] = []

    def load(self) -> None:
        self.log.append("load")

    def describe(self) -> BackendInfo:
        return BackendInfo(("cpu",), (1000,), (2,))

    def prepare(self, request: GenerationRequest) -> None:  # noqa: ARG002
        self.log.append("prepare")

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.requests.append(request)
        self.log.append("generate")
        try:
            yield from self.script(request)
        finally:
            self.log.append("closed")

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        self.log.append("close")


class MockDraftVerify(MockBackend):
    kind: ClassVar[BackendKind] = "draft_verify"


class MockPipeline(MockBackend):
    kind: ClassVar[BackendKind] = "pipeline"


class FakeTime:
    """A clock that moves only by `spend`; replaces the module `time` where a request is measured."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def spend(self, ns: int) -> tuple[int, int]:
        """Moves the clock by `ns`; returns its readings before and after."""
        start, self.now_ns = self.now_ns, self.now_ns + ns
        return start, self.now_ns


class MockSpans(MockDraftVerify):
    """Two tokens a step on one lane, with spans, on a clock that only its own work moves.

    After a prefill of 50 ms each step drafts for 20, runs the target for 60, verifies for 10, and spends 5 on the host
    and 5 without a span.
    """

    time: ClassVar[FakeTime] = FakeTime()

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.taken: list[Span] = []

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.requests.append(request)
        self.taken = []
        self._span("target", 50)
        yield Step((100,), 0, 0, 0, 1.0)
        for position in range(1, request.max_new_tokens, 2):
            self._span("draft", 20)
            self._span("target", 60)
            self._span("verify", 10)
            self._span("host", 5)
            self.time.spend(5 * MS)
            yield Step((100 + position, 101 + position), 1, 1, 1, 2.0)

    def spans(self) -> Sequence[Span]:
        return self.taken

    def _span(self, kind: SpanKind, ms: int) -> None:
        self.taken.append(Span(0, kind, *self.time.spend(ms * MS), position=0, kept=True))


class MockPipelineSpans(MockSpans):
    """Three lanes: cycles of 100 ms in which they work for 50, 80 and 60; two cycles fill the pipeline, the others each
    emit a token."""

    kind: ClassVar[BackendKind] = "pipeline"

    def describe(self) -> BackendInfo:
        return BackendInfo(("cpu",), (1000, 1000, 1000), (2, 2, 2))

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.taken = []
        self.time.spend(50 * MS)
        yield Step((100,), 0, 0, 0, 1.0)
        for cycle in range(request.max_new_tokens + 1):
            start, _ = self.time.spend(100 * MS)
            for lane, busy in enumerate((50, 80, 60)[: cycle + 1]):
                self.taken.append(Span(lane, "target", start, start + busy * MS, cycle - lane, kept=True))
            self.taken.append(Span(3, "host", start + 80 * MS, start + 96 * MS, 0, kept=True))
            full = cycle >= 2
            yield Step((100 + cycle,) * full, int(full), int(full), int(full), min(cycle + 1, 3) / 3)


class WordChat:
    """A chat with one token a letter; an answer's text is its ids, separated by spaces."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(ord(letter) % 50 for message in messages for letter in message["content"])

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Watcher:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[str, int, int]]] = []
        self.traces: list[str] = []

    def finished(self, label: str, run: Run) -> None:
        self.seen.append((label, run.key))

    def crashed(self, label: str, run: Run, trace: str) -> None:  # noqa: ARG002
        self.traces.append(trace)
