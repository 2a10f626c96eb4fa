"""In which order sequences are learned: batches of similar length, drawn anew each epoch from the seed alone.

Plain numbers, so that a run that was killed finds its place again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

POOL_BATCHES = 16
"""Batches' worth of sequences that are sorted by length together: little padding, and still every epoch differs."""


def split_held_out(lengths: Sequence[int], share: float, seed: int, at_most: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and indices held out, each ascending and of two or more at least one: held out are `share`
    of all, at most `at_most` tokens where that leaves one."""
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
    """Neighbours in length together, at most `batch_tokens` tokens a batch with its padding; a longer one alone."""
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
