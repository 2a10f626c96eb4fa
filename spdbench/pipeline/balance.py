"""Splits a model into stages that take the same time, by measuring its layers, of each kind, and its head on this
machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.models.partition import split_by_cost
from spdbench.models.torch_utils import median_seconds

CONTEXT = 128


@torch.inference_mode()
def balanced_stages(
    decoder: TargetDecoder, num_stages: int, threads: int, drafting_s: float = 0.0
) -> tuple[range, ...]:
    """Layer ranges of `num_stages` stages with `threads` threads each, for a decoder that holds all layers. The last
    stage also runs the head; the first shares its cores with a drafter that takes `drafting_s` seconds a cycle.

    Raises:
        InputError: there are fewer layers than stages.
    """
    layers_s = _layer_seconds(decoder, threads)
    row_1M = decoder.embed(decoder.ids((0,)))
    head_s = median_seconds(lambda: argmax(decoder.logits(row_1M)).item(), threads=threads)
    extras = [0.0] * num_stages
    extras[0] += drafting_s
    extras[-1] += head_s
    return split_by_cost(layers_s, extras)


def _layer_seconds(decoder: TargetDecoder, threads: int) -> list[float]:
    """Seconds of each layer's forward of one row. Layers of a kind, recurrent or not, take the same time."""
    layers = list(decoder.layers)
    recurrent = [layer for layer in layers if decoder.snapshot_bytes(range(layer, layer + 1))]
    if not recurrent:
        return [_seconds(decoder, [decoder.layers], threads) / len(layers)] * len(layers)
    kinds = {True: recurrent, False: [layer for layer in layers if layer not in recurrent]}
    each_s = {
        kind: _seconds(decoder, [range(layer, layer + 1) for layer in alike], threads) / len(alike)
        for kind, alike in kinds.items()
        if alike
    }
    return [each_s[layer in recurrent] for layer in layers]


def _seconds(decoder: TargetDecoder, ranges: Sequence[range], threads: int) -> float:
    """Seconds of a row's way through all `ranges`."""
    prompt_SM = decoder.embed(decoder.ids([0] * CONTEXT))
    caches = [decoder.new_cache(CONTEXT + 1, layers, num_snapshots=1) for layers in ranges]
    for layers, cache in zip(ranges, caches, strict=True):
        decoder.forward(prompt_SM, 0, cache, layers)

    def forward() -> None:
        for layers, cache in zip(ranges, caches, strict=True):
            cache.rollback(CONTEXT)
            row_1M, _ = decoder.forward(prompt_SM[:1], CONTEXT, cache, layers)
        row_1M.sum().item()

    return median_seconds(forward, threads=threads)
