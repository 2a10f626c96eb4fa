"""The choice of a tree: measured costs of forwards by number of rows, against the drafter's accuracies.

`accuracies[level][rank]` is the probability that the candidate of that rank is right at that level, given that all
before it on its path are.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from spdbench.decoding.tree import Path
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.profiles.profile import RowCosts

ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROUNDS, ROUNDS_S = range(5, 16), 2.0
"""How often forwards are timed: within these seconds, but at least and at most so many times."""
CONTEXT = 128
MAX_AUTO_NODES = 32
"""Of a tree that a backend chooses for itself, the root included."""
RANK_DECAY = 0.25
"""The accuracy of each further rank relative to the one before, where nothing was measured."""


@torch.inference_mode()
def measure_row_costs(decoder: TargetDecoder, largest: int = ROW_COUNTS[-1]) -> RowCosts:
    """Medians over rounds that take the row counts in turn, so that a slow moment affects all of them: up and down, as
    after many rows a processor may be slow for a while. More rows are taken to cost no less than fewer: medians that
    say so are noise, which would pay for drafts with time that nobody gains."""
    counts = [count for count in ROW_COUNTS if count <= largest]
    cache = decoder.new_cache(CONTEXT + largest, num_snapshots=largest)
    decoder.forward(decoder.embed(decoder.ids([0] * CONTEXT)), 0, cache)

    def measure(count: int) -> float:
        began = perf_counter()
        hidden, _ = decoder.forward(decoder.embed(decoder.ids([0] * count)), CONTEXT, cache)
        argmax(decoder.logits(hidden)).tolist()
        seconds = perf_counter() - began
        cache.rollback(CONTEXT)
        return seconds

    rounds = [[measure(count) for count in counts]]  # warms up, and its times are the largest
    while len(rounds) <= ROUNDS.start or (len(rounds) < ROUNDS.stop and sum(map(sum, rounds)) < ROUNDS_S):
        step = -1 if len(rounds) % 2 else 1
        rounds.append([measure(count) for count in counts[::step]][::step])
    medians = map(median, zip(*rounds[1:], strict=True))
    return RowCosts.rising(counts, medians)


def assumed_accuracies(by_level: Sequence[float], num_levels: int, num_ranks: int) -> list[list[float]]:
    """A table for all ranks of `num_levels` levels from first-choice accuracies, of which the last goes on; each rank
    has a fixed share of the one before."""
    by_level = [*by_level, *[by_level[-1]] * num_levels][:num_levels]
    return [[accuracy * RANK_DECAY**rank for rank in range(num_ranks)] for accuracy in by_level]


def best_paths(accuracies: Sequence[Sequence[float]], num_nodes: int) -> list[tuple[Path, float]]:
    """The `num_nodes` most probable paths with their probabilities, most probable first; parents come before children.

    Greedy is optimal here: a path is never more probable than its parent.
    """
    heap: list[tuple[float, int, Path]] = [(-1.0, 0, ())]
    found: list[tuple[Path, float]] = []
    while heap and len(found) <= num_nodes:
        negative, depth, path = heapq.heappop(heap)
        found.append((path, -negative))
        if depth < len(accuracies):
            for rank, accuracy in enumerate(accuracies[depth]):
                heapq.heappush(heap, (negative * accuracy, depth + 1, (*path, rank)))
    return found[1:]  # without the root


def chain_with_alternatives(accuracies: Sequence[Sequence[float]]) -> list[tuple[Path, float]]:
    """All paths that differ from the first choices in their last token at most, with their probabilities, most probable
    first; parents come before children."""
    found, reached = [], 1.0
    for level, by_rank in enumerate(accuracies):
        found += [((*[0] * level, rank), reached * accuracy) for rank, accuracy in enumerate(by_rank)]
        reached *= by_rank[0]
    return sorted(found, key=lambda each: -each[1])  # stable: a child may be as probable as its parent


@dataclass(frozen=True)
class Choice:
    """A tree's paths, empty where drafting does not pay, and its expected speed-up over no drafting."""

    paths: tuple[Path, ...]
    speedup: float

    @property
    def num_levels(self) -> int:
        return max(map(len, self.paths), default=0)


def choose_tree(
    accuracies: Sequence[Sequence[float]],
    costs: RowCosts,
    draft_seconds: Callable[[int], float],
    largest: int,
    *,
    one_row_a_level: bool = False,
) -> Choice:
    """Of the best trees of each depth and of 1 to `largest` drafts the one with the most tokens a second.

    `draft_seconds(levels)` is the time of drafting so many levels, one at least. With `one_row_a_level` only first
    choices go on: a chain with alternatives, for which a drafter computes no more rows than for the chain.
    """
    best = Choice((), 0.0)
    for depth in range(1, len(accuracies) + 1):
        some, expected = accuracies[:depth], 1.0
        ranked = chain_with_alternatives(some)[:largest] if one_row_a_level else best_paths(some, largest)
        for count, (_, probability) in enumerate(ranked, 1):
            expected += probability
            paths = tuple(path for path, _ in ranked[:count])
            seconds = costs(count + 1) + draft_seconds(max(map(len, paths)))
            speedup = expected * costs(1) / seconds
            if speedup > best.speedup:
                best = Choice(paths, speedup)
    return best
