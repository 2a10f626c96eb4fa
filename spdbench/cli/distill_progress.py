"""How far a data file has come, on stderr: a live bar on a terminal, plain lines elsewhere. Must decide nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.25


class DataProgress:
    """A context in which tokens kept out of `total` are shown, with speed, share dropped and time left."""

    def __init__(self, total: int, done: int) -> None:
        console = Console(stderr=True)
        self._total, self._first = total, done
        self._started = self._last = time.monotonic()
        self._live = (
            Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), console=console, auto_refresh=False)
            if console.is_terminal
            else None
        )
        self._task = self._live.add_task("starting", total=total, completed=done) if self._live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, kept: int, written: int, conversations: int, dropped: int) -> None:
        """Shows, if it is time: tokens kept in all, tokens generated since the start, conversations, those dropped."""
        now = time.monotonic()
        if now - self._last < (SECONDS_BETWEEN_DRAWINGS if self._live else SECONDS_BETWEEN_LINES):
            return
        self._last = now
        words = self.words(kept, written, conversations, dropped)
        if self._live and self._task is not None:
            self._live.update(self._task, completed=kept, description=words, refresh=True)
        else:
            print(words, file=sys.stderr, flush=True)

    def words(self, kept: int, written: int, conversations: int, dropped: int) -> str:
        """`1,200/5,000 tokens kept in 9 conversations, 2 dropped; 310 tok/s kept, 420 generated; about 12 s left`."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = (kept - self._first) / seconds
        left = f"about {(self._total - kept) / speed:.0f} s left" if speed > 0 and kept < self._total else ""
        return "; ".join(
            part
            for part in (
                f"{kept:,}/{self._total:,} tokens kept in {conversations:,} conversations, {dropped:,} dropped",
                f"{speed:.0f} tok/s kept, {written / seconds:.0f} generated",
                left,
            )
            if part
        )
