"""The live view of `run` and `audit`: a bar a backend with its speed so far; plain lines where nothing can be redrawn.

Drawn by the thread that reports a finished request, so between requests: nothing is computed or drawn while one is
timed. A drawing waits until 200 times as long has passed as the last one took, so that drawings take less than 0.5 % of
a run's time on any terminal and processor. A backend that takes several requests at once leaves no time between them;
while it works, the view is drawn every 10 seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spdbench.cli.progress import BAR_WIDTH, SECONDS_BETWEEN_DRAWINGS, SECONDS_BETWEEN_LINES, duration, duration_left
from spdbench.console import can_redraw, printable, say
from spdbench.judge.metrics.definitions import ratios_for
from spdbench.judge.metrics.metrics import SPEED
from spdbench.judge.metrics.stats import Interval, ratio_interval
from spdbench.judge.results.schema import BackendRecord, Run
from spdbench.judge.results.table import COLUMN, COLUMNS, table_from

MAX_SHARE = 0.005
"""Of the time between two drawings, what the first of them may have taken."""
MAX_GROUPS = 100
"""Conversations are added up in this many groups, so that an interval takes constant time and memory."""
RESAMPLES = 1_000
"""A tenth of what results are computed with: enough for three digits of a speed."""
MIN_BAR_WIDTH, GAP, MAX_LABEL = 6, 2, 24
KEPT_FIRST = ("requests", "tok/s", "bar", "accepted", "95 % interval", "left")
"""The columns in the order in which a narrow terminal loses them, the last first."""
SHOWN = ("bar", "requests", "left", "tok/s", "95 % interval", "accepted")

Screen = Literal["live", "lines", "nothing"]


class Tally:
    """What one backend's requests add up to so far: `done` of `total`, and the metrics of a result made of them.

    Requests that an earlier process finished count as done and for nothing else. `width` is the number of requests that
    the backend takes at once.
    """

    def __init__(self, record: BackendRecord, total: int, done: int = 0, width: int = 1) -> None:
        self.record, self.total, self.done, self.width = record, total, done, width
        self.failed = 0
        self._finished, self._elapsed_s = 0, 0.0
        self._ratios = ratios_for(record, None)
        self._sums = np.zeros(len(COLUMNS))
        self._group_of: dict[str, int] = {}
        self._groups: list[NDArray[np.float64]] = []
        self._interval: Interval | None = None
        self._is_stale = False

    def add(self, run: Run, elapsed_s: float) -> None:
        """One more request, which took `elapsed_s` with everything around it."""
        self.done += 1
        self._finished += 1
        self._elapsed_s += elapsed_s
        table = table_from([run])
        if table.failed[0]:
            self.failed += 1
            return
        self._sums += table.sums[0]
        group = self._group_of.setdefault(run.prompt_id, len(self._group_of) % MAX_GROUPS)
        if group == len(self._groups):
            self._groups.append(np.zeros(2))
        self._groups[group] += table.sums[0][[COLUMN["decode_tokens"], COLUMN["decode_s"]]]
        self._is_stale = True

    def metric(self, name: str) -> float | None:
        """A ratio of docs/metrics.md over all requests so far; None where it is null."""
        value = float(self._ratios[name].of(self._sums)) if name in self._ratios else float("nan")
        return value if np.isfinite(value) else None

    def interval(self) -> Interval | None:
        """95 % interval of the decode speed in tokens/s; None with fewer than two conversations."""
        if self._is_stale:
            keys = [(str(group), 0, 0) for group in range(len(self._groups))]
            self._interval = ratio_interval(keys, np.array(self._groups), resamples=RESAMPLES)
            self._is_stale = False
        return self._interval

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining requests take at the pace so far; None before the first."""
        remaining = self.total - self.done
        if not remaining:
            return 0.0
        return self._elapsed_s / self._finished * remaining if self._finished else None


