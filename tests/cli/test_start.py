"""What a run on our own layers does not import once model and machine are known: it would take longer than the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spdbench.models.cpu.native import native_functions
from tests import tiny

SLOW = (
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "huggingface_hub",
    "httpx",
    "numba",
    "scipy",
    "pandas",
    "sympy",
    "gguf",
)
SCRIPT = """
import sys
from spdbench.cli.main import run
code = run(sys.argv[1:])
print("loaded:", *sorted(name for name in sys.modules))
sys.exit(code)
"""


def modules_of_a_run(folder: Path, model: Path, *words: str) -> set[str]:
    """The modules that are loaded at the end of `spdbench run`."""
    command = ["run", "quick", "--limit", "1", "--max-new-tokens", "2", "-m", str(model), "--results", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command, *words],
        env={**os.environ, "SPDBENCH_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.skipif(native_functions() is None, reason="numba is not installed")
@pytest.mark.parametrize("backend", ["vanilla", "ngram", "eagle"])
def test_the_second_run_imports_nothing_slow(tmp_path: Path, backend: str) -> None:
    model = tiny.make_model(tmp_path / "model", max_position_embeddings=2048)
    words = ["-b", backend, *(["--drafter", "random"] if backend == "eagle" else [])]
    first, second = (modules_of_a_run(tmp_path, model, *words) for _ in range(2))
    assert "transformers" in first
    assert not [name for name in SLOW if name in second]
    assert {"torch", "tokenizers", "jinja2"} <= second
