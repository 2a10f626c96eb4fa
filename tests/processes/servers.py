"""Real servers as processes of their own, for tests that ask them over loopback."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest

from spdbench.models.checkpoints.folders import cache_folder

PATIENCE_S = 120


def require_embedded_model() -> None:
    """Skips the test where the embedded model would have to be fetched."""
    if not list((cache_folder() / "models").glob("SmolLM2*")):
        pytest.skip("the embedded model is not in the cache: run `python -m spdbench.models`")


@contextmanager
def serving(
    command: Callable[[int], Sequence[str]], answers_at: str, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of a server that `command(port)` starts on a free port, once it answers at the path `answers_at`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(command(port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}{answers_at}", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")
