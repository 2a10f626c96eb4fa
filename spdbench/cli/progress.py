"""Progress on stderr: one line that is redrawn on a terminal, a line now and then elsewhere.

Drawn by the thread that reports. `run` and `audit` have a view of their own, `spdbench.cli.run.live_view`.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from spdbench.console import CLEAR, can_redraw, printable, say

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.25
BAR_WIDTH = 20
SMOOTHING = 0.95
"""Weight of the past in the training loss that is shown."""


class Progress:
    """A context in which the state of something long is shown. `done` of `total` units are finished at its start."""

    def __init__(self, total: float = 1.0, done: float = 0.0) -> None:
        self._live = can_redraw(sys.stderr)
        self._total, self._first, self._done = total, done, done
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print(CLEAR, end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the start; more than 0."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def left(self) -> str:
        """`about 12 s left`, at the speed so far; empty before anything is done and at the end."""
        done = self._done - self._first
        return (
            duration_left(self.seconds / done * (self._total - self._done)) if done and self._done < self._total else ""
        )

    def show(self, done: float, words: str, *, last: bool = False) -> None:
        """Shows `words`, if it is time or `last`."""
        self._done = done
        now = time.monotonic()
        pause = SECONDS_BETWEEN_DRAWINGS if self._live else SECONDS_BETWEEN_LINES
        if now - self._last < pause and not (last and not self._live):
            return
        self._last = now
        words = printable(words, one_line=True)
        if self._live:
            full = round(BAR_WIDTH * min(1.0, done / self._total))
            line = f"{'━' * full}{'─' * (BAR_WIDTH - full)} {words}"
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be cleared
            print(f"{CLEAR}{line[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(words, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`12 s`, `12 min` or `12 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def duration_left(seconds: float) -> str:
    return f"about {duration(seconds)} left"


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Shows `words` on a terminal while the block runs; elsewhere nothing."""
    live = can_redraw(sys.stderr)
    if live:
        print(f"{CLEAR}{printable(words, one_line=True)}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if live:
            print(CLEAR, end="", file=sys.stderr, flush=True)


class DataProgress(Progress):
    """Tokens of training data kept out of `total`, with speed, share dropped and time left."""

    def update(self, kept: int, written: int, conversations: int, dropped: int) -> None:
        self.show(kept, self.words(kept, written, conversations, dropped))

    def words(self, kept: int, written: int, conversations: int, dropped: int) -> str:
        """Tokens kept in all, tokens generated since the start, conversations kept and dropped, time left."""
        self._done = kept
        parts = (
            f"{kept:,}/{self._total:,} tokens kept in {conversations:,} conversations, {dropped:,} dropped",
            self._speeds(kept - self._first, written),
            self.left,
        )
        return "; ".join(filter(None, parts))

    def _speeds(self, kept: float, written: int) -> str:
        """Nothing is kept before the first conversation ends, which says nothing of the speed."""
        generated = f"{_rate(written / self.seconds)} tok/s generated"
        return f"{_rate(kept / self.seconds)} tok/s kept, {generated}" if kept else generated


def _rate(tokens_per_s: float) -> str:
    """A number that is never rounded to 0."""
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"


class TrainingProgress(Progress):
    """Loss, held-out acceptance and time left of a training run."""

    _loss: float | None = None

    def step(self, step: int, loss: float, acceptance: float, progress: float, left_s: float) -> None:
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        left = "" if math.isnan(left_s) else f", {duration_left(left_s)}"
        words = f"step {step} ({progress:.0%}): loss {self._loss:.3f}, held-out acceptance {acceptance:.1%}{left}"
        self.show(progress, words)

    def evaluated(self, step: int, rates: Sequence[float], best: bool) -> None:
        words = ", ".join(f"{rate:.1%}" for rate in rates)
        say(f"step {step}: held-out acceptance {words}{' (best so far)' if best else ''}")
