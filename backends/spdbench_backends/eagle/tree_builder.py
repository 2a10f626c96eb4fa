"""How EAGLE's trees grow: level by level, each level's rows through the head once.

A chain takes the best child of the newest draft. A static tree has a fixed shape: which ranks are taken behind which
node. A dynamic tree (EAGLE-2, arXiv 2406.16858) lets the k most probable nodes of a level go on, and of all that were
seen keeps the N - 1 with the greatest probability along their path; METHODS.md A.3. All is tensor arithmetic on the
head's device: no step waits for the host, and none goes node by node.

Must not know what a head is: candidates come from a `Proposer`.

Shapes: S rows that go on, k candidates each, W slots of the tree so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spdbench.decoding.named_trees import named_tree
from spdbench.decoding.tree import DraftTree, Path, Tree, chain, from_paths, sorted_paths
from spdbench.models.attention_context import TreeRows


class Candidates(NamedTuple):
    """For each row its k best next tokens, best first: log-probabilities and ids, `[S, k]`."""

    scores_SK: Tensor
    ids_SK: Tensor


class Proposer(Protocol):
    """Gives candidates behind the root, and behind rows that follow candidates given last."""

    def first(self, count: int) -> Candidates:
        """Behind the root: one row."""

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:
        """Behind tokens `ids_S`, each a child of row `parents_S` of the rows asked last."""


class TreeBuilder(Protocol):
    """A way of growing trees. `num_levels` and `max_nodes`, the root included, bound what it gives."""

    @property
    def num_levels(self) -> int: ...

    @property
    def max_nodes(self) -> int: ...

    def grow(self, proposer: Proposer, root: Tensor, max_levels: int) -> DraftTree:
        """A tree behind the token `root` `[1]`, of one level at least and `max_levels` at most."""


@dataclass(frozen=True)
class ChainBuilder:
    """The best child, `num_levels` times."""

    num_levels: int

    @property
    def max_nodes(self) -> int:
        return self.num_levels + 1

    def grow(self, proposer: Proposer, root: Tensor, max_levels: int) -> DraftTree:
        levels = min(self.num_levels, max_levels)
        ids = [root, proposer.first(1).ids_SK[0]]
        for level in range(1, levels):
            rows = TreeRows(
                torch.full((1,), level - 1, device=root.device),
                torch.ones(1, level, dtype=torch.bool, device=root.device),
            )
            ids.append(proposer.next(torch.zeros_like(root), ids[-1], rows, 1).ids_SK[0])
        return DraftTree(chain(levels, root.device), torch.cat(ids))


class _Level(NamedTuple):
    """One level of a static tree: which row of the level before each node follows and its rank there; which of the
    nodes go on, and what they see of the rows that went on before them and of themselves."""

    parent_row: Tensor
    rank: Tensor
    going_on: Tensor
    visible_SW: Tensor


@dataclass(frozen=True)
class StaticTreeBuilder:
    """A fixed shape, as paths of ranks with every parent among them."""

    paths: tuple[Path, ...]
    device: torch.device

    @cached_property
    def tree(self) -> Tree:
        return from_paths(self.paths, self.device)

    @property
    def num_levels(self) -> int:
        return self.tree.num_levels

    @property
    def max_nodes(self) -> int:
        return len(self.tree)

    def grow(self, proposer: Proposer, root: Tensor, max_levels: int) -> DraftTree:
        tree = self.tree.cut(max_levels)
        candidates = proposer.first(self._width)
        ids = [root]
        for depth, level in enumerate(self._levels[: tree.num_levels]):
            ids.append(candidates.ids_SK[level.parent_row, level.rank])
            if depth + 1 < tree.num_levels:
                rows = TreeRows(torch.full_like(level.going_on, depth), level.visible_SW)
                going_on = level.going_on
                candidates = proposer.next(level.parent_row[going_on], ids[-1][going_on], rows, self._width)
        return DraftTree(tree, torch.cat(ids))

    @cached_property
    def _width(self) -> int:
        return 1 + max(rank for path in self.paths for rank in path)

    @cached_property
    def _levels(self) -> list[_Level]:
        ordered = sorted_paths(self.paths)
        inner = {path[:-1] for path in ordered}
        levels: list[_Level] = []
        went_on: list[Path] = []
        before: Sequence[Path] = [()]
        for depth in range(1, self.num_levels + 1):
            nodes = [path for path in ordered if len(path) == depth]
            on = [path for path in nodes if path in inner]
            went_on += on
            sees = [[path[: len(other)] == other for other in went_on] for path in on]
            levels.append(
                _Level(
                    self._tensor([before.index(path[:-1]) for path in nodes]),
                    self._tensor([path[-1] for path in nodes]),
                    self._tensor([nodes.index(path) for path in on]),
                    torch.tensor(sees, dtype=torch.bool, device=self.device),
                )
            )
            before = on
        return levels

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)


@dataclass(frozen=True)
class DynamicTreeBuilder:
    """The most probable paths. `top_k` nodes of each level go on; `total_tokens` nodes are kept, the root included."""

    num_levels: int
    top_k: int
    total_tokens: int

    @property
    def max_nodes(self) -> int:
        return self.total_tokens

    def grow(self, proposer: Proposer, root: Tensor, max_levels: int) -> DraftTree:
        # A node is kept only if it is among the best of its level, so a beam wider than the tree finds nothing more.
        levels, k = min(self.num_levels, max_levels), min(self.top_k, self.total_tokens - 1)
        first = proposer.first(k)
        scores, ids = [first.scores_SK[0].double()], [first.ids_SK[0]]
        parents = [torch.full((k,), -1, device=root.device)]
        beam_scores, beam_ids, beam_rows = scores[0], ids[0], torch.zeros_like(ids[0])
        beam_nodes = torch.arange(k, device=root.device)
        eye = torch.eye(k, dtype=torch.bool, device=root.device)
        visible = eye
        pool = k
        for level in range(1, levels):
            rows = TreeRows(torch.full((k,), level - 1, device=root.device), visible)
            found = proposer.next(beam_rows, beam_ids, rows, k)
            # A child is a shade less probable than its parent, so that no child is kept without it.
            child_scores = (beam_scores[:, None] + found.scores_SK.double() - TIE_BREAK).flatten()
            scores.append(child_scores)
            ids.append(found.ids_SK.flatten())
            parents.append(beam_nodes[:, None].expand(k, k).flatten())
            beam_scores, best = child_scores.topk(k)
            beam_ids, beam_rows, beam_nodes = ids[-1][best], best // k, best + pool
            visible = torch.cat((visible[beam_rows], eye), dim=1)
            pool += k * k
        return self._keep_best(torch.cat(scores), torch.cat(ids), torch.cat(parents), root, levels)

    def _keep_best(self, scores: Tensor, ids: Tensor, parents: Tensor, root: Tensor, levels: int) -> DraftTree:
        kept = scores.topk(min(self.total_tokens - 1, len(scores))).indices.sort().values
        # Kept nodes stand in the order of the pool, in which the root comes before all.
        new_parents = torch.searchsorted(kept, parents[kept]) + 1
        new_parents = torch.where(parents[kept] < 0, 0, new_parents)
        tree = Tree(torch.cat((torch.full_like(root, -1), new_parents)), levels)
        return DraftTree(tree, torch.cat((root, ids[kept])))


TIE_BREAK = 1e-9

EAGLE_1 = named_tree("eagle_1")
"""EAGLE-1's tree of 25 drafts, level by level."""
