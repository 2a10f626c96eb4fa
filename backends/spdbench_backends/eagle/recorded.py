"""EAGLE's round of drafting, recorded as one piece: committed rows through the head, and the tree behind them.

    rows of accepted tokens (as many as a round can accept; what is behind the valid ones is written over by the tree)
    candidates behind the last valid row, then level by level, as the builder does

All is on the device: what the host sends are tokens and where they stand. The cache is that of a plain `EagleModule`,
which serves the first round and those near the limit. Must not know how trees are verified.

Shapes: S rows, R rows of a round, F feature columns, N nodes, M draft width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.tree import DraftTree, Tree
from spdbench.decoding.tree_builder import TreeBuilder
from spdbench.models.attention_context import TreeRows
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Tensors, Upload, buckets
from spdbench.models.cuda.captured_layers import CapturedContext, CapturedLayers
from spdbench.models.decoder import Decoder
from spdbench_backends.eagle.drafter import EagleDrafter, HeadProposer
from spdbench_backends.eagle.head import EagleModule, EagleWeights


class RecordedEagle(EagleModule):
    """A head for one sequence at a time of up to `capacity` tokens, with a round recorded for every bucket."""

    def __init__(
        self, weights: EagleWeights, target: Decoder, builder: TreeBuilder, capacity: int, *, compiled: bool = False
    ) -> None:
        self._num_rows = builder.num_levels + 1
        self._scratch = builder.num_levels * builder.max_nodes
        super().__init__(weights, capacity + self._num_rows + self._scratch)
        self._builder = builder
        self._bucket = 0  # of the round that is being recorded
        with torch.inference_mode():
            self._static = CapturedLayers(
                dict(enumerate(weights.layers)), weights.geometry, weights.rotary, self._cache, compiled=compiled
            )
            self._sent = Upload(2 + self._num_rows, torch.long, weights.device)
            words = self._sent.words
            self._first_1, self._count_1, self._ids_R = words[:1], words[1:2], words[2:]
            columns = target.config.hidden_size * max(1, len(weights.aux))
            features_RF = torch.zeros(self._num_rows, columns, dtype=weights.dtype, device=weights.device)
            self._sent.send([0, 1, *[0] * self._num_rows])
            sizes = buckets(self._cache.capacity)
            self._round = CapturedFunction(CudaGraphs(weights.device), self._work, (features_RF,), sizes)

    @property
    def num_rows(self) -> int:
        """The most rows that a round can begin with."""
        return self._num_rows

    def replay(self, features_SF: Tensor, token_ids: Sequence[int]) -> DraftTree:
        """Commits rows as `extend` does and builds a tree of all levels behind them; holds until the next replay."""
        count = len(token_ids)
        self._round.inputs[0][:count].copy_(features_SF)
        self._sent.send([self._committed, count, *token_ids, *[0] * (self._num_rows - count)])
        ids_N, parents_N, depths_N, visible_NN = self._round(length=self._committed + self._num_rows + self._scratch)
        self._committed += count
        self._cache.rollback(0)
        self._cache.advance(self._committed)
        tree = Tree(parents_N, self._builder.num_levels, self._is_chain, TreeRows(depths_N, visible_NN))
        return DraftTree(tree, ids_N)

    def extend_tree(self, states_SM: Tensor, ids_S: Tensor, rows: TreeRows) -> tuple[Tensor, Tensor]:
        """As ever, or, while a round is recorded, behind the rows that it begins with."""
        if not self._bucket:
            return super().extend_tree(states_SM, ids_S, rows)
        first_1 = self._first_1 + self._count_1
        place = self._static.tree(first_1, rows.depths_S, rows.visible_SW, self._bucket)
        return self._logits(self._through(states_SM, ids_S, place))

    def _work(self, bucket: int, features_RF: Tensor) -> Tensors:
        self._bucket = bucket
        try:
            positions_R = self._first_1 + torch.arange(self._num_rows, device=self.weights.device)
            context = self._static.chain(positions_R, bucket)
            hidden_RM = self._through(self._fused(features_RF), self._ids_R, context)
            logits_1U, state_1M = self._logits(hidden_RM.index_select(0, self._count_1 - 1))
            root_1 = self._ids_R.index_select(0, self._count_1 - 1)
            proposer = HeadProposer(self, logits_1U, state_1M)
            draft = self._builder.build_tree(proposer, root_1, self._builder.num_levels)
            self._is_chain = draft.tree.is_chain
            rows = draft.tree.rows
            return draft.ids_N, draft.tree.parents_N, rows.depths_S, rows.visible_SW
        finally:
            self._bucket = 0

    def _through(self, features_SM: Tensor, ids_S: Tensor, context: CapturedContext) -> Tensor:
        inputs, hidden_SM = self._entering(features_SM, ids_S)
        hidden_SM = self._static.body(0, inputs, hidden_SM, context)
        return self._static.forward(hidden_SM, context, range(1, len(self.weights.layers)))


class RecordedEagleDrafter(EagleDrafter):
    """One request's drafter over a recorded head."""

    def __init__(self, weights: EagleWeights, target: Decoder, builder: TreeBuilder, recorded: RecordedEagle) -> None:
        super().__init__(weights, target, builder, 0, recorded)
        self._recorded = recorded
        self._tokens: tuple[int, ...] = ()

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        self._recorded.reset()
        self._tokens = (root,)
        super().start(prompt_ids, features, root)

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        """As deep as was recorded, however few levels there is room for. All of the prompt but its last row takes the
        plain path."""
        if max_levels < 1:
            return super().propose(max_levels, sampler)
        assert self._features is not None
        assert self._next_ids is not None
        features_SF = self._inputs(self._features)
        if len(features_SF) > len(self._tokens):
            self._recorded.extend(features_SF[:-1], self._next_ids[:-1])
        return self._recorded.replay(features_SF[-len(self._tokens) :], self._tokens)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        self._tokens = tuple(token_ids)
        super().accept(token_ids, features)
