"""A forward pass of a few rows through packed layers, recorded once as tasks of the worker pool and replayed.

A layer is nine short tasks; for one row, making them in Python takes a sixth of the time of the whole pass. What they
are differs from pass to pass only in the rows, their positions and slots, which a replay writes to where the tasks read
them. The layers themselves are recorded as they run otherwise, so both give the same bits.

`RecordedRows` is what a drafter's layers share with the target's: rows in one attention context.

Shapes: S rows, M model width, W slots of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from spdbench.models.attention_context import AttentionContext, TreeRows
from spdbench.models.cpu.linear import PackedLinear
from spdbench.models.cpu.worker_pool import Recording, task_words, worker_pool
from spdbench.models.interface import CancelledForwardError
from spdbench.models.kv_cache import CacheMemory, KVCache
from spdbench.models.layer_ops import LayerOps
from spdbench.models.layers import LayerWeights, layer_forward
from spdbench.models.rotary import Rotary

T = TypeVar("T")

MAX_ROWS = 32
"""More rows take so long that their tasks do not matter, and each number of rows has buffers of its own."""
MAX_RECORDINGS = 16
"""How many a memory keeps, those used last: trees that are cut short at a request's end have many shapes."""


@dataclass(frozen=True)
class Shape:
    """What a recording is for: layers, S, the width of the tree's mask (None for a chain), the states that it gives."""

    layers: range
    num_rows: int
    tree_width: int | None
    hidden_indices: frozenset[int]


def can_record(weights: Collection[LayerWeights], ops: LayerOps) -> bool:
    """True if all that the layers compute with `ops` are tasks of the pool."""
    return ops.records_tasks and bool(weights) and all(map(_is_recordable, weights))


def _is_recordable(layer: LayerWeights) -> bool:
    parts = (layer.qkv, layer.out, layer.gate_up, layer.down)
    plain = layer.experts is None and layer.delta_net is None and layer.output_gate is None
    return plain and all(isinstance(part, PackedLinear) for part in parts)


class RecordedRows(Generic[T]):
    """What `compute` does with S rows, recorded and replayed wherever in the caches of one memory the rows are. `out`
    is what it returned: tensors that a replay overwrites."""

    def __init__(
        self,
        rotary: Rotary,
        memory: CacheMemory,
        num_rows: int,
        tree_width: int | None,
        compute: Callable[[AttentionContext, Recording], T],
    ) -> None:
        """`compute` reads and writes `memory`; `tree_width` is W of a tree's rows, None for a chain's."""
        rows = None
        if tree_width is not None:
            visible_SW = torch.zeros(num_rows, tree_width, dtype=torch.bool)
            rows = TreeRows(torch.zeros(num_rows, dtype=torch.long), visible_SW)
        pool = worker_pool()
        assert pool is not None
        self._pool = pool
        # Behind the last slot, so that the tables of angles never have to grow.
        self._context = AttentionContext(rotary, memory.capacity, num_rows, rows)
        self._angles = self._context.angle_arrays
        with pool.recording() as recording:
            self.out = compute(self._context, recording)
        self._tensors, self._tasks = recording.tensors, task_words(recording.tasks)

    def place(self, slot: int, start: int, tree: TreeRows | None) -> None:
        """The rows are in the slots from `slot` on, at positions from `start` on."""
        context = self._context
        context.slot[0] = slot
        if tree is not None:
            context.depths[:] = tree.depths_S.numpy()
            context.visible[:] = tree.visible_SW.numpy()
        context.positions[:] = context.depths + start

    def run(self, begin: int = 0, end: int | None = None) -> None:
        """Runs the tasks, or some of them."""
        self._pool.run_all(self._tasks[begin:end])


class RecordedForward:
    """The pass of one `shape` over the caches of one memory, of rows like `like_SM`."""

    def __init__(
        self,
        weights: Mapping[int, LayerWeights],
        ops: LayerOps,
        rotary: Rotary,
        cache: KVCache,
        shape: Shape,
        like_SM: Tensor,
    ) -> None:
        self._shape = shape
        with torch.inference_mode(False):
            self._given_SM = torch.zeros(like_SM.shape, dtype=like_SM.dtype)
        self._states: dict[int, Tensor] = {}
        self._ends: list[int] = []

        def compute(context: AttentionContext, recording: Recording) -> Tensor:
            hidden_SM = self._given_SM
            for layer in shape.layers:
                hidden_SM = layer_forward(weights[layer], ops, context, layer, hidden_SM, cache)
                self._ends.append(len(recording.tasks))
                if layer + 1 in shape.hidden_indices:
                    self._states[layer + 1] = hidden_SM
            return hidden_SM

        self._rows = RecordedRows(rotary, cache.memory, shape.num_rows, shape.tree_width, compute)

    def run(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: KVCache,
        tree: TreeRows | None,
        cancelled: Callable[[], bool] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The last layer's output and the states, in memory of their own.

        Raises:
            CancelledForwardError: `cancelled`, called before each layer, returned true.
        """
        shape, rows = self._shape, self._rows
        rows.place(cache.room(shape.layers.start, shape.num_rows)[0], start, tree)
        self._given_SM.copy_(hidden_SM)
        if cancelled is None:
            rows.run()
        else:
            for begin, end in zip([0, *self._ends], self._ends, strict=False):
                if cancelled():
                    raise CancelledForwardError
                rows.run(begin, end)
        return rows.out.clone(), {index: state.clone() for index, state in self._states.items()}


class RecordedLayers:
    """Passes through any range of some layers, each recorded when it is first needed and kept with its cache's
    memory."""

    def __init__(self, weights: Mapping[int, LayerWeights], ops: LayerOps, rotary: Rotary) -> None:
        self._weights, self._ops, self._rotary = weights, ops, rotary

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: KVCache,
        layers: range,
        hidden_indices: Collection[int],
        tree: TreeRows | None,
        cancelled: Callable[[], bool] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `Decoder.forward`, but for hidden state 0."""
        tree_width = None if tree is None else tree.visible_SW.shape[1]
        shape = Shape(layers, len(hidden_SM), tree_width, frozenset(hidden_indices))
        kept = cache.memory.recorded
        recorded = kept.pop(shape, None)
        if not isinstance(recorded, RecordedForward):
            recorded = RecordedForward(self._weights, self._ops, self._rotary, cache, shape, hidden_SM)
        kept[shape] = recorded  # the last one is the one used last
        if len(kept) > MAX_RECORDINGS:
            kept.popitem(last=False)
        found = recorded.run(hidden_SM, start, cache, tree, cancelled)
        cache.advance(len(hidden_SM))
        return found
