"""Splits a model into stages that take the same time, by measuring its layers and head on this machine."""

from __future__ import annotations

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
    cache = decoder.new_cache(CONTEXT + 1, num_snapshots=1)
    decoder.forward(decoder.embed(decoder.ids([0] * CONTEXT)), 0, cache)
    row_1M = decoder.embed(decoder.ids((0,)))

    def layers() -> None:
        cache.rollback(CONTEXT)
        decoder.forward(row_1M, CONTEXT, cache)[0].sum().item()

    layer_s = median_seconds(layers, threads=threads) / len(decoder.layers)
    head_s = median_seconds(lambda: argmax(decoder.logits(row_1M)).item(), threads=threads)
    extras = [0.0] * num_stages
    extras[0] += drafting_s / layer_s
    extras[-1] += head_s / layer_s
    return split_by_cost(len(decoder.layers), extras)
