"""A preallocated key-value cache with rollback, and one that also holds the states of recurrent layers.

Slots are rows of the cache, in the order of writing; positions are what the rotary embedding was given. For a chain
they differ by a constant at most; for a tree they do not agree at all. This module knows slots only.

Rollback sets `length` back and touches no memory: slots from `length` on hold numbers of tokens that were rejected; no
row sees them, and the next rows are written over them. Of a tree only the accepted path stays: `keep` copies it to the
front of the tree's slots. Keys are stored rotated by their positions, which do not change when a row moves to another
slot, so nothing is computed again.

A recurrent layer has one state in place of slots, and every token overwrites it. `HybridCache` keeps the newest states
in a ring: a token's update reads one slot of it and writes the next, so that going back is again only a smaller
`length`, and the state that is read afterwards is the very one that was there before.

Shapes: K kv heads, T slots, S new rows, D head size; R states of a ring, W rows of a convolution's window, C channels,
H value heads, E value head size.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spdbench.models.checkpoints.config import RecurrentSizes
from spdbench.models.torch_utils import array, to_device


class CacheMemory:
    """Memory for keys and values of some layers, `capacity` slots each, and the forward passes that were recorded over
    it (`cpu.recorded_forward`)."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_layers, num_kv_heads, capacity, head_dim)
        self.capacity = capacity
        with torch.inference_mode(False):  # whoever comes next may write to it in either mode
            self.keys = torch.empty(shape, dtype=dtype, device=device)
            self.values = torch.empty(shape, dtype=dtype, device=device)
        self.recorded: OrderedDict[Any, object] = OrderedDict()

    @cached_property
    def arrays(self) -> list[tuple[Any, Any]]:
        """A layer's keys and values, `[K, T, D]` each, as numpy arrays."""
        return list(zip(array(self.keys), array(self.values), strict=True))


class KVCache:
    """Keys and values of the layers `layers`, room for `capacity` slots, batch 1; in `memory`, where it is given.

    `length` slots are valid. A forward pass calls `write` once a layer and `advance` once at its end, so that all
    layers agree; `rollback` forgets the newest slots without touching memory.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: CacheMemory | None = None,
    ) -> None:
        memory = memory or CacheMemory(len(layers), num_kv_heads, head_dim, capacity, dtype, device)
        self.layers = layers
        self.capacity = capacity
        self.length = 0
        self.memory = memory
        self._row_of = {layer: row for row, layer in enumerate(layers)}
        self._keys, self._values = memory.keys, memory.values

    def room(self, layer: int, num_rows: int) -> tuple[int, Any, Any]:
        """For a kernel that writes S new rows itself: the first free slot; keys and values of all slots, `[K, T, D]`
        each, as numpy arrays."""
        self._check(num_rows)
        return self.length, *self.memory.arrays[self._row_of[layer]]

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """For callers that write to slots of their choice: keys and values of all slots, valid or not,
        `[K, T, D]` each."""
        row = self._row_of[layer]
        return self._keys[row], self._values[row]

    def write(self, layer: int, keys_SKD: Tensor, values_SKD: Tensor) -> tuple[Tensor, Tensor]:
        """Puts S new rows behind the valid ones; returns keys and values of all slots up to them, each `[K, T, D]`."""
        self._check(keys_SKD.shape[0])
        row, end = self._row_of[layer], self.length + keys_SKD.shape[0]
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


CAPACITY_STEP = 1000
"""Memory that is kept has a multiple of so many slots, so that it serves longer requests as well. Small pages that no
token was written to take no place. A power of two would put all heads' first slots on the same lines of a processor's
caches."""


def whole_steps(capacity: int) -> int:
    """At least so many slots, a multiple of `CAPACITY_STEP`."""
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP


class KeptMemory:
    """Memory of caches that are gone, one for each range of layers, for those of the next requests: what was recorded
    over it need not be recorded again, which takes about as long as a forward pass."""

    def __init__(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._heads, self._kind = (num_kv_heads, head_dim), (dtype, device)
        self._kept: dict[Sequence[int], CacheMemory] = {}

    def new_cache(self, layers: Sequence[int], capacity: int) -> KVCache:
        """An empty cache, whose memory comes back here when the last reference to it is gone."""
        memory = self._kept.pop(layers, None)
        if memory is not None and memory.capacity < capacity:
            memory = None  # freed before there is more
        if memory is None:
            memory = CacheMemory(len(layers), *self._heads, whole_steps(capacity), *self._kind)
        cache = KVCache(layers, *self._heads, capacity, *self._kind, memory)
        weakref.finalize(cache, self._kept.__setitem__, layers, memory).atexit = False
        return cache


class HybridCache(KVCache):
    """Keys and values of the attention layers `layers`, and the states of the layers `recurrent`.

    Besides the newest state it holds those after each of the `num_snapshots` tokens before: `rollback` goes back by as
    many. A state is a convolution's window, its last W inputs, and a matrix for each value head in float32.
    """

    def __init__(
        self,
        layers: Sequence[int],
        recurrent: Sequence[int],
        sizes: RecurrentSizes,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        num_snapshots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers, num_kv_heads, head_dim, capacity, dtype, device)
        self._states_of = {layer: row for row, layer in enumerate(recurrent)}
        self._ring = num_snapshots + 1
        self._oldest = 0  # the smallest length whose states are held
        shape = len(recurrent), self._ring
        self._windows = torch.zeros(*shape, sizes.window, sizes.channels, dtype=dtype, device=device)
        heads = sizes.num_value_heads, sizes.key_dim, sizes.value_dim
        self._matrices = torch.zeros(*shape, *heads, dtype=torch.float32, device=device)

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """All states of a recurrent layer: windows `[R, W, C]` and matrices `[R, H, D, E]`; see `slot`."""
        row = self._states_of[layer]
        return self._windows[row], self._matrices[row]

    def state_arrays(self, layer: int) -> tuple[Any, Any]:
        """The same as numpy arrays."""
        windows, matrices = self._all_state_arrays
        row = self._states_of[layer]
        return windows[row], matrices[row]

    def slot(self, num_new: int) -> int:
        """Where in the ring the state after `num_new` tokens more than the valid ones lies."""
        return (self.length + num_new) % self._ring

    def claim(self, num_rows: int, *, every_state: bool) -> None:
        """Says that the states after S new rows are about to be written, or the one after the last of them only. What
        they replace is lost from now on, also if the forward pass is cancelled between two layers.

        Raises:
            IndexError: there is no room for so many tokens.
        """
        self._check(num_rows)
        end = self.length + num_rows
        self._oldest = max(self._oldest, end + 1 - self._ring) if every_state else end

    def rollback(self, mark: int) -> None:
        """As in `KVCache`.

        Raises:
            IndexError: the states at `mark` are not held any more: more snapshots were needed.
        """
        if mark >= self.length:
            return
        if mark == 0:  # where every sequence starts, with states of zeros
            self._oldest = 0
            self._windows[:, 0] = 0
            self._matrices[:, 0] = 0
        elif mark < self._oldest:
            raise IndexError(
                f"a cache of {self.length} tokens holds recurrent states back to {self._oldest}, not to {mark}: "
                f"it keeps {self._ring - 1} snapshots"
            )
        self.length = mark

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Keeps of the tokens from `mark` on the first few: states follow each other, so there is no branch to keep."""
        if list(chosen) != list(range(len(chosen))):
            raise NotImplementedError("the states of recurrent layers keep no branch of a tree")
        self.rollback(mark + len(chosen))

    @cached_property
    def _all_state_arrays(self) -> tuple[Any, Any]:
        return array(self._windows), array(self._matrices)
