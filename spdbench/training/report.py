"""Who is told how a run goes. Must not know who asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Report(Protocol):
    """Who tells the user how it goes."""

    def step(self, step: int, loss: float, acceptance: float, progress: float, left_s: float) -> None: ...
    def evaluated(self, step: int, rates: Sequence[float], best: bool) -> None: ...


class Silence:
    """Tells nothing."""

    def step(self, step: int, loss: float, acceptance: float, progress: float, left_s: float) -> None: ...
    def evaluated(self, step: int, rates: Sequence[float], best: bool) -> None: ...
