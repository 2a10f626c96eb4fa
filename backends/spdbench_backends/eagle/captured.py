"""EAGLE's round of drafting as one captured function: committed rows through the head, and the tree after them.

`drafter.draft_tree` itself is captured, over a head whose positions and slots are read from the device. A round begins
with a fixed number of rows, as many as a round can accept. Where fewer tokens were accepted, rows in front pad them, so
that the last row is the newest token's, captured or not. Padding is written to the slot after the last row, which no
token's row sees, and which the tree or the next round overwrites.

Shapes: S rows, R rows of a round, F feature columns, N nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree, Tree
from spdbench.decoding.tree_builder import TreeBuilder
from spdbench.models.attention_context import TreeRows
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Tensors, Upload, buckets
from spdbench.models.cuda.captured_layers import CapturedContext, CapturedLayers
from spdbench_backends.eagle.drafter import Rounds, draft_tree
from spdbench_backends.eagle.head import EagleHead, EagleWeights


class CapturedHead(EagleHead):
    """A head within a captured round. Its first rows are at `positions_R`, a tree's rows from slot `start_1` on."""

    def __init__(
        self, weights: EagleWeights, layers: CapturedLayers, positions_R: Tensor, start_1: Tensor, bucket: int
    ) -> None:
        super().__init__(weights)
        self._layers = layers
        self._positions_R, self._start_1 = positions_R, start_1
        self._bucket = bucket

    def extend(self, features_SF: Tensor, ids_S: Tensor) -> tuple[Tensor, Tensor]:
        context = self._layers.chain(self._positions_R, self._bucket)
        return self._logits(self._forward(self._fused(features_SF), ids_S, context)[-1:])

    def extend_tree(self, states_SM: Tensor, ids_S: Tensor, rows: TreeRows) -> tuple[Tensor, Tensor]:
        context = self._layers.tree(self._start_1, rows.depths_S, rows.visible_SW, self._bucket)
        return self._logits(self._forward(states_SM, ids_S, context))

    def _forward(self, features_SM: Tensor, ids_S: Tensor, context: CapturedContext) -> Tensor:
        inputs, residual_SM = self._entering(features_SM, self._embedded(ids_S))
        hidden_SM = self._layers.body(0, inputs, residual_SM, context)
        return self._layers.forward(hidden_SM, context, range(1, len(self.weights.layers)))


class CapturedRounds(Rounds):
    """Rounds that are replayed, for one sequence at a time. Trees always have all levels. `num_columns` is the width F
    of the features."""

    def __init__(
        self, weights: EagleWeights, num_columns: int, builder: TreeBuilder, capacity: int, *, compiled: bool = False
    ) -> None:
        self._num_rows = builder.num_levels + 1
        super().__init__(weights, builder, capacity + self._num_rows)
        self._is_chain = False
        with torch.inference_mode():
            layers = dict(enumerate(weights.layers))
            self._layers = CapturedLayers(
                layers, weights.geometry, weights.rotary, self._module.cache, compiled=compiled
            )
            self._sent = Upload(1 + self._num_rows, torch.long, weights.device)
            self._sent.send([self._num_rows, *range(self._num_rows)])
            features_RF = torch.zeros(self._num_rows, num_columns, dtype=weights.dtype, device=weights.device)
            ids_R = torch.zeros(self._num_rows, dtype=torch.long, device=weights.device)
            self._round = CapturedFunction(
                CudaGraphs(weights.device),
                self._draft_round,
                (features_RF, ids_R),
                buckets(self._module.cache.capacity),
            )

    def draft(
        self,
        features_SF: Tensor,
        next_ids_S: Tensor,
        max_levels: int,  # noqa: ARG002
        sampler: Sampler,  # noqa: ARG002 - a replayed round picks
    ) -> DraftTree:
        """Commits rows, and builds a tree after the last of `next_ids_S`; valid until the next call. More rows than a
        round begins with, as a prompt has, take the eager path."""
        if len(next_ids_S) > self._num_rows:
            self._module.extend(features_SF[:-1], next_ids_S[:-1])
            features_SF, next_ids_S = features_SF[-1:], next_ids_S[-1:]
        count, start = len(next_ids_S), self._module.num_committed
        features_RF, ids_R = self._round.inputs
        features_RF[-count:].copy_(features_SF)
        ids_R[-count:].copy_(next_ids_S)
        end = start + count
        self._sent.send([end, *[end] * (self._num_rows - count), *range(start, end)])
        ids_N, parents_N, depths_N, visible_NN = self._round(length=end + self._tree_slots)
        self._module.commit(count)
        tree = Tree(parents_N, self.builder.num_levels, self._is_chain, TreeRows(depths_N, visible_NN))
        return DraftTree(tree, ids_N)

    def _draft_round(self, bucket: int, features_RF: Tensor, ids_R: Tensor) -> Tensors:
        start_1, positions_R = self._sent.words[:1], self._sent.words[1:]
        head = CapturedHead(self.weights, self._layers, positions_R, start_1, bucket)
        draft = draft_tree(head, self.builder, features_RF, ids_R, self.builder.num_levels)
        self._is_chain = draft.tree.is_chain
        rows = draft.tree.rows
        return draft.ids_N, draft.tree.parents_N, rows.depths_S, rows.visible_SW
