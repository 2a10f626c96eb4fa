"""What tests of the command line share. Runs in this process measure the machine's bandwidth in a moment and ask git
once: no test needs the number, and none changes this checkout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spdbench.measure.environment import git_output
from tests.cli.sweeps import tiny_sweep

git_output_once = cache(git_output)


@pytest.fixture(autouse=True)
def _short_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdbench.measure.environment.PROBE_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("spdbench.measure.environment.PROBE_NS", 1_000_000)
    monkeypatch.setattr("spdbench.measure.environment.git_output", git_output_once)


@pytest.fixture
def sweep(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_sweep(tiny_model, tmp_path)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window."""
    pytest.importorskip("selenium.webdriver", reason="selenium drives it: it is in the dev extra")
    from docs.screenshots import find_browser, open_browser

    if (there := find_browser()) is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    found = open_browser(*there, profile, logs={"browser": "ALL", "performance": "ALL"})
    yield found
    found.quit()
