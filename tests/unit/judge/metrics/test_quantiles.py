"""Student's t without scipy, against scipy; and the percentiles that follow from it."""

from __future__ import annotations

import pytest
from scipy.stats import norm, t

from spdbench.judge.metrics.stats import expanded_tail_percent, t_quantile


@pytest.mark.parametrize("degrees", [*range(1, 31), 79, 80, 199, 999])
@pytest.mark.parametrize("share", [0.6, 0.9, 0.975, 0.9995])
def test_t_is_scipys(degrees: int, share: float) -> None:
    assert t_quantile(share, degrees) == pytest.approx(t.ppf(share, degrees), rel=1e-9)


def test_beyond_a_thousand_t_is_as_good_as_normal() -> None:
    assert t_quantile(0.975, 10**6) == pytest.approx(norm.ppf(0.975), rel=0.002)


@pytest.mark.parametrize("num", [2, 3, 8, 20, 80, 500])
def test_tails_are_those_of_the_expanded_percentile_interval(num: int) -> None:
    expected = 100 * norm.cdf(-((num / (num - 1)) ** 0.5) * t.ppf(0.975, num - 1))
    assert expanded_tail_percent(num, 2.5) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_tails_grow_with_the_sample_to_what_was_asked_for() -> None:
    tails = [expanded_tail_percent(num, 2.5) for num in (3, 8, 20, 80, 1000)]
    assert tails == sorted(tails)
    assert 2.45 < tails[-1] < 2.5


def test_one_draw_shows_no_spread() -> None:
    with pytest.raises(ValueError, match="two draws"):
        expanded_tail_percent(1, 2.5)
