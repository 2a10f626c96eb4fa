"""Trees of drafted tokens: parents, depths, and which nodes attend to which.

Node 0 is the root, the newest token, which is known; every other node is a draft for the position after its parent's.
Parents come before their children, and siblings are in the order of preference. A chain is a tree of width one.

Shapes: N nodes, the root included; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from spdbench.models.attention_context import TreeRows

Path = tuple[int, ...]
"""A node as the ranks on the way to it: (0, 2) is the third choice after the first choice."""


@dataclass(frozen=True)
class Tree:
    """`parents_N` holds -1 for the root. No node is deeper than `num_levels`. In a chain no node has a sibling, so the
    causal mask is the tree's mask. `known_rows` are the tree's rows where a caller has computed them already."""

    parents_N: Tensor
    num_levels: int
    is_chain: bool = False
    known_rows: TreeRows | None = None

    def __len__(self) -> int:
        return len(self.parents_N)

    @cached_property
    def rows(self) -> TreeRows:
        """The depth of every node, and the nodes that it sees: its ancestors and itself.

        Takes one tensor operation a level, not one a node: after pass d a node sees d generations of ancestors.
        """
        if self.known_rows is not None:
            return self.known_rows
        parents_N = self.parents_N.clamp(min=0)
        visible_NN = torch.eye(len(self), dtype=torch.bool, device=parents_N.device)
        for _ in range(self.num_levels):
            visible_NN = visible_NN | visible_NN[parents_N]
        return TreeRows(visible_NN.sum(dim=1) - 1, visible_NN)

    def cut(self, num_levels: int) -> Tree:
        """The tree without its nodes below level `num_levels`; only for trees whose nodes are sorted by depth."""
        if num_levels >= self.num_levels:
            return self
        num_nodes = num_levels + 1 if self.is_chain else int((self.rows.depths_S <= num_levels).sum())
        return Tree(self.parents_N[:num_nodes], num_levels, self.is_chain)


def chain(num_levels: int, device: torch.device | None = None) -> Tree:
    """One draft a level; with no level, a lone root."""
    return Tree(torch.arange(-1, num_levels, device=device), num_levels, is_chain=True)


def chain_paths(num_levels: int) -> tuple[Path, ...]:
    """The paths of a chain: the first choice at every level."""
    return tuple((0,) * level for level in range(1, num_levels + 1))


def sorted_paths(paths: Sequence[Path]) -> list[Path]:
    """By depth, then in the order of preference: the order of a tree's nodes after the root."""
    return sorted(paths, key=lambda path: (len(path), path))


def from_paths(paths: Sequence[Path], device: torch.device | None = None) -> Tree:
    """The tree of `paths`, each of which must have its parent among them; nodes in the order of `sorted_paths`."""
    ordered = sorted_paths(paths)
    node_of = {(): 0} | {path: node for node, path in enumerate(ordered, 1)}
    parents = [-1, *(node_of[path[:-1]] for path in ordered)]
    num_levels = max(map(len, ordered), default=0)
    return Tree(torch.tensor(parents, device=device), num_levels, is_chain=len(ordered) == num_levels)


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens in a tree: `ids_N[0]` is the root's.

    `drawn` holds, for the chain of a drafter that samples, the distribution `[V]` from which each draft was drawn; None
    where drafts were picked. `forced_verdicts`, by level, replace verification in timing experiments (`forced:P`): true
    accepts the first child of the node before, false rejects all its children.
    """

    tree: Tree
    ids_N: Tensor
    drawn: tuple[Tensor, ...] | None = None
    forced_verdicts: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if self.tree.parents_N.device != self.ids_N.device:
            raise ValueError(f"a tree on {self.tree.parents_N.device} of tokens on {self.ids_N.device}")


def lone_root(root_1: Tensor) -> DraftTree:
    """No drafts after the token `root_1` `[1]`."""
    return DraftTree(chain(0, root_1.device), root_1)


CHILDREN: dict[str, tuple[str, ...]] = {
    "eagle_1": ("4", "3 2 2 1", "3 2 2 1", "3", "2"),
    "mc_sim_7b_63": ("10", "10 7 3 2 1 1 1 1 1 1", "10 3 2 1 1 1 1 1 0 0 2 0 0 0 0 0 0 1", "2"),
    "vicuna_7b_stage2": ("10", "10 5 2 2 1 1 1 1", "9 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1", "4 1 1 0 0 0 0 0 0 1"),
    "vicuna_13b_stage2": (
        "10",
        "10 4 2 1 1 1",
        "10 4 2 1 1 1 0 0 0 0 3 1 0 0 1 0 1",
        "4 2 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 1",
    ),
    "vicuna_33b_stage2": (
        "10",
        "10 5 3 2 1 1 1 1",
        "10 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1",
        "3 1 0 0 0 0 0 0 0 0 1",
    ),
    "zephyr_stage2": ("10", "10 6 4 2 2 1 1 1", "10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 1", "2 1"),
}
"""Trees that the methods' authors published. Siblings take the first ranks without a gap, so a tree is given by the
number of children of each node, level by level: the root's, then those of the nodes of level 1 in order, and so on;
zeros at the end of a level are omitted. `eagle_1`: EAGLE-1's static tree (arXiv 2401.15077). The others are Medusa's
(arXiv 2401.10774): one of version 1, and those of version 2 by model."""


@cache
def named_tree(name: str) -> tuple[Path, ...]:
    """The paths of the tree called `name`, by depth and preference."""
    level: Sequence[Path] = [()]
    paths: list[Path] = []
    for counts in CHILDREN[name]:
        by_node = zip(level, map(int, counts.split()), strict=False)
        level = [(*parent, rank) for parent, count in by_node for rank in range(count)]
        paths += level
    return tuple(paths)
