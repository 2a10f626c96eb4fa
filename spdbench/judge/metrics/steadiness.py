"""Whether the machine kept its pace through a run: a trend from the first request to the last, and single ones far off.

Looked at is each request's time a step, in the order of measuring, which repeats share with their prompt: they come one
after the other. What the length of the context and the width of the forwards explain is taken out first, so that a
suite that ends with its longest prompts is no drift.

Sources: H. Theil, "A rank-invariant method of linear and polynomial regression analysis" (1950), and P. Sen, Journal of
the American Statistical Association 63 (1968), for the line through the median of all pairs' slopes; H. Mann,
Econometrica 13 (1945), for the test of a trend by ranks; B. Iglewicz and D. Hoaglin, "How to Detect and Handle
Outliers" (1993), for the score by median and median deviation, and its limit of 3.5. None of them is moved by a few
stray values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import erfc, expm1, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_REQUESTS = 8
MIN_STEPS = 8
"""Decode steps of a request below which its time a step is chance."""
MAX_BLOCKS = 100
"""Where there are more values, medians of neighbours replace them: the number of pairs grows with the square."""
MAX_SCORE = 3.5
MAD_TO_SIGMA = 1.4826
FAR_RATIO = 1.25
"""An outlier is farther off than this factor as well: on a quiet machine the score alone would find harmless ones."""

MAX_LOG = 100.0
"""No machine slows down by more; a damaged file's numbers may say so."""

Numbers = NDArray[np.float64]


class Drift(NamedTuple):
    """By what share the time a step changed from the first request to the last, and how likely chance does as much."""

    change: float
    p_value: float


def log_paces(seconds: Numbers, steps: Numbers, explained_by: Sequence[Numbers]) -> Numbers:
    """The logarithm of each request's time a step, less what each column of `explained_by` explains of it; all [R]."""
    paces: Numbers = np.log(seconds / steps)
    if len(paces) < MIN_REQUESTS:
        return paces
    for column in explained_by:
        if column.min() == column.max():
            continue
        order = np.argsort(column, kind="stable")
        slope = theil_sen(_blocks(column[order]), _blocks(paces[order]))
        paces = paces - slope * (column - np.median(column))
    return paces


def find_drift(paces: Numbers, askings: Sequence[object]) -> Drift | None:
    """The trend of `paces` [R] in order; None with fewer than 8 prompts.

    Those with equal `askings` [R] are repeats of one prompt, and count once, in the first one's place.
    """
    if len(paces) < MIN_REQUESTS:
        return None
    repeats = _repeats(askings)
    if len(repeats) < len(paces):
        paces = np.array([np.median(paces[places]) for places in repeats])
    values = _blocks(paces)
    if len(values) < MIN_REQUESTS:
        return None
    places = np.arange(len(values), dtype=np.float64)
    change = theil_sen(places, values) * (len(values) - 1)
    return Drift(expm1(min(change, MAX_LOG)), _trend_p_value(values))


def find_outliers(paces: Numbers, askings: Sequence[object]) -> NDArray[np.bool_]:
    """Which of `paces` [R] lie far from the rest: [R].

    Not those of a prompt that is far off in each of its repeats: it is that prompt's nature.
    """
    off = np.abs(paces - np.median(paces))
    far = off > max(MAX_SCORE * MAD_TO_SIGMA * float(np.median(off)), log(FAR_RATIO))
    if not far.any():
        return far
    for places in _repeats(askings):
        if len(places) > 1 and far[places].all():
            far[places] = False
    return far


def theil_sen(places: Numbers, values: Numbers) -> float:
    """The median slope over all pairs of different places; 0 where all are one."""
    first, second = _pairs(len(values))
    run, rise = places[second] - places[first], values[second] - values[first]
    slopes = rise[run != 0] / run[run != 0]
    return float(np.median(slopes)) if len(slopes) else 0.0


def _trend_p_value(values: Numbers) -> float:
    """Two-sided, by the number of pairs that rise less those that fall; ties count for neither."""
    num = len(values)
    first, second = _pairs(num)
    rises = float(np.sign(values[second] - values[first]).sum())
    ties = np.unique(values, return_counts=True)[1].astype(np.float64)
    variance = (num * (num - 1) * (2 * num + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    if variance <= 0:
        return 1.0
    return erfc(max(abs(rises) - 1, 0) / sqrt(variance) / sqrt(2))


@lru_cache(maxsize=8)
def _pairs(num: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Every pair of places below `num`, the earlier and the later one."""
    first, second = np.triu_indices(num, 1)
    return first, second


def _repeats(askings: Sequence[object]) -> list[list[int]]:
    """The places of each thing that is asked, in the order in which they are first asked."""
    found: dict[object, list[int]] = {}
    for place, asking in enumerate(askings):
        found.setdefault(asking, []).append(place)
    return list(found.values())


def _blocks(values: Numbers) -> Numbers:
    """Medians of at most 100 stretches of `values`; the values themselves where there are no more."""
    if len(values) <= MAX_BLOCKS:
        return values
    return np.array([np.median(part) for part in np.array_split(values, MAX_BLOCKS)])
