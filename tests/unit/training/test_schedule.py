"""Batches, progress and learning rate follow from plain numbers."""

from __future__ import annotations

import pytest

from spdbench.training.loop import expected_length
from spdbench.training.recipe import Counts
from spdbench.training.schedule import LAST_SHARE, Plan, batches_of, epoch_batches, rate_factor, split_held_out

LENGTHS = [5, 90, 40, 7, 33, 61, 8, 12, 100, 3, 45, 28]


def test_every_epoch_has_every_sequence_once_in_another_order() -> None:
    epochs = [epoch_batches(range(12), LENGTHS, 100, seed=3, epoch=epoch) for epoch in (0, 1)]
    assert all(sorted(i for batch in epoch for i in batch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] == epoch_batches(range(12), LENGTHS, 100, seed=3, epoch=0)


def test_no_batch_is_larger_with_its_padding_than_allowed_unless_one_sequence_is() -> None:
    for batch in batches_of(range(12), LENGTHS, 95):
        assert len(batch) * max(LENGTHS[i] for i in batch) <= 95 or len(batch) == 1


def test_held_out_is_a_share_at_least_one_and_not_too_long() -> None:
    learned, held = split_held_out(LENGTHS, 0.25, seed=0, at_most=10**6)
    assert len(held) == 3
    assert sorted(learned + held) == list(range(12))
    assert len(split_held_out(LENGTHS, 0.01, 0, 10**6)[1]) == 1
    assert len(split_held_out(LENGTHS, 0.9, 0, 1)[1]) == 1


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_of_two_or_more_one_is_left_to_learn_from(count: int) -> None:
    learned, held = split_held_out(LENGTHS[:count], 0.9, 0, 10**6)
    assert len(learned) == 1
    assert len(held) == count - 1


def test_progress_is_that_of_whichever_limit_ends_first() -> None:
    def plan(epochs: float | None, budget_s: float | None) -> Plan:
        return Plan(epochs, budget_s, rate=1e-3, seed=0, batch_tokens=512)

    assert plan(2, None).progress(1.0, 1e9, 0) == 0.5
    assert plan(None, 100).progress(50, 45, reserve_s=10) == 0.5
    assert plan(2, 100).progress(1.5, 30, 0) == 0.75
    assert plan(None, 100).progress(0, 1, reserve_s=200) == 1.0


def test_rate_rises_then_falls_to_almost_nothing() -> None:
    assert rate_factor(0, 10, 0.0) == pytest.approx(0.1)
    assert rate_factor(9, 10, 0.0) == 1.0
    assert rate_factor(99, 10, 0.5) == pytest.approx((1 + LAST_SHARE) / 2)
    assert rate_factor(99, 10, 1.0) == rate_factor(99, 10, 1.2) == pytest.approx(LAST_SHARE)


def test_expected_length_of_drafts_by_acceptance_in_a_row() -> None:
    assert expected_length((0.5, 0.5)) == 0.75
    assert Counts((4,), (2,)) + Counts((4, 2), (2, 1)) == Counts((8, 2), (4, 1))
    assert Counts((8, 0), (4, 0)).rates == (0.5, 0.0)
