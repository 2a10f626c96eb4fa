"""Cuts a model's layers into pipeline stages, evenly, as told, or by what layers and head cost here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.models.interface import TargetDecoder

ROUNDS = 9
CONTEXT = 128


def split_evenly(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """`num_stages` contiguous ranges of equal length.

    Raises:
        InputError: the layers cannot be dealt out evenly; names the numbers of stages that can be.
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


def split_by_cost(num_layers: int, num_stages: int, head_layers: float) -> tuple[range, ...]:
    """Contiguous ranges whose heaviest is as light as can be, the last stage having the head besides, which costs as
    much as `head_layers` layers.

    Raises:
        InputError: there are fewer layers than stages.
    """
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"stages={num_stages}: the model has {num_layers} layers. Allowed: 1 to {num_layers}.")
    counts = [1] * num_stages
    weights = [1.0] * (num_stages - 1) + [1.0 + head_layers]
    for _ in range(num_layers - num_stages):  # layers are alike, so the lightest stage takes each
        lightest = min(range(num_stages), key=weights.__getitem__)
        counts[lightest] += 1
        weights[lightest] += 1
    return split_by_counts(num_layers, counts)


@dataclass(frozen=True)
class StageCosts:
    """Seconds that a layer and the head take for one token."""

    layer_s: float
    head_s: float


def measure_stage_costs(decoder: TargetDecoder, threads: int) -> StageCosts:
    """Medians over a few tokens, with as many threads as a stage will have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            cache = decoder.new_cache(CONTEXT + 1)
            decoder.forward(decoder.embed(decoder.ids([0] * CONTEXT)), 0, cache)
            row = decoder.embed(decoder.ids((0,)))

            def layers() -> None:
                cache.rollback(CONTEXT)
                decoder.forward(row, CONTEXT, cache)[0].sum().item()

            times = [(_seconds(layers), _seconds(lambda: decoder.logits(row).argmax().item())) for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(before)
    return StageCosts(
        median(layer_s for layer_s, _ in times) / len(decoder.layers), median(head_s for _, head_s in times)
    )


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _uneven_example(num_layers: int) -> str:
    half = (num_layers + 1) // 2
    return f"{half},{num_layers - half}" if num_layers > 1 else "1"
