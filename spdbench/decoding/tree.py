"""Trees of drafted tokens: who is whose child, how deep, and who sees whom.

Node 0 is the root, the newest token, which is known; every other node is a draft for the position after its parent's.
Parents come before children, and siblings in the order of preference. Must not know of models, caches or verdicts.

Shapes: N nodes, the root included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spdbench.models.attention_context import TreeRows

Path = tuple[int, ...]
"""A node as the ranks on the way to it: (0, 2) is the third choice behind the first."""


@dataclass(frozen=True)
class Tree:
    """`parents_N` holds -1 for the root. No node is deeper than `num_levels`. In a chain no node has a sibling, and
    causality says who sees whom."""

    parents_N: Tensor
    num_levels: int
    is_chain: bool = False

    def __len__(self) -> int:
        return len(self.parents_N)

    @cached_property
    def rows(self) -> TreeRows:
        """Depth of every node, and whom it sees: its ancestors and itself. One pass a level, none a node."""
        parents_N = self.parents_N.clamp(min=0)
        visible_NN = torch.eye(len(self), dtype=torch.bool, device=parents_N.device)
        for _ in range(self.num_levels):
            visible_NN = visible_NN | visible_NN[parents_N]
        return TreeRows(visible_NN.sum(dim=1) - 1, visible_NN)

    def cut(self, num_levels: int) -> Tree:
        """The tree without what lies deeper; only for one whose nodes stand in the order of depth."""
        if num_levels >= self.num_levels:
            return self
        num_nodes = int((self.rows.depths_S <= num_levels).sum())
        return Tree(self.parents_N[:num_nodes], num_levels, self.is_chain)


def chain(num_levels: int, device: torch.device | None = None) -> Tree:
    """One draft a level; of no level a lone root."""
    return Tree(torch.arange(-1, num_levels, device=device), num_levels, is_chain=True)


def sorted_paths(paths: Sequence[Path]) -> list[Path]:
    """By depth, then in the order of preference: the order of a tree's nodes behind the root."""
    return sorted(paths, key=lambda path: (len(path), path))


def from_paths(paths: Sequence[Path], device: torch.device | None = None) -> Tree:
    """The tree of `paths`, every one of which must have its parent among them; nodes as `sorted_paths` has them."""
    ordered = sorted_paths(paths)
    node_of = {(): 0} | {path: node for node, path in enumerate(ordered, 1)}
    parents = [-1, *(node_of[path[:-1]] for path in ordered)]
    num_levels = max(map(len, ordered), default=0)
    return Tree(torch.tensor(parents, device=device), num_levels, is_chain=len(ordered) == num_levels)


@dataclass(frozen=True)
class GrownTree(Tree):
    """A tree of which it is already known who sees whom."""

    known: TreeRows | None = None

    @cached_property
    def rows(self) -> TreeRows:
        assert self.known is not None
        return self.known


@dataclass(frozen=True)
class DraftTree:
    """Tokens for a tree: `ids_N[0]` is the root's. `drawn` holds, for the chain of a drafter that samples, the
    distribution `[V]` that each draft was drawn from; None where drafts were picked."""

    tree: Tree
    ids_N: Tensor
    drawn: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.tree.parents_N.device != self.ids_N.device:
            raise ValueError(f"a tree on {self.tree.parents_N.device} of tokens on {self.ids_N.device}")
