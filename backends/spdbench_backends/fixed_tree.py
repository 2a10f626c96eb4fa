"""A tree of one shape, filled anew each round: by level and rank; and the synthetic drafter that fills it.

Serves methods whose candidates for all levels are there at once. Must not know where candidates come from.

Shapes: K levels, k ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.synthetic import SyntheticDrafts, fill_siblings
from spdbench.decoding.tree import ROOT, DraftTree, Path, from_paths, sorted_paths


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


class SyntheticTreeDrafter:
    """`oracle:P` and `forced:P`: rank 0 of every level is the dialled draft, the other ranks are wrong."""

    wanted: tuple[int, ...] = ()

    def __init__(self, drafts: SyntheticDrafts, tree: FixedTree, device: torch.device) -> None:
        self.max_nodes = len(tree.tree)
        self._drafts = drafts
        self._tree = tree
        self._device = device
        self._index = 0  # of the root among the new tokens
        self._root = 0

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:  # noqa: ARG002
        self._root = root

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002
        root = torch.tensor([self._root], device=self._device)
        levels = min(max_levels, self._tree.tree.num_levels)
        if levels < 1:
            return DraftTree(ROOT, root)
        rows = [
            fill_siblings(self._drafts, self._index + level, self._tree.num_ranks) for level in range(1, levels + 1)
        ]
        return self._tree.fill(root, torch.tensor(rows, device=self._device), levels)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:  # noqa: ARG002
        self._index += len(token_ids)
        self._root = token_ids[-1]

    def dictated(self, num_levels: int) -> Sequence[bool] | None:
        return self._drafts.verdicts(self._index + 1, num_levels)
