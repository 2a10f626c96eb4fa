"""Splits a model's layers into pipeline stages: evenly, by given counts, or by cost. Uses numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence

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


def split_by_cost(num_layers: int, extras: Sequence[float]) -> tuple[range, ...]:
    """Contiguous ranges whose most expensive one is as cheap as possible. `extras[s]` is the cost of what stage s does
    in addition to its layers, such as the head in the last, in units of a layer.

    Raises:
        InputError: there are fewer layers than stages.
    """
    num_stages = len(extras)
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"stages={num_stages}: the model has {num_layers} layers. Allowed: 1 to {num_layers}.")
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):  # layers cost the same, so each goes to the cheapest stage
        cheapest = min(range(num_stages), key=lambda stage: counts[stage] + extras[stage])
        counts[cheapest] += 1
    return split_by_counts(num_layers, counts)


def _uneven_example(num_layers: int) -> str:
    half = (num_layers + 1) // 2
    return f"{half},{num_layers - half}" if num_layers > 1 else "1"