class LiveView:
    """A context in which the state of a run is shown on `console`, stderr by default. Observes a `Runner`."""

    def __init__(self, tallies: Sequence[Tally], screen: Screen | None = None, console: Console | None = None) -> None:
        """`screen` None means `live` on a terminal that can be redrawn, else `lines`."""
        self._tallies = {tally.record.label: tally for tally in tallies}
        self._screen = screen or ("live" if can_redraw(sys.stderr) else "lines")
        # Not left to rich, for which FORCE_COLOR makes a file a terminal.
        self._console = console or Console(stderr=True, force_terminal=self._screen == "live", highlight=False)
        # stdout is not redirected, since it may lead elsewhere. Notes on stderr appear above the view.
        self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._seen = self._drawn = time.monotonic()
        self._drawing_s = 0.0

    def __enter__(self) -> Self:
        self._seen = self._drawn = time.monotonic()
        if self._screen == "live":
            self._live.update(self._frame())
            self._live.start(refresh=True)
            # A hidden cursor would stay hidden after a SIGKILL or Ctrl-Z.
            self._console.show_cursor(True)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):  # the terminal is gone
            self._live.stop()

    def finished(self, label: str, run: Run) -> None:
        """Counts a request, and draws if it is time."""
        tally, now = self._tallies[label], time.monotonic()
        tally.add(run, now - self._seen)
        self._seen = now
        is_last = all(other.done == other.total for other in self._tallies.values())
        if now - self._drawn >= self.pause_s(tally) or (is_last and self._screen == "lines"):
            self.draw()

    def crashed(self, label: str, run: Run, trace: str) -> None:
        say(f"{label} failed on prompt {run.prompt_id}:\n{trace}", error=True)

    def draw(self) -> None:
        """Shows the state as it is now."""
        began = time.monotonic()
        if self._screen == "live":
            self._live.update(self._frame(), refresh=True)
        elif self._screen == "lines":
            print(printable(self._line(), one_line=True), file=self._console.file, flush=True)
        self._drawn = time.monotonic()
        self._drawing_s = self._drawn - began

    def pause_s(self, tally: Tally) -> float:
        """Seconds from one drawing to the next after requests of `tally`, as long as the last drawing took now."""
        if self._screen == "lines" or tally.width > 1:
            return SECONDS_BETWEEN_LINES
        return max(SECONDS_BETWEEN_DRAWINGS, self._drawing_s / MAX_SHARE)

    @property
    def _state(self) -> str:
        """`12/40 requests, about 30 s left`."""
        tallies = self._tallies.values()
        words = f"{sum(tally.done for tally in tallies):,}/{sum(tally.total for tally in tallies):,} requests"
        left = [tally.left_s for tally in tallies]
        known = [seconds for seconds in left if seconds is not None]
        return f"{words}, {duration_left(sum(known))}" if len(known) == len(left) and any(known) else words

    def _line(self) -> str:
        labels = []
        for label, tally in self._tallies.items():
            if tally.done == 0:
                continue
            cells = _cells(tally)
            words = [f"{cells['tok/s']} tok/s" if cells["tok/s"] else "no tokens yet", cells["95 % interval"]]
            accepted, failed = cells["accepted"], tally.failed
            parts = (
                " ".join(filter(None, words)),
                accepted and f"{accepted} accepted",
                f"{failed} failed" if failed else "",
            )
            labels.append(f"{label} {', '.join(filter(None, parts))}")
        return f"{self._state}: {'; '.join(labels)}"

    def _frame(self) -> RenderableType:
        """All lines of the view; none is wider than the terminal."""
        labels = [printable(label, one_line=True) for label in self._tallies]
        rows = [_cells(tally) for tally in self._tallies.values()]
        width = self._console.width
        label_width = min(max(map(len, labels)), MAX_LABEL, max(1, width // 3))
        widths = _fit(
            {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}, width - label_width
        )
        table = Table.grid(padding=(0, GAP, 0, 0))
        table.add_column(width=label_width, no_wrap=True, overflow="ellipsis")
        for name, column_width in widths.items():
            justify: Literal["left", "right"] = "left" if name == "bar" else "right"
            table.add_column(width=column_width, no_wrap=True, justify=justify)
        heading = ["", *("" if name == "bar" else name for name in widths)]
        table.add_row(*(Text(cell) for cell in heading), style="dim")
        for label, row, tally in zip(labels, rows, self._tallies.values(), strict=True):
            bar = ProgressBar(total=max(1, tally.total), completed=tally.done, width=widths.get("bar", 1))
            table.add_row(Text(label), *(bar if name == "bar" else Text(row[name]) for name in widths))
        stages = [f"{label}: {line}" for label, tally in self._tallies.items() if (line := _stage_line(tally))]
        lines = [Text(printable(line, one_line=True), no_wrap=True, overflow="ellipsis") for line in stages]
        return Group(Text(self._state, no_wrap=True, overflow="ellipsis"), table, *lines)


def _cells(tally: Tally) -> dict[str, str]:
    """One backend's columns by heading; empty where nothing is known. The bar's is only as wide as the least bar."""
    speed, accepted, interval = tally.metric(SPEED), tally.metric("acceptance_rate"), tally.interval()
    return {
        "bar": " " * MIN_BAR_WIDTH,
        "requests": f"{tally.done:,}/{tally.total:,}" + (f", {tally.failed:,} failed" if tally.failed else ""),
        "left": duration(tally.left_s) if tally.left_s else "",
        "tok/s": "" if speed is None else f"{speed:.1f}",
        "95 % interval": "" if interval is None else f"[{interval[0]:.1f}, {interval[1]:.1f}]",
        "accepted": "" if accepted is None else f"{accepted:.0%}",
    }


def _fit(widths: dict[str, int], room: int) -> dict[str, int]:
    """The columns that fit into `room`, in the order in which they are shown; what is left goes to the bar."""
    kept = set()
    for name in KEPT_FIRST:
        if (width := GAP + widths[name]) > room:
            break
        kept.add(name)
        room -= width
    found = {name: widths[name] for name in SHOWN if name in kept}
    if "bar" in found:
        found["bar"] = min(BAR_WIDTH, found["bar"] + room)
    return found


def _stage_line(tally: Tally) -> str:
    """A pipeline's stages, tokens a cycle, and what its lanes did with the decode time; empty for other backends."""
    record = tally.record
    if record.kind != "pipeline":
        return ""
    parts = [f"{' + '.join(map(str, record.stage_layers))} layers"]
    tokens = tally.metric("tokens_per_cycle")
    if tokens is not None:
        parts.append(f"{tokens:.2f} tokens a cycle")
    shares = {name: tally.metric(name) for name in ("useful", "wasted", "bubble_ratio")}
    if shares["useful"] is not None:
        words = {"useful": "useful", "wasted": "wasted", "bubble_ratio": "bubble"}
        parts.append(", ".join(f"{share or 0:.0%} {words[name]}" for name, share in shares.items()))
    return "; ".join(parts)
