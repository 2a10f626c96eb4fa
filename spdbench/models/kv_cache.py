"""A preallocated key-value cache with rollback.

Slots are rows of the cache, in the order of writing; positions are what the rotary embedding was given. For a chain
they differ by a constant at most; for a tree they do not agree at all. This module knows slots only.

Rollback sets `length` back and touches no memory: slots from `length` on hold numbers of tokens that were rejected; no
row sees them, and the next rows are written over them. Of a tree only the accepted path stays: `keep` copies it to the
front of the tree's slots. Keys are stored rotated by their positions, which do not change when a row moves to another
slot, so nothing is computed again.

Shapes: K kv heads, T slots, S new rows, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spdbench.models.torch_utils import array, to_device


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

    def room(self, layer: int, num_rows: int) -> tuple[int, Any, Any]:
        """For a kernel that writes S new rows itself: the first free slot, and keys and values of all slots,
        `[K, capacity, D]` each, as numpy arrays."""
        self._check(num_rows)
        return self.length, *self._arrays[layer - self.layers.start]

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """For callers that write to slots of their choice: keys and values of all slots, valid or not,
        `[K, capacity, D]` each."""
        row = layer - self.layers.start
        return self._keys[row], self._values[row]

    def write(self, layer: int, keys_SKD: Tensor, values_SKD: Tensor) -> tuple[Tensor, Tensor]:
        """Puts S new rows behind the valid ones; returns keys and values of all slots up to them, each `[K, T, D]`."""
        self._check(keys_SKD.shape[0])
        row, end = layer - self.layers.start, self.length + keys_SKD.shape[0]
        keys, values = self._keys[row, :, :end], self._values[row, :, :end]
        keys[:, self.length :] = keys_SKD.transpose(0, 1)
        values[:, self.length :] = values_SKD.transpose(0, 1)
        return keys, values

    def advance(self, num_rows: int) -> None:
        """Makes the rows written since the last `advance` valid."""
        self.length += num_rows

    def rollback(self, mark: int) -> None:
        """Forgets every slot from `mark`, an earlier `length`, on; does nothing where fewer are valid, as in a stage
        that lags behind."""
        self.length = min(self.length, mark)

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Keeps of the slots from `mark` on those at the rising offsets `chosen`, a tree's accepted path, and forgets
        the others. Nothing is copied where the path comes first already."""
        if list(chosen) != list(range(len(chosen))):
            slots = to_device(chosen, self._keys.device) + mark
            end = mark + len(chosen)
            self._keys[:, :, mark:end] = self._keys[:, :, slots]
            self._values[:, :, mark:end] = self._values[:, :, slots]
        self.length = mark + len(chosen)

    def _check(self, num_rows: int) -> None:
        if self.length + num_rows > self.capacity:
            raise IndexError(f"KV cache of {self.capacity} slots cannot hold {self.length + num_rows}")

    @cached_property
    def _arrays(self) -> list[tuple[Any, Any]]:
        keys, values = array(self._keys), array(self._values)
        return [(keys[row], values[row]) for row in range(len(self.layers))]
