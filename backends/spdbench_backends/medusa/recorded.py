"""Medusa's round of drafting, recorded as one piece: heads, candidates, the tree filled. Must not know of verdicts.

Shapes: M model width, N nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.tree_builder import StaticTreeBuilder
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Tensors, Upload
from spdbench.models.decoder import Decoder
from spdbench_backends.medusa.drafter import MedusaDrafter, MedusaWeights, draft_tree


class RecordedMedusa:
    """The heads over a tree of one shape."""

    def __init__(self, weights: MedusaWeights, target: Decoder, builder: StaticTreeBuilder) -> None:
        self._weights, self._target, self._builder = weights, target, builder
        with torch.inference_mode():
            self._root = Upload(1, torch.long, target.device)
            hidden_1M = torch.zeros(1, target.config.hidden_size, dtype=target.dtype, device=target.device)
            self._draft = CapturedFunction(CudaGraphs(target.device), self._work, (hidden_1M,))

    def fill(self, hidden_1M: Tensor, root: int) -> DraftTree:
        """The whole tree behind the token `root`, chosen from `hidden_1M`; holds until the next one."""
        self._root.send([root])
        (ids_N,) = self._draft(hidden_1M)
        return DraftTree(self._builder.tree, ids_N)

    def _work(self, _bucket: int, hidden_1M: Tensor) -> Tensors:
        builder, root_1 = self._builder, self._root.words
        return (draft_tree(self._weights, self._target, builder, hidden_1M, root_1, builder.num_levels).ids_N,)


class RecordedMedusaDrafter(MedusaDrafter):
    """One request's drafter over recorded heads."""

    def __init__(
        self, weights: MedusaWeights, target: Decoder, builder: StaticTreeBuilder, recorded: RecordedMedusa
    ) -> None:
        super().__init__(weights, target, builder)
        self._recorded = recorded

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        """As deep as was recorded, however few levels there is room for."""
        if max_levels < 1:
            return super().propose(max_levels, sampler)
        assert self._hidden is not None
        return self._recorded.fill(self._hidden, self._root)
