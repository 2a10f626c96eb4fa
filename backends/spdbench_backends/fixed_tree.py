"""A tree of one shape, filled anew each round: by level and rank; and the synthetic drafter that fills it.

Serves methods whose candidates for all levels are there at once. Must not know where candidates come from.

Shapes: K levels, k ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdbench.decoding.synthetic import SyntheticDrafts, fill_siblings
from spdbench.decoding.tree import DraftTree, Path, from_paths, sorted_paths
from spdbench_backends.synthetic_trees import SyntheticTrees


class FixedTree:
    """A tree of ranks as tensors: `levels` and `ranks` say where each node's token stands among the candidates."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        ordered = sorted_paths(paths)
        self.tree = from_paths(paths, device)
        self.num_ranks = 1 + max(rank for path in paths for rank in path)
        self._levels = torch.tensor([len(path) - 1 for path in ordered], device=device)
        self._ranks = torch.tensor([path[-1] for path in ordered], device=device)

    def fill(self, root: Tensor, candidates_Kk: Tensor, max_levels: int) -> DraftTree:
        """The tree, no deeper than `max_levels`, with each node's token in its place."""
        tree = self.tree.cut(max_levels)
        drafts = len(tree) - 1
        return DraftTree(tree, torch.cat((root, candidates_Kk[self._levels[:drafts], self._ranks[:drafts]])))


class SyntheticTreeDrafter(SyntheticTrees):
    """Rank 0 of every level is the dialled draft, the other ranks are wrong."""

    def __init__(self, drafts: SyntheticDrafts, tree: FixedTree, device: torch.device) -> None:
        super().__init__(drafts, len(tree.tree), device)
        self._tree = tree

    def _grow(self, root: Tensor, max_levels: int) -> DraftTree:
        levels = min(max_levels, self._tree.tree.num_levels)
        rows = [
            fill_siblings(self._drafts, self._index + level, self._tree.num_ranks) for level in range(1, levels + 1)
        ]
        return self._tree.fill(root, torch.tensor(rows, device=self._device), levels)
