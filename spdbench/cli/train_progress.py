"""How a training run goes, on stderr: a line now and then, redrawn in place on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.5
SMOOTHING = 0.95
"""Weight of the past in the loss that is shown."""


class TrainingProgress:
    """Loss, held-out acceptance and time left."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._pause = SECONDS_BETWEEN_DRAWINGS if self._live else SECONDS_BETWEEN_LINES
        self._last = 0.0
        self._loss: float | None = None

    def step(self, step: int, loss: float, acceptance: float, progress: float, left_s: float) -> None:
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        if time.monotonic() - self._last < self._pause:
            return
        self._last = time.monotonic()
        left = "" if math.isnan(left_s) else f", about {_minutes(left_s)} left"
        self._say(f"step {step} ({progress:.0%}): loss {self._loss:.3f}, held-out acceptance {acceptance:.1%}{left}")

    def evaluated(self, step: int, rates: Sequence[float], best: bool) -> None:
        words = ", ".join(f"{rate:.1%}" for rate in rates)
        self._say(f"step {step}: held-out acceptance {words}{' (best so far)' if best else ''}", stays=True)

    def _say(self, line: str, *, stays: bool = False) -> None:
        end = "\n" if stays or not self._live else ""
        print(f"\r\033[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
