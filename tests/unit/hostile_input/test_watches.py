"""What the other tests of this folder rely on notices what it should: code that runs, memory, lost files."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from spdbench.prompts.render_limits import memory_limit
from tests import hostile


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    hostile.RAN.clear()
    hostile.TRIED.clear()
    sys.modules.pop(hostile.CANARY, None)


@pytest.mark.parametrize(
    "reader",
    [
        lambda: importlib.import_module(hostile.CANARY),
        lambda: subprocess.run(["true"], check=True),
        lambda: pickle.loads(pickle.dumps(hostile.Unpickled())),
        lambda: yaml.unsafe_load("!!python/object/apply:tests.hostile.ran []"),
    ],
    ids=["import", "program", "pickle", "yaml"],
)
def test_code_that_a_reader_runs_is_noticed(reader: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        hostile.read("watches", reader)


def test_a_file_that_a_reader_changes_is_noticed(folder: Path) -> None:
    (folder / "x").write_text("some")
    with pytest.raises(AssertionError):
        hostile.read("watches", lambda: (folder / "x").write_text("other"), folder)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit it")
def test_memory_beyond_the_limit_is_refused() -> None:
    with pytest.raises(MemoryError):
        bytearray(hostile.MEMORY_LIMIT + 2**28)
    with memory_limit(2**26), pytest.raises(MemoryError):
        bytearray(2**27)
