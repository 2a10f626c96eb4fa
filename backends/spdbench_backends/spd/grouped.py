"""The Pipeline Draft Module of version 10: a group of hidden states for each depth, and rows that begin anew in every
layer.

    newest row -> a projection of hidden state 0 -> the layers -> the target's final norm -> the module's own head
    other rows -> the projection of their depth's group -> before each layer, that layer's matrix for their depth

So only the newest row is carried from layer to layer; of the others a layer sees keys and values of their own features.
Source: SPD.md, section 3.

Shapes: S rows, M model width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench_backends.spd.head import DraftModule, ModuleWeights
from spdbench_backends.spd.plan import GroupPlan


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
