"""Tree builders: the right candidates in the right places, rows that see their own branch, the best nodes kept."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from spdbench.decoding.drafter_choice import DrafterChoice
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.synthetic import SyntheticDrafter, SyntheticDrafts
from spdbench.decoding.tree import DraftTree, Path
from spdbench.decoding.tree_builder import (
    Candidates,
    DynamicTreeBuilder,
    StaticTreeBuilder,
    TreeBuilder,
    chain_builder,
)
from spdbench.models.attention_context import TreeRows
from spdbench.types import Sampling

VOCABULARY = 50
ROOT = torch.tensor([7])
CPU = torch.device("cpu")


@cache
def ranked(branch: tuple[int, ...]) -> list[tuple[float, int]]:
    """Log-probabilities and tokens behind a branch of tokens, best first: an arbitrary but fixed model."""
    draw = random.Random(str(branch))
    weights = [draw.expovariate(1.0) ** 3 for _ in range(VOCABULARY)]
    total = sum(weights)
    return sorted(((math.log(w / total), token) for token, w in enumerate(weights)), reverse=True)


class Table:
    """Candidates from `ranked`. Every row has to see exactly the rows of its own branch."""

    def __init__(self) -> None:
        self.branches: list[tuple[int, ...]] = []  # of all rows asked, in order
        self.last: list[tuple[int, ...]] = [()]

    def first(self, count: int) -> Candidates:
        return self._candidates([()], count)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:
        asked = [(*self.last[p], i) for p, i in zip(parents_S.tolist(), ids_S.tolist(), strict=True)]
        self.branches += asked
        assert rows.visible_SW.shape == (len(asked), len(self.branches))
        for branch, depth, sees in zip(asked, rows.depths_S.tolist(), rows.visible_SW, strict=True):
            assert depth == len(branch) - 1
            seen = [self.branches[slot] for slot in sees.nonzero()[:, 0].tolist()]
            assert sorted(seen) == [branch[:end] for end in range(1, len(branch) + 1)]
        return self._candidates(asked, count)

    def _candidates(self, asked: list[tuple[int, ...]], count: int) -> Candidates:
        self.last = asked
        best = [ranked(branch)[:count] for branch in asked]
        return Candidates(
            torch.tensor([[score for score, _ in row] for row in best]),
            torch.tensor([[token for _, token in row] for row in best]),
        )


def branches(draft: DraftTree) -> list[tuple[int, ...]]:
    """The tokens on the way to every node but the root."""
    parents, ids = draft.tree.parents_N.tolist(), draft.ids_N.tolist()
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(ids)):
        found.append((*found[parents[node]], ids[node]))
    return found[1:]


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_chain_takes_the_best_child_of_the_newest(levels: int) -> None:
    draft = chain_builder(5, CPU).build_tree(Table(), ROOT, levels)
    best: tuple[int, ...] = ()
    for found in branches(draft):
        best = (*best, ranked(best)[0][1])
        assert found == best
    assert len(draft.ids_N) == levels + 1
    assert draft.tree.is_chain


PATHS: tuple[Path, ...] = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 2), (0, 1, 0), (0, 0, 2, 1))


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 9])
def test_a_static_tree_fills_its_shape(levels: int) -> None:
    draft = StaticTreeBuilder(PATHS, CPU).build_tree(Table(), ROOT, levels)
    expected = []
    for path in sorted(PATHS, key=lambda path: (len(path), path)):
        branch: tuple[int, ...] = ()
        for rank in path:
            branch = (*branch, ranked(branch)[rank][1])
        if len(path) <= levels:
            expected.append(branch)
    assert branches(draft) == expected


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("total", [2, 5, 12, 60])
def test_a_dynamic_tree_keeps_the_most_probable_of_what_its_beams_saw(levels: int, top_k: int, total: int) -> None:
    """Against a search written the plain way."""
    draft = DynamicTreeBuilder(4, top_k, total).build_tree(Table(), ROOT, levels)
    pool: dict[tuple[int, ...], float] = {}
    beams: list[tuple[int, ...]] = [()]
    for _ in range(levels):
        children = {}
        for branch in beams:
            for score, token in ranked(branch)[:top_k]:
                children[(*branch, token)] = pool.get(branch, 0.0) + score
        pool |= children
        beams = sorted(children, key=lambda branch: -children[branch])[:top_k]
    best = sorted(pool, key=lambda branch: -pool[branch])[: total - 1]
    assert sorted(branches(draft)) == sorted(best)
    assert len(set(branches(draft))) == len(draft.ids_N) - 1


def test_certain_children_never_come_without_their_parents() -> None:
    class Certain:
        def first(self, count: int) -> Candidates:
            return Candidates(torch.zeros(1, count), torch.arange(count)[None])

        def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:  # noqa: ARG002
            return Candidates(torch.zeros(len(ids_S), count), torch.arange(count).expand(len(ids_S), count))

    for levels, top_k, total in product((2, 4), (2, 3), (3, 5, 9)):
        draft = DynamicTreeBuilder(levels, top_k, total).build_tree(Certain(), ROOT, levels)
        parents = draft.tree.parents_N.tolist()
        assert all(parent < node for node, parent in enumerate(parents))
        assert len(set(branches(draft))) == min(total - 1, top_k + (levels - 1) * top_k**2)


@pytest.mark.parametrize(
    "builder",
    [chain_builder(4, CPU), StaticTreeBuilder(PATHS, CPU), DynamicTreeBuilder(4, 3, 9), DynamicTreeBuilder(4, 9, 3)],
)
def test_bounds_hold(builder: TreeBuilder) -> None:
    for levels in range(1, 6):
        table = Table()
        draft = builder.build_tree(table, ROOT, levels)
        assert len(table.branches) <= builder.num_levels * builder.max_nodes  # what a drafter makes room for
        assert len(draft.ids_N) <= builder.max_nodes
        assert int(draft.tree.rows.depths_S.max()) <= min(levels, builder.num_levels)


@pytest.mark.parametrize(("levels", "top_k", "total"), [(5, 8, 24), (8, 8, 24), (10, 4, 11), (32, 64, 33)])
def test_a_synthetic_spine_is_as_deep_as_the_tree_was_asked_to_be(levels: int, top_k: int, total: int) -> None:
    reference = tuple(range(100, 140))
    drafts = SyntheticDrafts(DrafterChoice("oracle", "oracle:1", (1.0,)), 0, b"", reference, 500, frozenset())
    drafter = SyntheticDrafter(drafts, DynamicTreeBuilder(levels, top_k, total), CPU)
    draft = drafter.propose(levels, Sampler(Sampling(), 0))
    assert reference[1 : levels + 1] in branches(draft)
