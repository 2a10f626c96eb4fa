"""A target whose forwards of certain numbers of rows are recorded at load and replayed; all others take the plain path.

A chain of fewer rows than were recorded is filled up: on a GPU a few rows take as long as one. Both paths write to one
cache and mean the same, so whoever decodes with a `TargetDecoder` need not know which one was taken. What a replay
returns holds until the next one of as many rows. Must not know who decodes, or how.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.attention_context import TreeRows
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.cpu.argmax import argmax
from spdbench.models.cuda.graph import GraphRunner, Upload, Work
from spdbench.models.cuda.static_layers import StaticLayers, StaticPlace, bucket_for, buckets
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetCache, TargetDecoder
from spdbench.models.kv_cache import KVCache

USUAL_CAPACITY = 4096
"""Tokens of a sequence that graphs are recorded for, where the model has as many positions."""


def refuse_unrecordable(decoder: TargetDecoder, asked: str, instead: str) -> Decoder:
    """The decoder, if its layers can be recorded. `asked` is the option that wants it, `instead` what is allowed.

    Raises:
        InputError: they wait for the host, as experts do, or they are not ours.
    """
    if recordable(decoder):
        return decoder
    why = "experts are chosen on the host" if isinstance(decoder, Decoder) else "transformers' layers serve it"
    raise InputError(f"{asked}: this model cannot be recorded for replays: {why}. Allowed: {instead}.")


def recordable(decoder: TargetDecoder) -> TypeGuard[Decoder]:
    return isinstance(decoder, Decoder) and decoder.config.experts is None


def usual_capacity(decoder: TargetDecoder) -> int:
    return min(USUAL_CAPACITY, decoder.config.max_positions)


def recorded_on_gpu(
    decoder: TargetDecoder, row_counts: Collection[int], hidden_indices: Collection[int]
) -> TargetDecoder:
    """The decoder, with forwards of so many rows recorded where a GPU computes them and they can be."""
    if decoder.device.type != "cuda" or not recordable(decoder):
        return decoder
    return CapturedDecoder(decoder, row_counts, usual_capacity(decoder), hidden_indices)


class RecordedStep:
    """One token through the whole model, recorded: reads `token_1` and `position_1`, both int64 and on the device, and
    leaves the likeliest next token and the next position there, so that a replay can follow a replay. `logits_1V` is
    what the choice was made from."""

    def __init__(self, decoder: Decoder, capacity: int, *, compiled: bool = False) -> None:
        self.capacity = capacity
        self.cache = decoder.new_cache(capacity)
        self.runner = GraphRunner(decoder.device)
        self._decoder = decoder
        with torch.inference_mode():
            self.token_1 = torch.zeros(1, dtype=torch.long, device=decoder.device)
            self.position_1 = torch.zeros_like(self.token_1)
            self.logits_1V = torch.zeros(1, decoder.config.vocab_size, dtype=decoder.dtype, device=decoder.device)
            self._layers = StaticLayers(
                decoder.geometry, decoder.rotary, self.cache, decoder.config.windows, compiled=compiled
            )
            self._replays = {bucket: self._record(bucket) for bucket in buckets(capacity)}

    def __call__(self, length: int) -> None:
        """One step, after which `length` tokens are in the cache."""
        self._replays[bucket_for(length, self._replays)]()

    def _record(self, bucket: int) -> Work:
        def work() -> None:
            place = self._layers.chain(self.position_1, bucket)
            hidden_SM = run_layers(self._decoder, self._layers, self._decoder.embed(self.token_1), place)
            logits_1V = self._decoder.logits(hidden_SM)
            self.logits_1V.copy_(logits_1V)
            self.token_1.copy_(argmax(logits_1V))
            self.position_1.add_(1)

        self.position_1.zero_()
        return self.runner.record(work)


def run_layers(
    decoder: Decoder,
    layers: StaticLayers,
    hidden_SM: Tensor,
    place: StaticPlace,
    chosen: range | None = None,
    see: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Rows through the layers `chosen` (all by default): `[S, M]`. `see` is shown every hidden state by its index."""
    for layer in decoder.layers if chosen is None else chosen:
        hidden_SM = layers.forward(decoder.weights[layer], layer, hidden_SM, place)
        if see is not None:
            see(layer + 1, hidden_SM)
    return hidden_SM


@dataclass(frozen=True)
class _Shape:
    """One number of rows: what a replay reads and what it leaves."""

    hidden_SM: Tensor
    depths_S: Tensor
    visible_SS: Tensor
    out_SM: Tensor
    logits_SV: Tensor
    states: dict[int, Tensor]
    replays: dict[int, Work]


