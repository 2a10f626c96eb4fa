"""Tree builders: from a proposer's candidates to a tree of drafts, level by level.

A static tree has a fixed shape: which ranks are taken after which node; a chain is the static tree of width one. A
dynamic tree (EAGLE-2, arXiv 2406.16858) lets the k most probable nodes of a level go on, and of all candidates that it
has seen keeps the N - 1 with the greatest probability along their path; EAGLE-2, arXiv 2406.16858.

All is tensor arithmetic on the device of the root: no step waits for the host and none loops over nodes, so that a
builder can be captured in a CUDA graph.

Shapes: S rows that go on, k candidates each, W slots of the tree so far, K levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spdbench.decoding.tree import DraftTree, Path, Tree, chain_paths, from_paths, sorted_paths
from spdbench.models.attention_context import TreeRows


class Candidates(NamedTuple):
    """For each row its k best next tokens, best first: log-probabilities and ids, `[S, k]`."""

    scores_SK: Tensor
    ids_SK: Tensor


class Proposer(Protocol):
    """Proposes candidates after the root, then after rows that follow the candidates proposed last."""

    def first(self, count: int) -> Candidates:
        """`count` candidates after the root: one row."""

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:
        """`count` candidates after each of the tokens `ids_S`, each a child of row `parents_S` of the previous call."""


class TreeBuilder(Protocol):
    """A way to build trees of at most `num_levels` levels and `max_nodes` nodes, the root included."""

    @property
    def num_levels(self) -> int: ...

    @property
    def max_nodes(self) -> int: ...

    def build_tree(self, proposer: Proposer, root_1: Tensor, max_levels: int) -> DraftTree:
        """A tree after the token `root_1` `[1]`, of one level at least and `max_levels` at most."""


class _Level(NamedTuple):
    """One level of a static tree.

    Every node takes the candidate of rank `ranks`, below `num_ranks`, of row `parent_rows` of the level before. The
    nodes `inner` have children: they are the next call's rows, with parent rows `inner_parents`, and see `rows` of the
    inner nodes so far.
    """

    parent_rows: Tensor
    ranks: Tensor
    num_ranks: int
    inner: Tensor
    inner_parents: Tensor
    rows: TreeRows


class StaticTreeBuilder:
    """Fills a fixed shape, given as paths of ranks with every parent among them."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        self.tree = from_paths(paths, device)
        self.num_levels, self.max_nodes = self.tree.num_levels, len(self.tree)
        self.num_ranks = 1 + max(rank for path in paths for rank in path)
        self._levels = list(_static_levels(sorted_paths(paths), device))

    def build_tree(self, proposer: Proposer, root_1: Tensor, max_levels: int) -> DraftTree:
        tree = self.tree.cut(max_levels)
        ids = [root_1]
        for depth, level in enumerate(self._levels[: tree.num_levels]):
            if depth == 0:
                candidates = proposer.first(level.num_ranks)
            else:
                before = self._levels[depth - 1]
                inner_ids = ids[-1] if len(before.inner) == len(ids[-1]) else ids[-1][before.inner]
                candidates = proposer.next(before.inner_parents, inner_ids, before.rows, level.num_ranks)
            ids.append(candidates.ids_SK[level.parent_rows, level.ranks])
        return DraftTree(tree, torch.cat(ids))


def chain_builder(num_levels: int, device: torch.device) -> StaticTreeBuilder:
    """The best child, `num_levels` times."""
    return StaticTreeBuilder(chain_paths(num_levels), device)


def is_chain(builder: TreeBuilder) -> bool:
    """True if all that it builds are chains."""
    return isinstance(builder, StaticTreeBuilder) and builder.tree.is_chain


def _static_levels(ordered: Sequence[Path], device: torch.device) -> Sequence[_Level]:
    def indices(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    with_children = {path[:-1] for path in ordered}
    levels: list[_Level] = []
    inner_so_far: list[Path] = []
    rows_before: Sequence[Path] = [()]
    for depth in range(1, len(ordered[-1]) + 1):
        nodes = [path for path in ordered if len(path) == depth]
        inner = [path for path in nodes if path in with_children]
        inner_so_far += inner
        sees = [[path[: len(other)] == other for other in inner_so_far] for path in inner]
        levels.append(
            _Level(
                indices([rows_before.index(path[:-1]) for path in nodes]),
                indices([path[-1] for path in nodes]),
                1 + max(path[-1] for path in nodes),
                indices([nodes.index(path) for path in inner]),
                indices([rows_before.index(path[:-1]) for path in inner]),
                TreeRows(indices([depth - 1] * len(inner)), torch.tensor(sees, dtype=torch.bool, device=device)),
            )
        )
        rows_before = inner
    return levels


@dataclass(frozen=True)
class DynamicTreeBuilder:
    """Keeps the most probable paths. `top_k` nodes of each level go on; `total_tokens` nodes are kept, the root
    included."""

    num_levels: int
    top_k: int
    total_tokens: int

    @property
    def max_nodes(self) -> int:
        return self.total_tokens

    def build_tree(self, proposer: Proposer, root_1: Tensor, max_levels: int) -> DraftTree:
        # A node is kept only if it is among the best of its level, so a beam wider than the tree finds nothing more.
        levels, k = min(self.num_levels, max_levels), min(self.top_k, self.total_tokens - 1)
        device = root_1.device
        first = proposer.first(k)
        scores, ids = [first.scores_SK[0].double()], [first.ids_SK[0]]
        parents = [torch.full((k,), -1, device=device)]
        beam_scores, beam_ids, beam_rows = scores[0], ids[0], torch.zeros_like(ids[0])
        beam_nodes = torch.arange(k, device=device)
        eye = torch.eye(k, dtype=torch.bool, device=device)
        visible = eye
        pool = k
        for level in range(1, levels):
            rows = TreeRows(torch.full((k,), level - 1, device=device), visible)
            found = proposer.next(beam_rows, beam_ids, rows, k)
            # A child scores slightly less than its parent even where it is certain, so no child is kept without it.
            child_scores = (beam_scores[:, None] + found.scores_SK.double() - TIE_BREAK).flatten()
            scores.append(child_scores)
            ids.append(found.ids_SK.flatten())
            parents.append(beam_nodes[:, None].expand(k, k).flatten())
            beam_scores, best = child_scores.topk(k)
            beam_ids, beam_rows, beam_nodes = ids[-1][best], best // k, best + pool
            visible = torch.cat((visible[beam_rows], eye), dim=1)
            pool += k * k
        return self._keep_best(torch.cat(scores), torch.cat(ids), torch.cat(parents), root_1, levels)

    def _keep_best(self, scores: Tensor, ids: Tensor, parents: Tensor, root_1: Tensor, levels: int) -> DraftTree:
        kept = scores.topk(min(self.total_tokens - 1, len(scores))).indices.sort().values
        # Kept nodes stay in the order of the pool, after the root.
        new_parents = torch.searchsorted(kept, parents[kept]) + 1
        new_parents = torch.where(parents[kept] < 0, 0, new_parents)
        tree = Tree(torch.cat((torch.full_like(root_1, -1), new_parents)), levels)
        return DraftTree(tree, torch.cat((root_1, ids[kept])))


TIE_BREAK = 1e-9
