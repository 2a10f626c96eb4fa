"""A preallocated key-value cache with marks and rollback.

Slots are rows of the cache, in the order of writing; positions are what the rotary embedding was given. For a chain
they differ by a constant at most; for a tree they do not agree at all. This module knows slots only.

Shapes: K kv heads, T slots, S new rows, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the layers `layers`, room for `capacity` slots, batch 1.

    `length` slots are valid. A forward pass calls `write` once a layer and `advance` once at its end, so that all
    layers agree; `rollback` forgets the newest slots without touching memory.
    """

    def __init__(
        self,
        layers: range,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.capacity = capacity
        self.length = 0
        shape = (len(layers), num_kv_heads, capacity, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, keys_SKD: Tensor, values_SKD: Tensor) -> tuple[Tensor, Tensor]:
        """Puts S new rows behind the valid ones; returns keys and values of all slots up to them, each `[K, T, D]`."""
        end = self.length + keys_SKD.shape[0]
        if end > self.capacity:
            raise IndexError(f"KV cache of {self.capacity} slots cannot hold {end}")
        row = layer - self.layers.start
        keys, values = self._keys[row, :, :end], self._values[row, :, :end]
        keys[:, self.length :] = keys_SKD.transpose(0, 1)
        values[:, self.length :] = values_SKD.transpose(0, 1)
        return keys, values

    def advance(self, num_rows: int) -> None:
        """Makes the rows written since the last `advance` valid."""
        self.length += num_rows

    def mark(self) -> int:
        """A place to roll back to."""
        return self.length

    def rollback(self, mark: int) -> None:
        """Forgets every slot from `mark` on; a no-op where fewer are valid, as in a stage that lags behind."""
        self.length = min(self.length, mark)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Valid keys and values of one layer, each `[K, length, D]`."""
        row = layer - self.layers.start
        return self._keys[row, :, : self.length], self._values[row, :, : self.length]
