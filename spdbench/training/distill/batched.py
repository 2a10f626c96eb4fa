"""Many sequences in parallel through a target's own layers, one token of each per step.

The current tokens are rows of every matrix multiplication; only positions and attention differ by row, so the cache
keeps a length for each slot. Layers of transformers serve one sequence after the other (`SingleSlot`).

Shapes: B slots, M model width, V vocabulary, H query heads, K kv heads, G = H / K, T cache positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import Geometry, LayerOps, has_cpu_kernels, ops_by_rows
from spdbench.models.layers import LayerWeights, after_attention
from spdbench.models.rotary import Rotary
from spdbench.models.torch_utils import array

ROUND_UP = 64
"""Torch's attention reads a multiple of this many positions, so that its buffers have few sizes."""


def slot_bytes(decoder: TargetDecoder, capacity: int) -> int:
    """Bytes of one of `Slots`: its keys and values, and its row of logits twice. For layers of transformers at most
    these: keys as wide as the model."""
    width = decoder.config.hidden_size
    if isinstance(decoder, Decoder):
        width = decoder.geometry.num_kv_heads * decoder.geometry.head_dim
    cached = 2 * len(decoder.layers) * capacity * width
    return (cached + 2 * decoder.config.vocab_size) * decoder.dtype.itemsize


class Slots:
    """`num_slots` sequences of up to `capacity` tokens, of which `lengths[b]` in slot b are read.

    Each object has its own buffers, so several can run in as many threads.
    """

    def __init__(self, decoder: Decoder, num_slots: int, capacity: int) -> None:
        geometry, dtype, device = decoder.geometry, decoder.dtype, decoder.device
        shape = (len(decoder.layers), num_slots, geometry.num_kv_heads, capacity, geometry.head_dim)
        # Zeros, not uninitialised memory: a masked position still enters a multiplication, and 0 times NaN is NaN.
        keys = torch.zeros(shape, dtype=dtype, device=device)
        values = torch.zeros_like(keys)
        self.capacity = capacity
        self.lengths = [0] * num_slots
        self._decoder = decoder
        compiled = has_cpu_kernels(dtype, device)
        self._ops = ops_by_rows(geometry, dtype, device)(1) if compiled else LayerOps(geometry)
        attention = _CpuAttention if compiled else _TorchAttention
        self._attention = attention(geometry, decoder.rotary, keys, values)

    def rollback(self, slot: int, length: int) -> None:
        """Drops the tokens of `slot` beyond its first `length`."""
        self.lengths[slot] = min(self.lengths[slot], length)

    @torch.inference_mode()
    def read(self, ids_B: Sequence[int | None]) -> Tensor:
        """Reads one more token in each slot that has one: the last layer's outputs `[B, M]`, before the final norm.

        Rows of slots without a token are undefined.
        """
        decoder, ops = self._decoder, self._ops
        self._attention.begin(self.lengths)
        hidden_BM = decoder.embed(decoder.ids([0 if token is None else token for token in ids_B]))
        for layer in decoder.layers:
            weights = decoder.weights[layer]
            normed_BM = hidden_BM if weights.input_norm is None else ops.norm(hidden_BM, weights.input_norm)
            mixed = self._attention(layer - decoder.layers.start, weights.qkv(normed_BM), weights)
            hidden_BM = after_attention(weights, ops, mixed, hidden_BM)
        for slot, token in enumerate(ids_B):
            self.lengths[slot] += token is not None
        return hidden_BM

    @torch.inference_mode()
    def logits(self, hidden_BM: Tensor) -> Tensor:
        """Next-token logits `[B, V]` of some rows that `read` returned."""
        assert self._decoder.final_norm is not None
        assert self._decoder.head is not None
        return self._decoder.head(self._ops.norm(hidden_BM, self._decoder.final_norm))


class SingleSlot:
    """One sequence of up to `capacity` tokens through layers of any kind, with the interface of `Slots`.

    Layers of transformers have no rows of different sequences in one forward, so that more slots would win nothing.
    """

    def __init__(self, decoder: TargetDecoder, capacity: int) -> None:
        self.capacity = capacity
        self._decoder = decoder
        self._cache = decoder.new_cache(capacity)

    @property
    def lengths(self) -> list[int]:
        """How many tokens are read: one number."""
        return [self._cache.length]

    def rollback(self, slot: int, length: int) -> None:  # noqa: ARG002 - there is one
        """Drops the tokens beyond the first `length`."""
        self._cache.rollback(length)

    @torch.inference_mode()
    def read(self, ids_B: Sequence[int | None]) -> Tensor:
        """Reads one more token: the last layer's output `[1, M]`."""
        (token,) = ids_B
        assert token is not None
        embedded_1M = self._decoder.embed(self._decoder.ids((token,)))
        return self._decoder.forward(embedded_1M, self._cache.length, self._cache)[0]

    @torch.inference_mode()
    def logits(self, hidden_BM: Tensor) -> Tensor:
        """Next-token logits `[B, V]` of a row that `read` returned."""
        return self._decoder.logits(hidden_BM)


