"""Whether processes that nobody hears from still get on: by processor time and by what they read from disk.

Of the time only the main thread's counts, for others poll: gloo's does, in a process that only waits. Linux tells
(proc(5), `stat` and `io`); elsewhere processes are always taken to get on. Must not know what they do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path


class Progress:
    """A watch over some processes. `silence_s`: seconds since one of them was last seen to have got on."""

    def __init__(self, process_ids: Iterable[int]) -> None:
        self._process_ids = tuple(process_ids)
        self._seen = self._used()
        self._at = time.monotonic()

    @property
    def silence_s(self) -> float:
        now, used = time.monotonic(), self._used()
        if used != self._seen or sys.platform != "linux":
            self._seen, self._at = used, now
        return now - self._at

    def _used(self) -> list[tuple[str, ...]]:
        return [_used_by(process_id) for process_id in self._process_ids]


def _used_by(process_id: int) -> tuple[str, ...]:
    """The main thread's ticks in user and system mode, and bytes read from storage; empty where they are not told."""
    folder = Path(f"/proc/{process_id}")
    try:
        after_name = (folder / "task" / str(process_id) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        read = [line for line in (folder / "io").read_text().splitlines() if line.startswith("read_bytes")]
    except OSError:
        return ()
    return (after_name[11], after_name[12], *read)
