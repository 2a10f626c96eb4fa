"""Splits a model's layers into pipeline stages: evenly, by given counts, or by cost. Uses numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from spdbench.errors import InputError


def split_evenly(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """`num_stages` contiguous ranges of equal length.

    Raises:
        InputError: the layers cannot be split evenly; names the numbers of stages that are possible.
    """
    if not 1 <= num_stages <= num_layers or num_layers % num_stages:
        even = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise InputError(
            f"stages={num_stages}: {num_layers} layers cannot be split into {num_stages} equal stages. "
            f"Allowed: {', '.join(even)}; or give stage_layers, e.g. {_uneven_example(num_layers)}."
        )
    return split_by_counts(num_layers, [num_layers // num_stages] * num_stages)


def split_by_counts(num_layers: int, counts: Sequence[int]) -> tuple[range, ...]:
    """Contiguous ranges with the given numbers of layers.

    Raises:
        InputError: a stage would be empty, or the counts do not add up to `num_layers`.
    """
    written = ",".join(map(str, counts))
    if not counts or min(counts) < 1:
        raise InputError(f"stage_layers={written}: every stage needs at least one layer.")
    if sum(counts) != num_layers:
        raise InputError(f"stage_layers={written}: adds up to {sum(counts)} layers, but the model has {num_layers}.")
    stages, start = [], 0
    for count in counts:
        stages.append(range(start, start + count))
        start += count
    return tuple(stages)


def split_by_cost(layer_costs: Sequence[float], extras: Sequence[float]) -> tuple[range, ...]:
    """Contiguous ranges whose most expensive one is as cheap as possible; of equally good ones the more even.
    `extras[s]` is the cost of what stage s does in addition to its layers, such as the head in the last.

    Raises:
        InputError: there are fewer layers than stages.
    """
    num_layers, num_stages = len(layer_costs), len(extras)
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"stages={num_stages}: the model has {num_layers} layers. Allowed: 1 to {num_layers}.")
    sums = list(accumulate(layer_costs, initial=0.0))
    # By number of layers that the stages so far have: the heaviest stage, the squares of all, and minus their layers,
    # so that the earlier of two alike stages gets more.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for extra in extras:
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (heaviest, squares, counts) in best.items():
            for stop in range(start + 1, num_layers + 1):
                cost = sums[stop] - sums[start] + extra
                found = (max(heaviest, cost), squares + cost * cost, (*counts, start - stop))
                longer[stop] = min(found, longer.get(stop, found))
        best = longer
    return split_by_counts(num_layers, [-count for count in best[num_layers][2]])


def _uneven_example(num_layers: int) -> str:
    half = (num_layers + 1) // 2
    return f"{half},{num_layers - half}" if num_layers > 1 else "1"


def usual_stages(num_layers: int) -> int:
    """Three stages if they divide the layers, else the fewest that do."""
    if num_layers % 3 == 0:
        return 3
    return next((n for n in range(2, num_layers + 1) if num_layers % n == 0), 1)
