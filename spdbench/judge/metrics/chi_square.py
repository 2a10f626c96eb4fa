"""A chi-square test of counts against exact probabilities, and the deviation that it would have found.

Needs no scipy, which takes longer to load than a comparison. Tails of the distribution come from the recurrence
Q(a + 1, x) = Q(a, x) + x^a e^-x / Gamma(a + 1) of the regularised incomplete gamma function, from Q(1/2, x) =
erfc(sqrt(x)) and Q(1, x) = e^-x (Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 6.5.21).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import erfc, exp, lgamma, log, sqrt
from typing import TypeVar

from spdbench.judge.metrics.stats import bisected

C = TypeVar("C", bound=Hashable)

MIN_EXPECTED = 5.0
"""Cells that expect fewer are pooled (W. Cochran, "Some methods for strengthening the common chi-square tests",
Biometrics 10 (1954))."""
HALVINGS = 100
TERMS_PER_LAMBDA, SPARE_TERMS = 3.0, 60


@dataclass(frozen=True)
class ChiSquare:
    """One test, or the sum of several independent ones on the same draws. `impossible` counts fell where the
    probability is 0."""

    statistic: float
    degrees: int
    draws: int
    impossible: int

    def __add__(self, other: ChiSquare) -> ChiSquare:
        return ChiSquare(
            self.statistic + other.statistic,
            self.degrees + other.degrees,
            max(self.draws, other.draws),
            self.impossible + other.impossible,
        )

    @property
    def p_value(self) -> float:
        """0 where something impossible came out."""
        return 0.0 if self.impossible else upper_tail(self.statistic, self.degrees)

    def detectable(self, significance: float, power: float) -> float:
        """The total variation distance from which on any deviation is found with probability `power`; 1 at most.

        Of a sum it is the deviation that one of the tests has to show. The noncentrality of n draws is n times the
        chi-square distance, which is 4 d^2 at least for a total variation distance d: the worst case moves it from one
        half of the probability to the other.
        """
        if not self.degrees:
            return 1.0
        critical = _solve(lambda x: upper_tail(x, self.degrees) <= significance)
        noncentrality = _solve(lambda x: _noncentral_tail(critical, self.degrees, x) >= power)
        return min(1.0, sqrt(noncentrality / (4.0 * self.draws)))


def chi_square(counts: Mapping[C, int], expected: Mapping[C, float]) -> ChiSquare:
    """The test of `counts` under the probabilities `expected`, which sum to 1 but for rounding."""
    draws, scale = sum(counts.values()), sum(expected.values())
    assert abs(scale - 1.0) < 1e-4
    possible = {cell: p / scale for cell, p in expected.items() if p > 0.0}
    impossible = sum(count for cell, count in counts.items() if cell not in possible)
    cells: list[tuple[float, int]] = []
    pooled_p, pooled_count = 0.0, 0
    for cell, p in sorted(possible.items(), key=lambda item: item[1]):
        if p * draws >= MIN_EXPECTED:
            cells.append((p, counts.get(cell, 0)))
        else:
            pooled_p, pooled_count = pooled_p + p, pooled_count + counts.get(cell, 0)
    if pooled_p * draws >= MIN_EXPECTED or not cells:
        cells.append((pooled_p, pooled_count))
    else:  # too rare for a cell of their own: they join the rarest one
        cells[0] = (cells[0][0] + pooled_p, cells[0][1] + pooled_count)
    statistic = sum((count - p * draws) ** 2 / (p * draws) for p, count in cells)
    return ChiSquare(statistic, len(cells) - 1, draws, impossible)


def upper_tail(x: float, degrees: int) -> float:
    """The probability that a chi-square variable of so many degrees of freedom exceeds `x`."""
    return _noncentral_tail(x, degrees, 0.0)


def _noncentral_tail(x: float, degrees: int, noncentrality: float) -> float:
    """The same for a noncentral one: a mixture of chi-square variables with 2 j more degrees, j by Poisson's law."""
    if degrees == 0 or x <= 0.0:
        return 1.0
    half, mean = x / 2.0, noncentrality / 2.0
    a = 0.5 if degrees % 2 else 1.0
    tail = erfc(sqrt(half)) if degrees % 2 else exp(-half)
    while a < degrees / 2.0:
        tail, a = tail + _term(a, half), a + 1.0
    if mean == 0.0:
        return min(1.0, tail)
    total = 0.0
    for j in range(int(TERMS_PER_LAMBDA * mean) + SPARE_TERMS):
        total += exp(j * log(mean) - mean - lgamma(j + 1.0)) * tail
        tail, a = tail + _term(a, half), a + 1.0
    return min(1.0, total)


def _term(a: float, x: float) -> float:
    return exp(a * log(x) - x - lgamma(a + 1.0))


def _solve(reached: Callable[[float], bool]) -> float:
    """The smallest number from which on `reached` is true, by halving."""
    high = 1.0
    while not reached(high):
        high *= 2.0
    return bisected(0.0, high, reached, HALVINGS)[1]
