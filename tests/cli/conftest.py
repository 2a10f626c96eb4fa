"""Runs in this process measure the machine's bandwidth in a moment: no test of the command line needs the number."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _short_bandwidth_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdbench.measure.environment.PROBE_NS", 10_000_000)