class _CpuAttention:
    """Compiled attention, slot by slot and no further than its length, on the calling thread.

    Rotates the new rows, writes keys and values behind each slot's own, and attends, as `_TorchAttention` does.
    """

    def __init__(self, geometry: Geometry, rotary: Rotary, keys: Tensor, values: Tensor) -> None:
        from spdbench.models.cpu.attention import attend_in_slots

        _, num_slots, _, capacity, head_dim = keys.shape
        self._attend: Any = attend_in_slots
        self._eps = geometry.norm_eps
        self._angles = rotary.arrays(capacity)
        self._keys, self._values = array(keys), array(values)
        self._mixed = keys.new_zeros(num_slots, geometry.num_heads * head_dim)
        self._buffers = array(torch.zeros_like(self._mixed)), array(self._mixed)  # queries, output
        self._no_norm = array(keys.new_empty(0))
        self._lengths: Any = None

    def begin(self, lengths: Sequence[int]) -> None:
        """Starts a step: the new row of slot b is at position `lengths[b]`."""
        self._lengths = np.array(lengths)

    def __call__(self, layer: int, qkv: Tensor, weights: LayerWeights) -> Tensor:
        """From queries, keys, values `[B, (H + 2K) D]` to attention's output `[B, H D]`; layers count from 0."""
        head_norms, keys, values = weights.head_norms, self._keys[layer], self._values[layer]
        norms = (self._no_norm,) * 2 if head_norms is None else (head_norms.query.array, head_norms.key.array)
        window = weights.window or 0
        self._attend(array(qkv), *norms, self._eps, self._lengths, *self._angles, keys, values, window, *self._buffers)
        return self._mixed


class _TorchAttention:
    """Attention of all slots at once, padded to the longest."""

    def __init__(self, geometry: Geometry, rotary: Rotary, keys: Tensor, values: Tensor) -> None:
        self._ops, self._rotary = LayerOps(geometry), rotary
        self._num_heads = geometry.num_heads
        self._keys, self._values = keys, values
        self._slots = torch.arange(keys.shape[1], device=keys.device)
        self.begin([0] * keys.shape[1])

    def begin(self, lengths: Sequence[int]) -> None:
        """Starts a step: the new row of slot b is at position `lengths[b]`."""
        self._size = min(self._keys.shape[3], -(-(max(lengths) + 1) // ROUND_UP) * ROUND_UP)
        self._lengths = torch.tensor(lengths, device=self._keys.device)
        cos_PD, sin_PD = self._rotary.tables(self._size)
        self._angles = cos_PD[self._lengths, None], sin_PD[self._lengths, None]
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, qkv: Tensor, weights: LayerWeights) -> Tensor:
        """From queries, keys, values `[B, (H + 2K) D]` to attention's output `[B, H D]`; layers count from 0."""
        rotated, new_values_BKD = self._ops.rotate_heads(qkv, weights.head_norms, *self._angles)
        keys_BKTD, values_BKTD = self._keys[layer], self._values[layer]
        keys_BKTD[self._slots, :, self._lengths] = rotated[:, self._num_heads :]
        values_BKTD[self._slots, :, self._lengths] = new_values_BKD
        # The G query heads that share a kv head become G rows of one small multiplication, as in
        # `models.layer_ops.attend`.
        queries_BHD, (num_slots, num_kv) = rotated[:, : self._num_heads], keys_BKTD.shape[:2]
        folded = queries_BHD.reshape(num_slots, num_kv, -1, queries_BHD.shape[-1])
        cached = keys_BKTD[:, :, : self._size], values_BKTD[:, :, : self._size]
        mask = self._mask(weights.window).expand(-1, -1, folded.shape[2], -1)
        return scaled_dot_product_attention(folded, *cached, attn_mask=mask).flatten(1)

    def _mask(self, window: int | None) -> Tensor:
        """`[B, 1, 1, T]`, true where a slot's new token may look: itself and all before it, or `window` in all."""
        if window not in self._masks:
            positions = torch.arange(self._size, device=self._lengths.device)
            visible = positions <= self._lengths[:, None]
            if window is not None:
                visible &= positions > self._lengths[:, None] - window
            self._masks[window] = visible[:, None, None]
        return self._masks[window]
