"""How long a piece of work takes here, for choices that are made by measuring. Must not know what the work is."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch


@torch.inference_mode()
def median_seconds(
    work: Callable[[], object],
    rounds: int = 8,
    threads: int | None = None,
    between: Callable[[], object] = lambda: None,
) -> float:
    """What `work` takes, with `threads` if given. Before each round comes `between`, which does not count: what work
    takes depends on what the caches hold. Neither may return before it is done."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return median(_seconds(work, between) for _ in range(rounds))
    finally:
        torch.set_num_threads(before)


def _seconds(work: Callable[[], object], between: Callable[[], object]) -> float:
    between()
    began = perf_counter()
    work()
    return perf_counter() - began
