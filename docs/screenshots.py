"""Takes the screenshots of README and docs: a report of real results, in a headless browser.

    spdbench run quick -b vanilla -b spd -b eagle -b medusa --limit 16 --results results
    python docs/screenshots.py results/quick__*.json --out docs/images

Needs chromium and chromedriver, and `pip install 'spdbench[report]' selenium`.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

SHOTS = {"report-light": (1280, "light"), "report-dark": (1280, "dark"), "report-narrow": (380, "light")}
"""Name -> width and colour scheme."""
FIRST_SCREEN = 900


def main() -> None:
    """Writes one PNG a shot: the first screen, or with --whole the whole page."""
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
        browser = _browser()
        try:
            for name, (width, scheme) in SHOTS.items():
                path = chosen.out / f"{name}.png"
                path.write_bytes(_shot(browser, page, width, scheme, whole=chosen.whole))
                print(f"Wrote {path}")
        finally:
            browser.quit()


def _browser() -> Any:
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        sys.exit("screenshots need chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def _shot(browser: Any, page: Path, width: int, scheme: str, *, whole: bool) -> bytes:
    """The page as PNG, once its charts are drawn."""
    screen = {"width": width, "height": FIRST_SCREEN, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda one: one.execute_script("return document.body.dataset.drawn === 'yes'"))
    height = browser.execute_script("return document.documentElement.scrollHeight") if whole else FIRST_SCREEN
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main()
