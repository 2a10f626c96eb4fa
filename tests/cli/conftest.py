"""What tests of the command line share. Runs in this process measure the machine's bandwidth in a moment: no test needs
the number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.sweeps import tiny_sweep


@pytest.fixture(autouse=True)
def _short_bandwidth_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdbench.measure.environment.PROBE_NS", 10_000_000)


@pytest.fixture
def sweep(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_sweep(tiny_model, tmp_path)
