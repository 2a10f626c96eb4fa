"""A real server: llama.cpp's, through llama-cpp-python, on the embedded model's file. Skipped where it is missing.

`$SPDBENCH_LLAMACPP_PYTHON` may name another Python that has `llama-cpp-python[server]`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.results.schema import read_result
from spdbench.models.checkpoints.embedded import embedded_gguf
from spdbench.models.checkpoints.folders import cache_folder
from tests.cli.run_helpers import spdbench

PYTHON = os.environ.get("SPDBENCH_LLAMACPP_PYTHON", sys.executable)
PATIENCE_S = 120


def has_server() -> bool:
    command = [PYTHON, "-c", "import llama_cpp.server.app"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(not has_server(), reason=f"{PYTHON} has no llama-cpp-python[server]"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if not list((cache_folder() / "models").glob("SmolLM2*")):
        pytest.skip("the embedded model is not in the cache: run `python -m spdbench.models`")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        PYTHON,
        "-m",
        "llama_cpp.server",
        "--model",
        str(embedded_gguf()),
        "--port",
        str(port),
        "--n_ctx",
        "2048",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/v1/models", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_quick_against_llamacpp(url: str, api: str, tmp_path: Path) -> None:
    words = ("-o", f"openai.base_url={url}", "-o", f"openai.api={api}", "--limit", "2", "--max-new-tokens", "12")
    said = spdbench("run", "quick", "-b", "openai", *words, "--results", tmp_path, "-m", "smollm2")
    assert said.code == 0, said.err
    result = read_result(tmp_path / "quick__openai__smollm2.json")
    assert all(run.text and run.num_new_tokens > 1 for run in result.runs)
    assert result.summary.overall["decode_tokens_per_s"] > 0
    assert result.backend.other_model is not None
    assert spdbench("compare", tmp_path).code == 0
