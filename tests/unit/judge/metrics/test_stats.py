"""The bootstrap: what it resamples, that it covers, that it is quick and small."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdbench.judge.metrics import stats


def test_turns_of_one_repeat_are_one_cell() -> None:
    columns = np.array([[1.0], [2.0], [4.0], [8.0]])
    cells, sums = stats.sum_cells(["a", "a", "a", "b"], [0, 0, 1, 0], columns)
    assert cells.tolist() == [0, 0, 1]
    assert sums[:, 0].tolist() == [3.0, 4.0, 8.0]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_a_resample_draws_each_conversation_with_its_own_number_of_repeats(sizes: list[int]) -> None:
    cells = np.repeat(np.arange(len(sizes)), sizes)
    widths = np.asarray(sizes, dtype=np.float64)[cells]
    sums = np.stack([1 / widths, np.ones(len(cells))], axis=1)
    totals = stats.resample_sums(cells, sums, resamples=50)
    assert totals[:, 0] == pytest.approx(np.full(50, len(sizes))), "as many conversations as there are"
    assert totals[:, 1].min() >= min(sizes) * len(sizes)
    assert totals[:, 1].max() <= max(sizes) * len(sizes)


def test_resampled_means_centre_on_the_data_with_the_spread_theory_gives() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(10, 2, 60)
    totals = stats.resample_sums(np.arange(60), np.stack([values, np.ones(60)], axis=1))
    means = totals[:, 0] / totals[:, 1]
    assert means.mean() == pytest.approx(values.mean(), abs=0.02)
    assert means.std() == pytest.approx(values.std() / np.sqrt(60), rel=0.05)


def test_repeats_add_their_own_spread() -> None:
    cells = np.repeat(np.arange(40), 2)
    sums = np.stack([np.tile([0.0, 2.0], 40), np.ones(80)], axis=1)
    totals = stats.resample_sums(cells, sums)
    assert (totals[:, 0] / totals[:, 1]).std() == pytest.approx(1 / np.sqrt(80), rel=0.05), (
        "conversations are all alike"
    )


def test_same_seed_gives_the_same_interval_in_any_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, sums = np.arange(30), np.random.default_rng(0).random((30, 2))
    whole = stats.resample_sums(cells, sums, resamples=200)
    assert np.array_equal(whole, stats.resample_sums(cells, sums, resamples=200))
    monkeypatch.setattr(stats, "MAX_DRAWS_AT_ONCE", 700)
    assert np.allclose(whole, stats.resample_sums(cells, sums, resamples=200))


def test_pairing_takes_out_what_baseline_and_candidate_share() -> None:
    rng = np.random.default_rng(2)
    seconds = rng.lognormal(0, 1, 50)
    baseline = np.stack([np.full(50, 100.0), seconds], axis=1)
    candidate = np.stack([np.full(50, 100.0), seconds / 2], axis=1)
    keys = [(str(index), 0, 0) for index in range(50)]
    assert stats.ratio_interval(keys, baseline, candidate) == pytest.approx((2.0, 2.0))


def test_one_conversation_has_no_interval() -> None:
    ones = np.ones((3, 2))
    assert stats.ratio_interval([("a", 0, repeat) for repeat in range(3)], ones, ones) is None


def test_nothing_but_nan_has_no_interval() -> None:
    assert stats.percentile_interval(np.full(10, np.nan), 8) is None


@pytest.mark.parametrize(("num_conversations", "num_repeats"), [(80, 3), (10_000, 1)])
def test_bootstrap_is_small(num_conversations: int, num_repeats: int) -> None:
    cells = np.repeat(np.arange(num_conversations), num_repeats)
    sums = np.ones((len(cells), 4))
    tracemalloc.start()
    stats.resample_sums(cells, sums)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


# Coverage

TRIALS = {8: 4000, 20: 4000, 80: 1500}
"""By conversations: the share found is right within 0.7 per cent nineteen times in twenty, with 80 within 1.1."""


@dataclass(frozen=True)
class Study:
    """Made-up runs: prompts' speed-ups scatter around 2.0, answers differ in length, repeats in the machine's mood."""

    conversations: int
    repeats: int
    between: float = 0.20
    within: float = 0.04

    def coverage(self) -> float:
        """How often the interval holds the ratio of totals over all prompts that there could be."""
        rng = np.random.default_rng(self.conversations * 10 + self.repeats)
        num = self.conversations * self.repeats
        keys = [(str(index // self.repeats), 0, index % self.repeats) for index in range(num)]
        hits, resamples = 0, 1000 if self.conversations == 80 else 2000
        for _ in range(TRIALS[self.conversations]):
            tokens = np.repeat(rng.lognormal(4.5, 0.5, self.conversations), self.repeats)
            faster = np.repeat(rng.normal(0, self.between, self.conversations), self.repeats)
            base_s = tokens * rng.lognormal(0, self.within, num)
            mine_s = tokens * np.exp(-faster) / 2 * rng.lognormal(0, self.within, num)
            base, mine = (np.stack([tokens, seconds], axis=1) for seconds in (base_s, mine_s))
            low, high = stats.ratio_interval(keys, base, mine, resamples=resamples) or (0, 0)
            hits += low <= 2.0 / math.exp(self.between**2 / 2) <= high
        return hits / TRIALS[self.conversations]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("conversations", TRIALS)
def test_intervals_hold_the_truth_as_often_as_they_say(conversations: int, repeats: int) -> None:
    assert 0.93 <= Study(conversations, repeats).coverage() <= 0.97


def test_double_ratio_takes_out_what_both_runs_and_both_sides_share() -> None:
    rng = np.random.default_rng(4)
    tokens, seconds = np.full(50, 100.0), rng.lognormal(0, 1, 50)
    before = [np.stack([tokens, each], axis=1) for each in (seconds, seconds / 2)]
    now = [np.stack([tokens, each], axis=1) for each in (3 * seconds, 3 * seconds / 1.8)]
    keys = [(str(index), 0, 0) for index in range(50)]
    assert stats.ratio_interval(keys, *before, *now) == pytest.approx((0.9, 0.9))
    assert stats.ratio_interval(keys, *now, *before) == pytest.approx((1 / 0.9, 1 / 0.9))


def test_double_ratio_of_one_conversation_has_no_interval() -> None:
    ones = np.ones((3, 2))
    assert stats.ratio_interval([("a", 0, repeat) for repeat in range(3)], ones, ones, ones, ones) is None


def test_intervals_of_double_ratios_cover_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(6)
    keys = [(str(index // 2), 0, index % 2) for index in range(60)]
    hits, trials = 0, 200
    for trial in range(trials):
        shared = np.repeat(rng.lognormal(0, 0.3, 30), 2)
        times = [shared * factor * rng.lognormal(0, 0.05, 60) for factor in (1.0, 0.5, 1.0, 0.55)]
        tokens = np.full(60, 64.0)
        sides = [np.stack([tokens, each], axis=1) for each in times]
        low, high = stats.ratio_interval(keys, *sides, resamples=500, seed=trial) or (0, 0)
        hits += low <= 0.5 / 0.55 <= high
    assert 0.93 <= hits / trials < 1.0


def test_conversations_that_add_nothing_show_no_spread() -> None:
    """Answers of one token have no decode time."""
    keys = [(f"p{index}", 0, 0) for index in range(13)]
    one, two = np.zeros((13, 2)), np.zeros((13, 2))
    one[0], two[0] = (50, 1.0), (50, 0.4)
    assert stats.ratio_interval(keys, one, two) is None
    one[1], two[1] = (50, 1.0), (50, 0.5)
    found = stats.ratio_interval(keys, one, two)
    assert found == stats.ratio_interval(keys[:2], one[:2], two[:2])
    assert found is not None
    assert found[0] < 2.2 < found[1]
