"""Student's t and how far into a bootstrap's tails an interval from few conversations has to reach. Pure numbers.

Apart from scipy, since loading that takes longer than a comparison. Must not know what is resampled.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, sin, sqrt, tan
from statistics import NormalDist

MANY = 1_000
"""From here on t is the normal distribution to three digits."""
HALVINGS = 60


@lru_cache(maxsize=256)
def expanded_tail_percent(num: int, tail_percent: float) -> float:
    """The per cent to cut off at each end of a bootstrap distribution made of `num` draws, instead of `tail_percent`.

    A percentile interval is too narrow for a small sample: its spread is that of a variance divided by n where n - 1 is
    due, and it reaches as far as the normal distribution where t would reach farther. Taking percentiles
    Phi(-sqrt(n / (n - 1)) t) makes up for both: T. Hesterberg, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69 (2015), the expanded percentile interval.
    """
    if num < 2:
        raise ValueError("a spread takes two draws")
    reach = sqrt(num / (num - 1)) * t_quantile(1 - tail_percent / 100, num - 1)
    return 100 * NormalDist().cdf(-reach)


def t_quantile(share: float, degrees: int) -> float:
    """The value below which `share` (at least one half) of Student's t lies, by halving an angle until it is found."""
    degrees = min(degrees, MANY)
    low, high = 0.0, pi / 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < 2 * share - 1 else (low, middle)
    return tan(low) * sqrt(degrees)


def _share_within(angle: float, degrees: int) -> float:
    """The share of t between -x and x, where `angle` is atan(x / sqrt(degrees)).

    M. Abramowitz and I. Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3 and 26.7.4.
    """
    odd = degrees % 2
    term = cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for below in range(2 + odd, degrees - 1, 2):
        term *= cos(angle) ** 2 * (below - 1) / below
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
