"""Takes the screenshots of README and docs: a report of real results, in a headless browser.

    make demo
    python docs/screenshots.py results/quick__*.json --out docs/images

Needs chromium and chromedriver, and `pip install -e '.[report]' selenium`.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

SHOTS = {"report-light": (1280, "light"), "report-dark": (1280, "dark"), "report-narrow": (380, "light")}
"""Name -> width and colour scheme."""
FIRST_SCREEN = 900
DETAILS_WIDTH, DETAILS_HEIGHT = 960, 1600
"""Of the page for a single figure and an answer."""


def main() -> None:
    """Writes one PNG a shot: the first screen, or with --whole the whole page; an answer with its drafts and the
    timeline, where the results keep drafts and spans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="result files, or one report")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--whole", action="store_true", help="the whole page instead of its first screen")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        command = [sys.executable, "-m", "spdbench", "report", *chosen.results, "-o", str(page)]
        subprocess.run(command, check=True)
        if (found := find_browser()) is None:
            sys.exit("screenshots need chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
        browser = open_browser(*found)
        try:
            for name, (width, scheme) in SHOTS.items():
                _write(chosen.out / f"{name}.png", _shot(browser, page, width, scheme, whole=chosen.whole))
            _shot(browser, page, DETAILS_WIDTH, "light", whole=False)
            _set_screen(browser, DETAILS_WIDTH, DETAILS_HEIGHT)
            timeline = browser.find_element("id", "timeline")
            if timeline.find_elements("class name", "chart"):
                _write(chosen.out / "report-timeline.png", timeline.screenshot_as_png)
            browser.execute_script("document.querySelector('button.answer').click()")
            if browser.find_element("id", "answer-legend").is_displayed():
                browser.find_element("id", "answer-unused").click()
                _write(chosen.out / "report-answer.png", browser.find_element("id", "answer").screenshot_as_png)
        finally:
            browser.quit()


def _write(path: Path, picture: bytes) -> None:
    path.write_bytes(picture)
    print(f"Wrote {path}")


def find_browser() -> tuple[str, str] | None:
    """Chromium and its driver, if both are there."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    return None if binary is None or driver is None else (binary, driver)


def open_browser(binary: str, driver: str, *more: str, logs: Mapping[str, str] | None = None) -> Any:
    """Chromium without a window, with `more` words of its command line; it keeps the `logs`."""
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        *more,
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", dict(logs or {}))
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def _set_screen(browser: Any, width: int, height: int) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def _shot(browser: Any, page: Path, width: int, scheme: str, *, whole: bool) -> bytes:
    """The page as PNG, without its outer margins, once its charts are drawn."""
    _set_screen(browser, width, FIRST_SCREEN)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda one: one.execute_script("return document.body.dataset.drawn === 'yes'"))
    height = browser.execute_script("return document.documentElement.scrollHeight") if whole else FIRST_SCREEN
    left, used = browser.execute_script(
        "const body = document.body.getBoundingClientRect(); return [body.x, body.width]"
    )
    clip = {"x": left, "y": 0, "width": used, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main()
