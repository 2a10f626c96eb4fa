"""A folder for the inputs of one test, and a limit of memory for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.prompts.render_limits import memory_limit
from tests import hostile


@pytest.fixture(autouse=True)
def _limited() -> Iterator[None]:
    with memory_limit(hostile.MEMORY_LIMIT):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"
