"""Which sequences each step reads, how far a run has come, and the learning rate at that point.

Everything follows from the seed and plain numbers, so that an interrupted run finds its place again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

LAST_SHARE = 0.01
"""Share of the learning rate that is left at the end."""
POOL_BATCHES = 16
"""Batches' worth of sequences that are sorted by length together: little padding, and still every epoch differs."""


@dataclass(frozen=True)
class Plan:
    """What the user asked of a run. It ends after `epochs`, after `budget_s` seconds, or whichever comes first; one of
    them is given."""

    epochs: float | None
    budget_s: float | None
    rate: float
    seed: int
    batch_tokens: int
    accumulate: int = 1
    warmup_steps: int = 20
    num_evaluations: int = 10
    seconds_between_saves: float = 60.0

    def progress(self, epochs_done: float, elapsed_s: float, reserve_s: float) -> float:
        """0 at the start, 1 or more at the end; `reserve_s` of the budget are kept for the work after the last step."""
        parts = [0.0]
        if self.epochs is not None:
            parts.append(epochs_done / self.epochs)
        if self.budget_s is not None:
            usable = self.budget_s - reserve_s
            parts.append(elapsed_s / usable if usable > 0 else 1.0)
        return max(parts)


@dataclass(frozen=True)
class Data:
    """Sequences by index: their lengths, which are learned from and which are held out."""

    lengths: Sequence[int]
    learned: Sequence[int]
    held_out: Sequence[int]


def rate_factor(step: int, warmup_steps: int, progress: float) -> float:
    """The learning rate's factor: linear warm-up over the first steps, then cosine decay with progress."""
    rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    falling = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return rising * (LAST_SHARE + (1 - LAST_SHARE) * falling)


def split_held_out(lengths: Sequence[int], share: float, seed: int, at_most: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and indices held out, ascending, at least one each if there are two: held out are `share`
    of all, and at most `at_most` tokens."""
    order = list(range(len(lengths)))
    random.Random(f"held out {seed}").shuffle(order)
    wanted = max(1, min(round(share * len(order)), len(order) - 1))
    held, tokens = 0, 0
    for index in order[:wanted]:
        if held and tokens + lengths[index] > at_most:
            break
        held, tokens = held + 1, tokens + lengths[index]
    return sorted(order[held:]), sorted(order[:held])


def batches_of(indices: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of similar lengths, at most `batch_tokens` tokens each with padding; a longer sequence is alone."""
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (lengths[i], i)):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def epoch_batches(
    indices: Sequence[int], lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """All batches of an epoch, in the order of learning."""
    draw = random.Random(f"epoch {epoch} of {seed}")
    order = list(indices)
    draw.shuffle(order)
    mean = max(1.0, sum(lengths[i] for i in order) / max(1, len(order)))
    pool = max(1, round(POOL_BATCHES * batch_tokens / mean))
    batches = [
        batch
        for start in range(0, len(order), pool)
        for batch in batches_of(order[start : start + pool], lengths, batch_tokens)
    ]
    draw.shuffle(batches)
    return batches
