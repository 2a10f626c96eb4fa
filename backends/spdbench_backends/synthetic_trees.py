"""The drafter behind `oracle:P` and `forced:P` where trees are verified: it reads the answer and knows where it stands.

Must not know how trees grow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.synthetic import SyntheticDrafts
from spdbench.decoding.tree import DraftTree, chain


class SyntheticTrees(ABC):
    """The dialled draft leads on from every node of the spine; all else in a tree is wrong."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, drafts: SyntheticDrafts, max_nodes: int, device: torch.device) -> None:
        self.max_nodes = max_nodes
        self._drafts = drafts
        self._device = device
        self._index = 0  # of the root among the new tokens
        self._root = 0

    @abstractmethod
    def _grow(self, root: Tensor, max_levels: int) -> DraftTree:
        """A tree behind the root, of a level at least."""

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:  # noqa: ARG002
        self._root = root

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002
        root = torch.tensor([self._root], device=self._device)
        return DraftTree(chain(0, root.device), root) if max_levels < 1 else self._grow(root, max_levels)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:  # noqa: ARG002
        self._index += len(token_ids)
        self._root = token_ids[-1]

    def dictated(self, num_levels: int) -> Sequence[bool] | None:
        return self._drafts.verdicts(self._index + 1, num_levels)
