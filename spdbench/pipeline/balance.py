"""What a model's pieces take on this machine: its layers, of each kind, and its head. Stages are balanced by it, and
layouts chosen (`models.partition`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spdbench.decoding.stored_costs import StoredCosts
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.models.torch_utils import median_seconds
from spdbench.profiles.profile import make_key

CONTEXT = 128


@torch.inference_mode()
def measured_times(
    decoder: TargetDecoder, threads: int, stored: StoredCosts | None = None
) -> tuple[list[float], float]:
    """Seconds of a row's way through each layer, and of the head and its argmax, with `threads` threads, for a decoder
    that holds all layers. Times come from `stored` where they are there."""
    kinds = _layer_kinds(decoder)
    row_1M = decoder.embed(decoder.ids((0,)))

    def measure() -> list[float]:
        layers_s = [_seconds(decoder, alike, threads) / sum(map(len, alike)) for alike in kinds.values()]
        return [*layers_s, median_seconds(lambda: argmax(decoder.logits(row_1M)).item(), threads=threads)]

    keys = [make_key("balance", part=part, threads=threads) for part in (*kinds, "head")]
    *each_s, head_s = stored.seconds(keys, measure) if stored else measure()
    by_layer = {layer: s for alike, s in zip(kinds.values(), each_s, strict=True) for ran in alike for layer in ran}
    return [by_layer[layer] for layer in decoder.layers], head_s


def _layer_kinds(decoder: TargetDecoder) -> dict[str, list[range]]:
    """Layers by kind, those of which take the same time: all at once, or recurrent ones and others one by one."""
    ranges = [range(layer, layer + 1) for layer in decoder.layers]
    recurrent = [each for each in ranges if decoder.snapshot_bytes(each)]
    if not recurrent:
        return {"layer": [decoder.layers]}
    others = [each for each in ranges if each not in recurrent]
    return {"recurrent": recurrent} | ({"layer": others} if others else {})


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
