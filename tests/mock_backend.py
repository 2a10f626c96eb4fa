"""A backend fed from a list, and the small things that a runner needs around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.judge.result import Run
from spdbench.types import BackendKind, GenerationRequest, Message, Span, Step

Script = Callable[[GenerationRequest], Sequence[Step]]


def one_by_one(request: GenerationRequest) -> Sequence[Step]:
    """Vanilla-like: as many tokens as asked for, each the position's number."""
    return [Step((100 + i,), 0, 0, 0, 1.0) for i in range(request.max_new_tokens)]


class MockBackend:
    """Yields what `script` says; keeps a log of everything asked of it."""

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


class WordChat:
    """A token a letter; answers are their ids in words."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(ord(letter) % 50 for message in messages for letter in message["content"])

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[str, int, int]]] = []
        self.traces: list[str] = []

    def finished(self, label: str, run: Run) -> None:
        self.seen.append((label, run.key))

    def crashed(self, label: str, run: Run, trace: str) -> None:  # noqa: ARG002
        self.traces.append(trace)
