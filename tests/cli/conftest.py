"""What tests of the command line share. Runs in this process measure the machine's bandwidth in a moment: no test needs
the number."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives it: it is in the dev extra")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()
