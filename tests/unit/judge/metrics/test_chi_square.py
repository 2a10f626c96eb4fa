"""The chi-square test: scipy's numbers, a control that must fail, and the power that is stated."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from spdbench.judge.metrics.chi_square import ChiSquare, _noncentral_tail, chi_square, upper_tail

FAIR = dict.fromkeys(range(8), 1 / 8)


def counted(probabilities: dict[int, float], draws: int, seed: int) -> Counter[int]:
    generator = np.random.default_rng(seed)
    return Counter(generator.choice(list(probabilities), size=draws, p=list(probabilities.values())).tolist())


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 57, 200])
@pytest.mark.parametrize("x", [0.1, 1.0, 7.5, 60.0, 300.0])
def test_tails_are_scipys(degrees: int, x: float) -> None:
    assert upper_tail(x, degrees) == pytest.approx(stats.chi2.sf(x, degrees), rel=1e-9, abs=1e-300)
    for noncentrality in (0.5, 12.0, 80.0):
        expected = stats.ncx2.sf(x, degrees, noncentrality)
        assert _noncentral_tail(x, degrees, noncentrality) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_statistic_is_scipys() -> None:
    counts = counted(FAIR, 400, seed=0)
    expected = stats.chisquare([counts[face] for face in FAIR])
    found = chi_square(counts, FAIR)
    assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))


def test_rare_cells_are_pooled_and_none_is_dropped() -> None:
    rare = {"a": 0.9, "b": 0.096, "c": 0.003, "d": 0.001}
    found = chi_square({"a": 90, "b": 6, "c": 4}, rare)
    assert found.degrees == 1  # a, and b with the rest: 10 expected, 10 found
    assert found.statistic == pytest.approx(0.0)
    assert chi_square({"a": 1000, "b": 0, "c": 900, "d": 100}, rare).p_value < 1e-9


def test_what_is_impossible_is_never_right() -> None:
    found = chi_square({"a": 99, "never": 1}, {"a": 1.0, "never": 0.0})
    assert (found.impossible, found.p_value) == (1, 0.0)


def test_a_loaded_die_is_found_and_a_fair_one_is_not() -> None:
    loaded = {**FAIR, 0: 1 / 8 + 0.1, 1: 1 / 8 - 0.1}
    assert chi_square(counted(loaded, 2000, seed=1), FAIR).p_value < 1e-9
    assert chi_square(counted(FAIR, 2000, seed=1), FAIR).p_value > 1e-3


def test_independent_tests_add_up() -> None:
    both = chi_square(counted(FAIR, 300, seed=2), FAIR) + chi_square(counted(FAIR, 300, seed=3), FAIR)
    assert (both.degrees, both.draws) == (14, 300)
    assert both.p_value == pytest.approx(stats.chi2.sf(both.statistic, 14))


def test_the_stated_power_is_the_share_of_deviations_found() -> None:
    """The deviation that is hardest to find: half of the faces lose what the other half gains."""
    significance, draws = 1e-3, 600
    apart = ChiSquare(0.0, 7, draws, 0).detectable(significance, 0.95)
    loaded = {face: 1 / 8 + (apart / 4 if face < 4 else -apart / 4) for face in FAIR}
    found = [chi_square(counted(loaded, draws, seed), FAIR).p_value < significance for seed in range(1000)]
    assert 0.93 <= sum(found) / len(found) <= 0.97
    missed = [chi_square(counted(FAIR, draws, seed), FAIR).p_value < significance for seed in range(1000)]
    assert sum(missed) <= 6


def test_no_cell_no_power() -> None:
    assert ChiSquare(0.0, 0, 3, 0).detectable(1e-3, 0.95) == 1.0
