"""The Pipeline Draft Module: features of all depths in, logits of the next token out.

Versions 11 and 12 (`AnchoredModule`):

    rows -> one projection a row type -> decoder layers with a cache of their own -> newest row -> the target's final
    norm -> the module's own head

Version 10 (`GroupedModule`) reads a group of hidden states for each depth, and rows begin anew in every layer:

    newest row -> a projection of hidden state 0 -> the layers -> the target's final norm -> the module's own head
    other rows -> the projection of their depth's group -> before each layer, that layer's matrix for their depth

So only the newest row is carried from layer to layer; of the others a layer sees keys and values of their own features.
Source: arXiv 2605.30852 and the code published with it.
Shapes: S rows, M model width, P rows of the ring, F = m M columns for m anchors, U draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.models.attention_context import TreeRows
from spdbench.models.cpu.linear import Linear
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.models.torch_utils import median_seconds, to_device
from spdbench_backends.spd.plan import DeepestRows, FeaturePlan, GroupPlan, NominalRows, Row

LastAnchor = Literal["plain", "normed_prompt", "normed"]
"""How the last layer's output is read: before the final norm; after it in the prompt only, as the reference code does
in decoding; or always after it."""


@dataclass(frozen=True)
class ModuleWeights:
    """What the heads of all versions have. `decoder` holds the module's layers, the target's final norm, and the
    module's head `[U, M]`. `vocabulary` is what the module drafts from."""

    plan: FeaturePlan | GroupPlan
    decoder: Decoder
    vocabulary: DraftVocabulary

    def new_module(self, capacity: int, ring_size: int | None = None) -> DraftModule:
        """The module for one sequence of up to `capacity` tokens, with the features of `ring_size` tokens."""
        raise NotImplementedError

    def new_rows(self) -> DeepestRows | NominalRows:
        """Which rows the module reads in a cycle."""
        return NominalRows(self.plan)


@dataclass(frozen=True)
class HeadWeights(ModuleWeights):
    """Of versions 11 and 12: `projections[i]` is `[M, (i + 1) M]`."""

    plan: FeaturePlan
    projections: tuple[Linear, ...]
    use_deepest: bool
    last_anchor: LastAnchor = "plain"

    def new_module(self, capacity: int, ring_size: int | None = None) -> DraftModule:
        return AnchoredModule(self, capacity, ring_size=ring_size)

    def new_rows(self) -> DeepestRows | NominalRows:
        return DeepestRows(self.plan) if self.use_deepest else NominalRows(self.plan)


class DraftModule(ABC):
    """A head with what it remembers of one sequence of up to `capacity` tokens: the anchor features of the most recent
    positions, and a cache of the module's own layers.

    Features of a position stand side by side in a row of `_ring_PF`, by rising anchor. Rows are reused: no position
    further back than two pipelines, which is the ring's usual size, is read again. `spare_slots` of the cache, and one
    spare row of the ring, are for tokens that do not exist (see `captured.CapturedDraftModule`).
    """

    def __init__(
        self, weights: ModuleWeights, capacity: int, spare_slots: int = 0, ring_size: int | None = None
    ) -> None:
        decoder, plan = weights.decoder, weights.plan
        self._decoder = decoder
        self._full_depth = plan.full_depth
        self._width = decoder.config.hidden_size
        self._ring_size = ring_size or 2 * plan.full_depth + 2
        self._columns = {anchor: slice(i * self._width, (i + 1) * self._width) for i, anchor in enumerate(plan.anchors)}
        self._cache = decoder.new_cache(capacity + spare_slots)
        shape = self._ring_size + 1, len(plan.anchors) * self._width
        self._ring_PF = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)

    def start(self, num_rows: int, states: Mapping[int, Tensor], prompt_length: int) -> None:
        """Reads the prompt's hidden states `[S, M]`: their first `num_rows` are rows at full depth."""
        self._cache.rollback(0)
        first = max(0, prompt_length - min(self._ring_size, 2 * self._full_depth))
        rows_S = to_device(
            [position % self._ring_size for position in range(first, prompt_length)], self._decoder.device
        )
        for anchor, columns in self._columns.items():
            self._ring_PF[:, columns].index_copy_(0, rows_S, states[anchor][first:])
        if num_rows:
            self._read_prompt({anchor: states[anchor][:num_rows] for anchor in self._columns})

    def observe(self, key: int, states: Mapping[int, Tensor]) -> None:
        """New hidden states of a token in flight, by its position or slot (`Row.key`), each `[1, M]`; those that are no
        anchors are ignored."""
        for index, state_1M in states.items():
            if index in self._columns:
                self._ring_PF[key % self._ring_size, self._columns[index]] = state_1M[0]

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Draft logits `[U]` for the token after the last row. Rewrites the cache from the first row on."""
        self._cache.rollback(rows[0].position)
        return self._decoder.logits(self._newest(self._ring_rows(rows), [row.depth for row in rows]))[0]

    def rollback(self, length: int) -> None:
        """Forgets rows of positions from `length` on."""
        self._cache.rollback(length)

    def _ring_rows(self, rows: Sequence[Row]) -> Tensor:
        return to_device([row.key % self._ring_size for row in rows], self._decoder.device)

    @abstractmethod
    def _read_prompt(self, states: Mapping[int, Tensor]) -> None:
        """Puts the first rows of the prompt into the empty cache, at full depth; their anchors are `states`."""

    @abstractmethod
    def _newest(self, ring_rows_S: Tensor, depths: Sequence[int]) -> Tensor:
        """The last layer's output `[1, M]` for the last of S rows, which are behind those in the cache."""


