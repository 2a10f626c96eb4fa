"""Many sequences side by side through a target's own layers, one token of each a step.

The current tokens are simply rows for every product; only positions and attention differ by row, so the cache keeps a
length for each slot. Must not know what the sequences are, or how a next token is chosen.

Shapes: B slots, M model width, V vocabulary, H query heads, K kv heads, G = H / K, T cache positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spdbench.models.decoder import Decoder
from spdbench.models.layers import after_attention
from spdbench.models.steps import TorchSteps

ROUND_UP = 64
"""Attention looks at a multiple of so many positions, so that buffers come in few sizes."""


class Slots:
    """`num_slots` sequences of up to `capacity` tokens; `lengths[b]` of slot b are read."""

    def __init__(self, decoder: Decoder, num_slots: int, capacity: int) -> None:
        geometry = decoder.geometry
        shape = (len(decoder.layers), num_slots, geometry.num_kv_heads, capacity, geometry.head_dim)
        self.capacity = capacity
        self.lengths = [0] * num_slots
        self._decoder = decoder
        self._steps = TorchSteps(geometry)
        # Zeros, not whatever was there: a masked position still enters a product, and 0 times NaN is NaN.
        self._keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self._values = torch.zeros_like(self._keys)
        self._slots = torch.arange(num_slots, device=decoder.device)

    def rollback(self, slot: int, length: int) -> None:
        """Forgets what `slot` has read beyond its first `length` tokens."""
        self.lengths[slot] = min(self.lengths[slot], length)

    @torch.inference_mode()
    def read(self, ids_B: Sequence[int | None]) -> Tensor:
        """Reads one more token in each slot that has one: the last layer's outputs `[B, M]`, before the final norm.

        Rows of slots without a token hold nothing of worth.
        """
        decoder, steps = self._decoder, self._steps
        num_rows = len(self.lengths)
        lengths_B = decoder.ids(self.lengths)
        size = min(self.capacity, -(-(max(self.lengths) + 1) // ROUND_UP) * ROUND_UP)
        cos_PD, sin_PD = decoder.rotary.tables(size)
        angles = cos_PD[lengths_B, None], sin_PD[lengths_B, None]
        masks: dict[int | None, Tensor] = {}
        hidden_BM = decoder.embed(decoder.ids([0 if token is None else token for token in ids_B]))
        for layer in decoder.layers:
            weights = decoder.weights[layer]
            assert weights.input_norm is not None
            qkv = weights.qkv(steps.norm(hidden_BM, weights.input_norm))
            turned, values_BKD = steps.turn(qkv, weights.head_norms, *angles)
            keys_BKTD, values_BKTD = self._write(layer, turned[:, decoder.geometry.num_heads :], values_BKD, lengths_B)
            if weights.window not in masks:
                masks[weights.window] = _visible(lengths_B, size, weights.window)
            mixed = _attend(
                turned[:, : decoder.geometry.num_heads],
                keys_BKTD[:, :, :size],
                values_BKTD[:, :, :size],
                masks[weights.window],
            )
            hidden_BM = after_attention(weights, steps, mixed, hidden_BM, num_rows)
        for slot, token in enumerate(ids_B):
            self.lengths[slot] += token is not None
        return hidden_BM

    @torch.inference_mode()
    def logits(self, hidden_BM: Tensor) -> Tensor:
        """Next-token logits `[B, V]` of some rows that `read` returned."""
        assert self._decoder.final_norm is not None
        assert self._decoder.head is not None
        return self._decoder.head(self._steps.norm(hidden_BM, self._decoder.final_norm))

    def _write(self, layer: int, keys_BKD: Tensor, values_BKD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Puts one new row in each slot behind its valid ones; returns the layer's, `[B, K, capacity, D]` each."""
        row = layer - self._decoder.layers.start
        keys, values = self._keys[row], self._values[row]
        keys[self._slots, :, lengths_B] = keys_BKD
        values[self._slots, :, lengths_B] = values_BKD
        return keys, values


def _visible(lengths_B: Tensor, size: int, window: int | None) -> Tensor:
    """`[B, 1, 1, T]`, true where a slot's new token may look: itself and all before it, or `window` in all."""
    positions = torch.arange(size, device=lengths_B.device)
    visible = positions <= lengths_B[:, None]
    if window is not None:
        visible &= positions > lengths_B[:, None] - window
    return visible[:, None, None]


def _attend(queries_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, visible: Tensor) -> Tensor:
    """Attention of one query row a slot: `[B, H * D]`. The G heads that share a kv head become G rows of it."""
    num_slots, num_heads, head_dim = queries_BHD.shape
    num_kv, size = keys_BKTD.shape[1], keys_BKTD.shape[2]
    group = num_heads // num_kv
    folded = queries_BHD.reshape(num_slots, num_kv, group, head_dim)
    mask = visible.expand(num_slots, 1, group, size)
    mixed = scaled_dot_product_attention(folded, keys_BKTD, values_BKTD, attn_mask=mask)
    return mixed.reshape(num_slots, num_heads * head_dim)
