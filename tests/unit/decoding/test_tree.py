"""Trees: depths, who sees whom, cuts; and the choice of a tree by cost."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdbench.decoding.tree import chain, from_paths, sorted_paths
from spdbench.decoding.tree_choice import assumed_accuracies, best_paths, choose_tree
from spdbench.profiles.profile import RowCosts

PATHS = [(1,), (0, 0, 1), (0,), (0, 0), (1, 2)]

rows = st.lists(st.floats(0.0, 0.95), min_size=1, max_size=4)


def test_nodes_stand_in_the_order_of_depth_and_preference() -> None:
    assert sorted_paths(PATHS) == [(0,), (1,), (0, 0), (1, 2), (0, 0, 1)]


def test_a_tree_knows_who_sees_whom() -> None:
    tree = from_paths(PATHS)
    assert tree.parents_N.tolist() == [-1, 0, 0, 1, 2, 3]
    assert tree.rows.depths_S.tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.rows.visible_SW.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]
    assert not tree.is_chain


def test_chains_are_chains() -> None:
    assert chain(3).rows.visible_SW.equal(torch.ones(4, 4).tril().bool())
    assert chain(3).is_chain
    assert from_paths([(0,), (0, 0)]).is_chain
    assert not from_paths([(0,), (1,)]).is_chain
    root = chain(0)
    assert (len(root), root.num_levels, root.is_chain) == (1, 0, True)


def test_a_cut_tree_ends_at_that_depth() -> None:
    tree = from_paths(PATHS)
    assert tree.cut(2).parents_N.tolist() == [-1, 0, 0, 1, 2]
    assert tree.cut(2).num_levels == 2
    assert tree.cut(0).parents_N.tolist() == [-1]
    assert tree.cut(9) is tree
    assert chain(5).cut(2).is_chain


@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 12))
def test_the_best_paths_are_the_most_probable_of_all(accuracies: list[list[float]], count: int) -> None:
    found = best_paths(accuracies, count)
    everything = [
        path
        for depth in range(1, len(accuracies) + 1)
        for path in product(*(range(len(r)) for r in accuracies[:depth]))
    ]
    likelihood = {
        path: torch.tensor([accuracies[k][r] for k, r in enumerate(path)]).double().prod() for path in everything
    }
    assert len(found) == min(count, len(everything))
    best = sorted(map(float, likelihood.values()), reverse=True)[: len(found)]
    assert [probability for _, probability in found] == pytest.approx(best)
    paths = [path for path, _ in found]
    for index, path in enumerate(paths):
        assert len(path) == 1 or path[:-1] in paths[:index]


def test_row_costs_are_linear_between_and_behind_what_was_measured() -> None:
    costs = RowCosts((1, 2, 4), (10.0, 11.0, 15.0))
    assert [costs(n) for n in (1, 2, 3, 4, 6)] == [10.0, 11.0, 13.0, 15.0, 19.0]


def test_free_rows_and_drafts_make_deep_chains_pay_and_dear_ones_short() -> None:
    accuracies = assumed_accuracies([0.9], 8, 1)
    free = choose_tree(accuracies, RowCosts((1, 16), (10.0, 10.0)), lambda _: 0.0, 31)
    assert free.num_levels == 8
    assert free.speedup == pytest.approx(sum(0.9**k for k in range(9)))
    dear = choose_tree(accuracies, RowCosts((1, 16), (10.0, 85.0)), lambda levels: 5.0 * levels, 31)
    assert dear.num_levels == 1
    assert dear.speedup < 1.0


def test_cheap_rows_buy_breadth() -> None:
    wide = choose_tree(assumed_accuracies([0.4], 4, 4), RowCosts((1, 64), (10.0, 10.1)), lambda levels: levels, 31)
    assert len(wide.paths) > wide.num_levels