class AnchoredModule(DraftModule):
    """The module of versions 11 and 12: a row of type i is the first (i + 1) M columns of its position's features."""

    def __init__(self, weights: HeadWeights, capacity: int, spare_slots: int = 0, ring_size: int | None = None) -> None:
        super().__init__(weights, capacity, spare_slots, ring_size)
        self.weights = weights
        self._plan = weights.plan
        self._last_anchor = weights.decoder.config.num_layers

    def start(self, num_rows: int, states: Mapping[int, Tensor], prompt_length: int) -> None:
        if self.weights.last_anchor != "plain":
            states = self._with_last_normed(states)
        super().start(num_rows, states, prompt_length)

    def observe(self, key: int, states: Mapping[int, Tensor]) -> None:
        if self.weights.last_anchor == "normed":
            states = self._with_last_normed(states)
        super().observe(key, states)

    def logits_of(self, rows: Sequence[Row], chosen: Sequence[int], tree: TreeRows | None) -> Tensor:
        """Draft logits `[R, U]` for the tokens after the rows `chosen` of a tree, or of a chain. Rewrites the cache
        from the first row on."""
        start = rows[0].position
        self._cache.rollback(start)
        rows_SM = self._project(self._ring_rows(rows), [row.depth for row in rows])
        hidden_SM, _ = self._decoder.forward(rows_SM, start, self._cache, tree=tree)
        return self._decoder.logits(hidden_SM[list(chosen)])

    def _with_last_normed(self, states: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        last = self._last_anchor
        return {**states, last: self._decoder.normed(states[last]).clone()} if last in states else states

    def _read_prompt(self, states: Mapping[int, Tensor]) -> None:
        kind = self._plan.row_type(self._full_depth)
        features = torch.cat([states[anchor] for anchor in self._plan.anchors[: kind + 1]], dim=-1)
        self._decoder.forward(self.weights.projections[kind](features), 0, self._cache)

    def _newest(self, ring_rows_S: Tensor, depths: Sequence[int]) -> Tensor:
        hidden_SM, _ = self._decoder.forward(self._project(ring_rows_S, depths), self._cache.length, self._cache)
        return hidden_SM[-1:]

    def _project(self, ring_rows_S: Tensor, depths: Sequence[int]) -> Tensor:
        """The layers' inputs `[S, M]`: rows of the ring read at `depths`, each row type through its projection."""
        parts, start = [], 0
        for kind, group in groupby(map(self._plan.row_type, depths)):
            end = start + len(list(group))
            features = self._ring_PF[:, : (kind + 1) * self._width].index_select(0, ring_rows_S[start:end])
            parts.append(self.weights.projections[kind](features))
            start = end
        return torch.cat(parts)


class CapturedDraftModule(AnchoredModule):
    """The `CoDrafter` of a streams pipeline: a branch of the captured cycle, next to the stages.

    A cycle with s busy stages has s + 1 rows: the tokens in flight, each as deep as it has come, and the one before
    them at full depth. A `DraftModule` computes that one once; here, where the number of rows must not depend on
    values, it is computed again while the pipeline fills, to the same numbers. Serves heads that read each row as deep
    as it has come. A token at position `capacity` is that of an idle stage: its features go to the spare row of the
    ring and its rows to the spare slots of the cache, which no other token reads.
    """

    def __init__(self, weights: HeadWeights, capacity: int) -> None:
        with torch.inference_mode():
            super().__init__(weights, capacity, spare_slots=weights.plan.full_depth + 2)
            decoder = weights.decoder
            self._capacity = capacity
            self._layers = CapturedLayers(decoder.weights, decoder.geometry, decoder.rotary, self._cache)
            self.logits_1U = torch.zeros(1, weights.vocabulary.size, dtype=decoder.dtype, device=decoder.device)

    def enter(self, position_1: Tensor, hidden_1M: Tensor) -> None:
        self.observe_stage(0, position_1, hidden_1M)

    def observe_stage(self, index: int, position_1: Tensor, hidden_1M: Tensor) -> None:
        rows_1 = (position_1 % self._ring_size).masked_fill(position_1 >= self._capacity, self._ring_size)
        self._ring_PF[:, self._columns[index]].index_copy_(0, rows_1, hidden_1M)

    def draft(self, num_stages: int, position_1: Tensor, bucket: int) -> Tensor:
        decoder = self.weights.decoder
        first_1 = (position_1 - num_stages).masked_fill(position_1 >= self._capacity, self._capacity + 1)
        positions_S = first_1 + torch.arange(num_stages + 1, device=position_1.device)
        depths = (self._plan.full_depth, *reversed(range(num_stages)))
        rows_SM = self._project(positions_S % self._ring_size, depths)
        hidden_SM = self._layers.forward(rows_SM, self._layers.chain(positions_S, bucket), decoder.layers)
        self.logits_1U.copy_(decoder.logits(hidden_SM[-1:]))
        return self.weights.vocabulary.to_target(argmax(self.logits_1U))


@dataclass(frozen=True)
class GroupedWeights(ModuleWeights):
    """`newest` `[M, M]` is for rows of depth 0, `by_depth[d - 1]` `[M, k M]` for those of depth d, which read k hidden
    states; `restarts[layer][d - 1]` `[M, M]` is what that layer reads such rows through."""

    plan: GroupPlan
    newest: Tensor
    by_depth: tuple[Tensor, ...]
    restarts: tuple[tuple[Tensor, ...], ...]

    def new_module(self, capacity: int, ring_size: int | None = None) -> DraftModule:
        return GroupedModule(self, capacity, ring_size=ring_size)


class GroupedModule(DraftModule):
    """Every row but the newest passes each layer only for its keys and values; what else it would compute is left."""

    def __init__(self, weights: GroupedWeights, capacity: int, ring_size: int | None = None) -> None:
        super().__init__(weights, capacity, ring_size=ring_size)
        self._weights = weights

    def _read_prompt(self, states: Mapping[int, Tensor]) -> None:
        group, depth = self._weights.plan.groups[-1], self._full_depth
        features = torch.cat([states[index] for index in group], dim=-1)
        base_SM = linear(features, self._weights.by_depth[-1])
        self._through_layers(base_SM, [depth] * len(base_SM))

    def _newest(self, ring_rows_S: Tensor, depths: Sequence[int]) -> Tensor:
        rows = [self._base(ring_rows_S[row : row + 1], depth) for row, depth in enumerate(depths)]
        return self._through_layers(torch.cat(rows), depths)

    def _base(self, ring_row_1: Tensor, depth: int) -> Tensor:
        """A row's features through the projection of its depth: `[1, M]`."""
        weights = self._weights
        group = weights.plan.groups[depth - 1] if depth else (0,)
        features = [self._ring_PF[:, self._columns[index]].index_select(0, ring_row_1) for index in group]
        return linear(torch.cat(features, dim=-1), weights.by_depth[depth - 1] if depth else weights.newest)

    def _through_layers(self, base_SM: Tensor, depths: Sequence[int]) -> Tensor:
        """The last row's output `[1, M]`; in every layer rows of a depth begin with `base_SM` through its matrix."""
        start, carried_1M = self._cache.length, base_SM[-1:]
        for layer, restarts in enumerate(self._weights.restarts):
            rows = [
                linear(row_M[None], restarts[depth - 1]) if depth else carried_1M
                for row_M, depth in zip(base_SM, depths, strict=True)
            ]
            self._cache.rollback(start)  # each layer writes the same slots, of its own keys and values
            hidden_SM, _ = self._decoder.forward(torch.cat(rows), start, self._cache, range(layer, layer + 1))
            carried_1M = hidden_SM[-1:].clone()
        return carried_1M


def drafting_seconds(weights: ModuleWeights, threads: int, target: TargetDecoder) -> float:
    """Seconds of a draft in a full pipeline, timed in turn with forwards of the `target`, so that the draft module's
    weights are not in the processor's caches."""
    plan, decoder = weights.plan, weights.decoder
    width, depth = decoder.config.hidden_size, plan.full_depth
    prompt_length = 2 * depth
    module = weights.new_module(prompt_length)
    state_SM = torch.zeros(prompt_length, width, dtype=decoder.dtype, device=decoder.device)
    states = dict.fromkeys(plan.anchors, state_SM)
    first = prompt_length - depth
    module.start(first, states, prompt_length)
    rows = [Row(position, prompt_length - 1 - position) for position in range(first, prompt_length)]
    cache = target.new_cache(1)

    def forward() -> None:
        target.forward(target.embed(target.ids((0,))), 0, cache)
        cache.rollback(0)

    return median_seconds(lambda: int(module.logits(rows).argmax()), threads=threads, between=forward)
