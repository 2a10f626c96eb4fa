"""What was asked of a run, how far it has come of its epochs or of its time, and the learning rate at that point.

Pure numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LAST_SHARE = 0.01
"""Of the learning rate, what is left at the end."""


@dataclass(frozen=True)
class Limits:
    """When a run ends: after `epochs`, after `budget_s` seconds, or whichever comes first; one of them is there."""

    epochs: float | None
    budget_s: float | None

    def progress(self, epochs_done: float, elapsed_s: float, reserve_s: float) -> float:
        """0 at the start, 1 or more at the end. `reserve_s` of the budget are kept for what comes after the last
        step."""
        parts = [0.0]
        if self.epochs is not None:
            parts.append(epochs_done / self.epochs)
        if self.budget_s is not None:
            usable = self.budget_s - reserve_s
            parts.append(elapsed_s / usable if usable > 0 else 1.0)
        return max(parts)


@dataclass(frozen=True)
class Plan:
    """What the user asked of a run."""

    limits: Limits
    rate: float
    seed: int
    batch_tokens: int
    accumulate: int = 1
    warmup_steps: int = 20
    num_evaluations: int = 10
    seconds_between_saves: float = 60.0


@dataclass(frozen=True)
class Data:
    """Sequences by index: their lengths, and which are learned and which held out."""

    lengths: Sequence[int]
    learned: Sequence[int]
    held_out: Sequence[int]


def rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """A line up over the first steps, then half a cosine down with progress."""
    rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    falling = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return rising * (LAST_SHARE + (1 - LAST_SHARE) * falling)
