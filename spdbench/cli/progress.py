"""Progress on stderr: a live bar on a terminal, plain lines elsewhere.

Must not decide anything, nor do anything while a request is being timed: the bar is drawn between requests, by no
thread of its own.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spdbench.judge.results.schema import Run

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_DRAWINGS = 0.25


class _Totals:
    """Running totals of one label."""

    def __init__(self) -> None:
        self.tokens = self.judged = self.accepted = 0
        self.seconds = 0.0

    def add(self, run: Run) -> None:
        self.tokens += max(0, run.num_new_tokens - 1)
        self.seconds += run.decode_s or 0.0
        self.judged += sum(run.steps.judged)
        self.accepted += sum(run.steps.accepted)

    def __str__(self) -> str:
        speed = f"{self.tokens / self.seconds:.1f} tok/s" if self.seconds else "no tokens yet"
        return f"{speed}, {self.accepted / self.judged:.0%} accepted" if self.judged else speed


class ProgressReport(Protocol):
    """A context in which finished requests are shown."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def finished(self, label: str, run: Run) -> None: ...
    def crashed(self, label: str, run: Run, trace: str) -> None: ...


def progress_report(total: int, done: int) -> ProgressReport:
    """For `total` requests of which `done` are behind us."""
    console = Console(stderr=True)
    return LiveBar(console, total, done) if console.is_terminal else PlainLines(total, done)


class LiveBar:
    """A bar with time left and each label's speed and acceptance so far."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that draws takes 0.7 % of a core, from what is measured
        )
        self._task = self._progress.add_task("starting", total=total, completed=done)
        self._last_drawing = time.monotonic()
        self._totals: dict[str, _Totals] = defaultdict(_Totals)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def finished(self, label: str, run: Run) -> None:
        self._totals[label].add(run)
        words = "  ".join(f"{name} {totals}" for name, totals in self._totals.items())
        now = time.monotonic()
        due = now - self._last_drawing >= SECONDS_BETWEEN_DRAWINGS
        self._progress.update(self._task, advance=1, description=words, refresh=due)
        if due:
            self._last_drawing = now

    def crashed(self, label: str, run: Run, trace: str) -> None:
        self._progress.console.print(
            f"{label} failed on prompt {run.prompt_id}:\n{trace}", markup=False, highlight=False
        )


class PlainLines:
    """A line now and then, for logs and pipes."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._started, self._first = time.monotonic(), done
        self._last_line = self._started
        self._totals: dict[str, _Totals] = defaultdict(_Totals)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def finished(self, label: str, run: Run) -> None:
        self._totals[label].add(run)
        self._done += 1
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last_line = now
        left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
        words = "; ".join(f"{name} {totals}" for name, totals in self._totals.items())
        print(f"{self._done}/{self._total} requests, about {left:.0f} s left: {words}", file=sys.stderr, flush=True)

    def crashed(self, label: str, run: Run, trace: str) -> None:
        print(f"{label} failed on prompt {run.prompt_id}:\n{trace}", file=sys.stderr, flush=True)
