"""A real server: llama.cpp's, through llama-cpp-python, on the embedded model's file. Skipped where it is missing.

`$SPDBENCH_LLAMACPP_PYTHON` may name another Python that has `llama-cpp-python[server]`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.results.schema import read_result
from spdbench.models.checkpoints.embedded import embedded_gguf
from tests.cli.run_helpers import spdbench
from tests.processes.servers import require_embedded_model, serving

PYTHON = os.environ.get("SPDBENCH_LLAMACPP_PYTHON", sys.executable)


def has_server() -> bool:
    command = [PYTHON, "-c", "import llama_cpp.server.app"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(not has_server(), reason=f"{PYTHON} has no llama-cpp-python[server]"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    require_embedded_model()
    model = str(embedded_gguf())

    def command(port: int) -> list[str]:
        return [PYTHON, "-m", "llama_cpp.server", "--model", model, "--port", str(port), "--n_ctx", "2048"]

    with serving(command, "/v1/models") as address:
        yield address


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