class CapturedDecoder:
    """A `TargetDecoder` for one sequence at a time, over all layers that `decoder` holds, with forwards of `row_counts`
    rows recorded."""

    takes_trees = True

    def __init__(
        self,
        decoder: Decoder,
        row_counts: Collection[int],
        capacity: int,
        hidden_indices: Collection[int] = (),
        *,
        compiled: bool = False,
    ) -> None:
        self.plain = decoder
        self.runner = GraphRunner(decoder.device)
        self._wanted = frozenset(hidden_indices)
        self._cache = decoder.new_cache(capacity)
        self._hold_trees: set[int] = set()  # the shapes whose last rows were no chain
        self._newest: tuple[Tensor, Tensor] | None = None  # rows as they were returned, and their logits
        with torch.inference_mode():
            self._first = Upload(1, torch.long, decoder.device)
            self._layers = StaticLayers(
                decoder.geometry, decoder.rotary, self._cache, decoder.config.windows, compiled=compiled
            )
            most = max((count for count in row_counts if count <= capacity), default=0)
            self._depths_S = torch.arange(most, device=decoder.device)
            self._before_SS = self._depths_S <= self._depths_S[:, None]
            self._shapes = {count: self._record(count) for count in sorted(set(row_counts)) if count <= capacity}

    @property
    def config(self) -> ModelConfig:
        return self.plain.config

    @property
    def layers(self) -> range:
        return self.plain.layers

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def kernels(self) -> str:
        return self.plain.kernels

    def embed(self, ids_S: Tensor) -> Tensor:
        return self.plain.embed(ids_S)

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
        """As `Decoder.forward`; replayed where rows, cache and what is wanted are as recorded."""
        num_rows, self._newest = len(hidden_SM), None
        count = self._recorded_count(num_rows, tree)
        if (
            not count
            or start + count > cache.capacity
            or cache is not self._cache
            or layers not in (None, self.plain.layers)
            or start != cache.length
            or not self._wanted.issuperset(hidden_indices)
        ):
            return self.plain.forward(hidden_SM, start, cache, layers, hidden_indices, tree, cancelled)
        shape = self._shapes[count]
        shape.hidden_SM[:num_rows].copy_(hidden_SM)
        self._first.send([start])
        if tree is not None:
            self._place(count, tree.depths_S, tree.visible_SW)
            self._hold_trees.add(count)
        elif count in self._hold_trees:
            self._place(count, *self._chain_rows(count))
            self._hold_trees.remove(count)
        shape.replays[bucket_for(start + count, shape.replays)]()
        cache.advance(num_rows)
        out_SM = shape.out_SM[:num_rows]
        self._newest = (out_SM, shape.logits_SV[:num_rows])
        return out_SM, {index: shape.states[index][:num_rows] for index in hidden_indices}

    def _place(self, count: int, depths_S: Tensor, visible_SS: Tensor) -> None:
        shape = self._shapes[count]
        shape.depths_S.copy_(depths_S)
        shape.visible_SS.copy_(visible_SS)

    def _recorded_count(self, num_rows: int, tree: TreeRows | None) -> int:
        """The recorded number of rows that serves so many, 0 if none does. No row sees those that fill up a chain, and
        the next rows are written over them."""
        if tree is None:
            return min((count for count in self._shapes if count >= num_rows), default=0)
        return num_rows if num_rows in self._shapes and tree.visible_SW.shape[1] == num_rows else 0

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """As `Decoder.logits`; there already for what the newest replay gave."""
        newest = self._newest
        if newest is not None and self.plain.head is not None and hidden_SM is newest[0]:
            return newest[1]
        return self.plain.logits(hidden_SM)

    def ids(self, token_ids: Collection[int]) -> Tensor:
        return self.plain.ids(token_ids)

    def new_cache(self, capacity: int, layers: range | None = None) -> TargetCache:
        """The recorded cache, emptied, where it has the room; the sequence before is forgotten."""
        if layers not in (None, self.plain.layers) or capacity > self._cache.capacity:
            return self.plain.new_cache(capacity, layers)
        self._cache.rollback(0)
        return self._cache

    def bytes_per_token(self, layers: range, head: bool) -> int:
        return self.plain.bytes_per_token(layers, head)

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that has room in the recorded cache."""
        return self._cache.capacity

    def _chain_rows(self, num_rows: int) -> tuple[Tensor, Tensor]:
        return self._depths_S[:num_rows], self._before_SS[:num_rows, :num_rows]

    def _record(self, num_rows: int) -> _Shape:
        plain, device = self.plain, self.device
        rows_SM = torch.zeros(num_rows, plain.config.hidden_size, dtype=plain.dtype, device=device)
        depths_S, visible_SS = (chain.clone() for chain in self._chain_rows(num_rows))
        states = {index: torch.zeros_like(rows_SM) for index in self._wanted}
        logits_SV = torch.zeros(num_rows, plain.config.vocab_size, dtype=plain.dtype, device=device)
        shape = _Shape(rows_SM, depths_S, visible_SS, torch.zeros_like(rows_SM), logits_SV, states, {})

        def keep(index: int, hidden_SM: Tensor) -> None:
            if index in states:
                states[index].copy_(hidden_SM)

        def work(bucket: int) -> None:
            place = self._layers.tree(self._first.words, shape.depths_S, shape.visible_SS, bucket)
            keep(plain.layers.start, shape.hidden_SM)
            hidden_SM = run_layers(plain, self._layers, shape.hidden_SM, place, see=keep)
            shape.out_SM.copy_(hidden_SM)
            if plain.head is not None:
                shape.logits_SV.copy_(plain.logits(hidden_SM))

        for bucket in buckets(self._cache.capacity):
            if bucket >= num_rows:
                shape.replays[bucket] = self.runner.record(lambda bucket=bucket: work(bucket))  # type: ignore[misc]
        return shape
