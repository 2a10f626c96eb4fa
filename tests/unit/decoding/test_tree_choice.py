"""Which paths a tree of a given size should have: closed under parents, and as probable as can be."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.decoding.tree import Path
from spdbench.decoding.tree_choice import ROUNDS, best_paths, choose_tree, measure_row_costs
from spdbench.profiles.profile import RowCosts
from tests import tiny

LEVELS = st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), min_size=1, max_size=4)
COARSE = st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=3), min_size=1, max_size=3)


def probability(accuracies: Sequence[Sequence[float]], path: Path) -> float:
    return prod(accuracies[level][rank] for level, rank in enumerate(path))


def all_paths(accuracies: Sequence[Sequence[float]]) -> list[Path]:
    return [
        path
        for depth in range(1, len(accuracies) + 1)
        for path in product(*(range(len(ranks)) for ranks in accuracies[:depth]))
    ]


@given(LEVELS | COARSE, st.integers(0, 40))
def test_a_tree_is_closed_and_of_the_size_asked_for(accuracies: list[list[float]], num_nodes: int) -> None:
    found = [path for path, _ in best_paths(accuracies, num_nodes)]
    assert len(found) == len(set(found)) == min(num_nodes, len(all_paths(accuracies)))
    for index, path in enumerate(found):
        assert path[:-1] == () or path[:-1] in found[:index]


@given(LEVELS | COARSE, st.integers(1, 40))
def test_no_path_left_out_is_more_probable_than_one_taken(accuracies: list[list[float]], num_nodes: int) -> None:
    found = best_paths(accuracies, num_nodes)
    taken = {path for path, _ in found}
    for path, told in found:
        assert told == pytest.approx(probability(accuracies, path))
    least = min(told for _, told in found)
    out = [probability(accuracies, path) for path in all_paths(accuracies) if path not in taken]
    assert max(out, default=0.0) <= least + 1e-12


@given(COARSE, st.integers(1, 3))
def test_no_other_tree_of_the_size_expects_more_accepted_tokens(accuracies: list[list[float]], num_nodes: int) -> None:
    every = all_paths(accuracies)
    expected = sum(told for _, told in best_paths(accuracies, num_nodes))
    for others in combinations(every, min(num_nodes, len(every))):
        if all(path[:-1] == () or path[:-1] in others for path in others):
            assert sum(probability(accuracies, path) for path in others) <= expected + 1e-12


@given(COARSE, st.integers(1, 12))
def test_ties_go_to_the_shorter_path_and_then_to_the_first(accuracies: list[list[float]], num_nodes: int) -> None:
    """The coarse numbers multiply without rounding."""
    by_rule = sorted(all_paths(accuracies), key=lambda path: (-probability(accuracies, path), len(path), path))
    assert [path for path, _ in best_paths(accuracies, num_nodes)] == by_rule[:num_nodes]


def test_no_levels_no_tree() -> None:
    assert best_paths([], 5) == []


def test_dear_rows_make_a_small_tree_and_free_ones_a_large_one() -> None:
    accuracies = [[0.6, 0.2], [0.5, 0.2]]
    free, dear = RowCosts((1, 8), (1.0, 1.0)), RowCosts((1, 8), (1.0, 8.0))
    assert len(choose_tree(accuracies, free, lambda _: 0.0, 6).paths) == 6
    assert len(choose_tree(accuracies, dear, lambda _: 0.0, 6).paths) == 1
    deep = choose_tree(accuracies, free, lambda levels: 5.0 * levels, 6)
    assert deep.num_levels == 1
    assert choose_tree(accuracies, free, lambda _: 0.0, 6).speedup == pytest.approx(1 + 0.8 + 0.8 * 0.7)


def test_more_rows_are_taken_to_cost_no_less_than_fewer(
    tiny_model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which two rows take half of the time of one."""
    seconds = {1: 4.0, 2: 2.0, 3: 5.0, 4: 1.0}
    rounds = [seconds, *[list(seconds)[::-1], seconds] * ROUNDS.start]  # up and down
    ticks = iter(tick for counts in rounds for rows in counts for tick in (0.0, seconds[rows]))
    monkeypatch.setattr("spdbench.decoding.tree_choice.perf_counter", lambda: next(ticks))
    costs = measure_row_costs(tiny.load(tiny_model).own_decoder, 4)
    assert [costs(rows) for rows in (1, 2, 3, 4)] == [3.0, 3.0, 3.0, 3.0]


def test_short_forwards_are_timed_often_and_a_slow_start_does_not_count(
    tiny_model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which the first seven rounds take twice as long as those after them."""
    num_rounds = 0

    def ticks() -> Iterator[float]:
        nonlocal num_rounds
        while True:
            slow = 2.0 if num_rounds < 8 else 1.0
            for rows in (4, 3, 2, 1) if num_rounds % 2 else (1, 2, 3, 4):
                yield from (0.0, 0.001 * rows * slow)
            num_rounds += 1

    clock = ticks()
    monkeypatch.setattr("spdbench.decoding.tree_choice.perf_counter", lambda: next(clock))
    costs = measure_row_costs(tiny.load(tiny_model).own_decoder, 4)
    assert num_rounds == ROUNDS.stop - 1  # the last round's end was not asked for
    assert [costs(rows) for rows in (1, 2, 3, 4)] == pytest.approx([0.001, 0.002, 0.003, 0.004])
