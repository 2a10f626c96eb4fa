"""A target whose forwards of certain numbers of rows are captured at load and replayed; all others run eagerly.

A chain of fewer rows than were captured is padded: on a GPU a few rows take as long as one. Both paths write to one
cache and compute the same, so a caller of a `TargetDecoder` need not know which one was taken. What a replay returns
is valid until the next one of as many rows.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeGuard

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.attention_context import TreeRows
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Tensors, Upload, buckets
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetCache, TargetDecoder
from spdbench.models.kv_cache import KVCache

USUAL_CAPACITY = 4096
"""Tokens of a sequence that graphs are captured for, where the model has as many positions."""


def refuse_uncapturable(decoder: TargetDecoder, asked: str, instead: str) -> Decoder:
    """The decoder, if its layers can be captured. `asked` is the option that wants it, `instead` what is allowed.

    Raises:
        InputError: the layers wait for the host, as experts do, keep states in a ring that the host turns, as recurrent
            ones do, or they are transformers' own.
    """
    if is_capturable(decoder):
        return decoder
    why = "transformers' layers serve it"
    if isinstance(decoder, Decoder):
        hybrid = decoder.config.recurrent is not None
        why = "it has recurrent layers" if hybrid else "experts are chosen on the host"
    raise InputError(f"{asked}: this model cannot be captured for replays: {why}. Allowed: {instead}.")


def is_capturable(decoder: TargetDecoder) -> TypeGuard[Decoder]:
    return isinstance(decoder, Decoder) and decoder.config.experts is None and decoder.config.recurrent is None


def usual_capacity(decoder: TargetDecoder) -> int:
    return min(USUAL_CAPACITY, decoder.config.max_positions)


def captured_on_gpu(
    decoder: TargetDecoder, row_counts: Collection[int], hidden_indices: Collection[int]
) -> TargetDecoder:
    """The decoder, with its forwards of `row_counts` rows captured if it is on a GPU and can be captured."""
    if decoder.device.type != "cuda" or not is_capturable(decoder):
        return decoder
    return CapturedDecoder(decoder, row_counts, usual_capacity(decoder), hidden_indices)


class CapturedDecoder:
    """A `TargetDecoder` for one sequence at a time of up to `capacity` tokens: the layers of `eager`, with forwards of
    `row_counts` rows captured. They give the hidden states `hidden_indices` as far as `eager` has their layers."""

    takes_trees = True

    def __init__(
        self,
        eager: Decoder,
        row_counts: Collection[int],
        capacity: int,
        hidden_indices: Collection[int] = (),
        *,
        compiled: bool = False,
    ) -> None:
        self.config, self.layers, self.capacity = eager.config, eager.layers, capacity
        self.dtype, self.device, self.kernels = eager.dtype, eager.device, eager.kernels
        self.embed, self.ids, self.bytes_per_token = eager.embed, eager.ids, eager.bytes_per_token
        self.snapshot_bytes = eager.snapshot_bytes
        self._eager = eager
        self._indices = [index for index in hidden_indices if index - 1 in eager.layers or index == eager.layers.start]
        self._cache = eager.new_cache(capacity)
        self._latest: tuple[Tensor, Tensor] | None = None  # rows as they were returned, and their logits
        with torch.inference_mode():
            self._start = Upload(1, torch.long, eager.device)
            self._captured_layers = CapturedLayers(
                eager.weights, eager.geometry, eager.rotary, self._cache, compiled=compiled
            )
            graphs = CudaGraphs(eager.device)
            counts = sorted(count for count in set(row_counts) if count <= capacity)
            self._chains = {count: self._chain_rows(count) for count in counts}
            self._functions = {count: self._capture(graphs, count) for count in counts}
        self._hold_chain = set(counts)  # the numbers of rows whose inputs are those of a chain, not of a tree

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: KVCache,
        layers: range | None = None,
        hidden_indices: Collection[int] = (),
        tree: TreeRows | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `Decoder.forward`; replayed where number of rows, cache, layers and hidden states are as captured."""
        num_rows, self._latest = len(hidden_SM), None
        count = self._captured_count(num_rows, tree)
        if (
            not count
            or start + count > cache.capacity
            or cache is not self._cache
            or layers not in (None, self.layers)
            or start != cache.length
            or not set(hidden_indices).issubset(self._indices)
        ):
            return self._eager.forward(hidden_SM, start, cache, layers, hidden_indices, tree, cancelled)
        function = self._functions[count]
        static_SM, depths_S, visible_SS = function.inputs
        static_SM[:num_rows].copy_(hidden_SM)
        self._start.send([start])
        if tree is not None or count not in self._hold_chain:
            rows = tree or self._chains[count]
            depths_S.copy_(rows.depths_S)
            visible_SS.copy_(rows.visible_SW)
            (self._hold_chain.add if tree is None else self._hold_chain.discard)(count)
        out_SM, logits_SV, *states = (output[:num_rows] for output in function(length=start + count))
        cache.advance(num_rows)
        self._latest = (out_SM, logits_SV)
        return out_SM, {index: states[self._indices.index(index)] for index in hidden_indices}

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """As `Decoder.logits`; already computed for the rows that the latest replay returned."""
        if self._latest is not None and self._eager.head is not None and hidden_SM is self._latest[0]:
            return self._latest[1]
        return self._eager.logits(hidden_SM)

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> TargetCache:
        """The captured cache, emptied, if it has the room; the sequence before is forgotten."""
        if layers not in (None, self.layers) or capacity > self.capacity:
            return self._eager.new_cache(capacity, layers, num_snapshots)
        self._cache.rollback(0)
        return self._cache

    def _captured_count(self, num_rows: int, tree: TreeRows | None) -> int:
        """The captured number of rows that serves `num_rows`, 0 if none does. Of a chain, no row sees the rows that pad
        it, and the next forward overwrites them; a tree cannot be padded."""
        if tree is None:
            return min((count for count in self._functions if count >= num_rows), default=0)
        return num_rows if num_rows in self._functions and tree.visible_SW.shape[1] == num_rows else 0

    def _chain_rows(self, num_rows: int) -> TreeRows:
        depths_S = torch.arange(num_rows, device=self.device)
        return TreeRows(depths_S, depths_S <= depths_S[:, None])

    def _capture(self, graphs: CudaGraphs, num_rows: int) -> CapturedFunction:
        rows_SM = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        chain = self._chains[num_rows]
        inputs = (rows_SM, chain.depths_S.clone(), chain.visible_SW.clone())
        return CapturedFunction(graphs, self._forward, inputs, buckets(self.capacity, at_least=num_rows))

    def _forward(self, bucket: int, hidden_SM: Tensor, depths_S: Tensor, visible_SS: Tensor) -> Tensors:
        """The last layer's output, its logits if there is a head (else the output again), and the hidden states."""
        context = self._captured_layers.tree(self._start.words, depths_S, visible_SS, bucket)
        states = {self.layers.start: hidden_SM}

        def keep(index: int, state_SM: Tensor) -> None:
            if index in self._indices:
                states[index] = state_SM

        out_SM = self._captured_layers.forward(hidden_SM, context, self.layers, keep)
        logits = out_SM if self._eager.head is None else self._eager.logits(out_SM)
        return out_SM, logits, *(states[index] for index in self._indices)
