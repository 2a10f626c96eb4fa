"""A stub server, and the backend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from spdbench.backend import BackendContext, parse_options
from spdbench_backends.openai.backend import OpenAI
from tests.stub_server import StubServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stub = StubServer()
    yield stub
    stub.close()


Make = Callable[..., OpenAI]


def context(tokenizer: Any = None, **template_args: Any) -> BackendContext:
    """All that the backend asks of a target is its tokenizer, which may not be there."""
    target: Any = SimpleNamespace(tokenizer=tokenizer)
    return BackendContext("openai", target, "auto", ("cpu",), 1, 0, template_args)


@pytest.fixture
def backend(server: StubServer) -> Make:
    """Makes the backend with options, not loaded yet."""

    def make(**options: str) -> OpenAI:
        given = {"base_url": server.url, "model": "stub", "timeout_s": "5", **options}
        return OpenAI(parse_options("openai", OpenAI.Options, given), context())

    return make
