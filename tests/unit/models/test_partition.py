"""Stage splits that work, and the messages of those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.errors import InputError
from spdbench.models.partition import split_by_cost, split_by_counts, split_evenly


def test_even_split() -> None:
    assert split_evenly(30, 3) == (range(10), range(10, 20), range(20, 30))


def test_explicit_counts() -> None:
    assert split_by_counts(10, [5, 1, 4]) == (range(5), range(5, 6), range(6, 10))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_stages_cover_every_layer_once_in_order(counts: list[int]) -> None:
    stages = split_by_counts(sum(counts), counts)
    assert [layer for stage in stages for layer in stage] == list(range(sum(counts)))


def test_seven_stages_of_thirty_layers_is_an_error_that_names_what_works() -> None:
    with pytest.raises(
        InputError, match=r"stages=7: 30 layers .* Allowed: 1, 2, 3, 5, 6, 10, 15, 30; or give stage_layers"
    ):
        split_evenly(30, 7)


@pytest.mark.parametrize("stages", [0, 31])
def test_more_stages_than_layers_is_an_error(stages: int) -> None:
    with pytest.raises(InputError, match=f"stages={stages}"):
        split_evenly(30, stages)


@pytest.mark.parametrize(
    ("counts", "why"), [([10, 10], "adds up to 20"), ([30, 0], "at least one"), ([], "at least one")]
)
def test_counts_that_do_not_fit(counts: list[int], why: str) -> None:
    with pytest.raises(InputError, match=why):
        split_by_counts(30, counts)


@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=7),
    st.lists(st.floats(0, 5), min_size=1, max_size=4),
)
def test_no_cut_by_cost_has_a_lighter_heaviest_stage(costs: list[float], extras: list[float]) -> None:
    num_layers = len(costs)
    if num_layers < len(extras):
        with pytest.raises(InputError, match=f"stages={len(extras)}"):
            split_by_cost(costs, extras)
        return

    def heaviest(counts: Sequence[int]) -> float:
        stages = split_by_counts(num_layers, counts)
        return max(sum(costs[layer] for layer in stage) + extra for stage, extra in zip(stages, extras, strict=True))

    every = [counts for counts in product(range(1, num_layers + 1), repeat=len(extras)) if sum(counts) == num_layers]
    found = [len(stage) for stage in split_by_cost(costs, extras)]
    assert heaviest(found) == pytest.approx(min(map(heaviest, every)))


def test_layers_that_cost_the_same_are_split_evenly() -> None:
    assert [len(stage) for stage in split_by_cost([1.0] * 30, [0.0] * 4)] == [8, 8, 7, 7]
    assert [len(stage) for stage in split_by_cost([1.0] * 30, [0.0, 0.0, 8.0])] == [13, 13, 4]


def test_expensive_layers_count_as_such() -> None:
    """Every third layer costs three of the others."""
    assert split_by_cost([1, 1, 3, 1, 1, 3], [0.0, 0.0, 0.0]) == (range(2), range(2, 4), range(4, 6))
