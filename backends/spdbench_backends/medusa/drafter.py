"""Medusa's drafter: one look at the last hidden state gives candidates for all levels, a fixed tree combines them.

Must not know how trees are verified.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.tree import DraftTree, chain
from spdbench.models.decoder import Decoder
from spdbench_backends.fixed_tree import FixedTree
from spdbench_backends.medusa.head import MedusaWeights


class MedusaDrafter:
    """The heads at work on one request."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, weights: MedusaWeights, target: Decoder, tree: FixedTree) -> None:
        self.max_nodes = len(tree.tree)
        self._weights = weights
        self._target = target
        self._tree = tree
        self._hidden: Tensor | None = None
        self._root = 0

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:  # noqa: ARG002
        self._take(features, root)

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002 - picks, and never draws
        root = self._target.ids((self._root,))
        levels = min(max_levels, self._tree.tree.num_levels)
        if levels < 1:
            return DraftTree(chain(0, root.device), root)
        assert self._hidden is not None
        logits = self._weights.logits(self._target.normed(self._hidden), levels)
        best = logits.topk(self._tree.num_ranks, dim=-1).indices
        return self._tree.fill(root, self._weights.token_ids(best), levels)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        self._take(features, token_ids[-1])

    def dictated(self, num_levels: int) -> Sequence[bool] | None:  # noqa: ARG002
        return None

    def _take(self, features: Features, root: int) -> None:
        """The hidden state that the root was chosen from."""
        self._hidden, self._root = features.hidden[-1:], root
