"""Intervals: an expanded percentile bootstrap over conversations, then repeats, for any ratio of sums.

A **cell** is one repeat of one conversation: the sums over its turns, which therefore stay together. What is compared
is in columns of the same cells, so that baseline and candidate are resampled together (paired).

Sources: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3 (the percentile interval);
A. Davison and D. Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8 (hierarchical data); T.
Hesterberg (2015), for few conversations: see `expanded_tail_percent`. Student's t is computed here, since loading scipy
takes longer than a comparison.

How often a 95 % interval held the truth, in 8,000 simulations each (`test_stats.py` has them):

    conversations x repeats                        8 x 1  8 x 3  20 x 1  20 x 3  80 x 1  80 x 3
    speed-ups differ by prompt (20 %, repeats 4 %)  93.4   94.1    93.7    94.5    94.6    95.1
    the same without the correction for few         86.9   87.6    91.5    92.2    94.1    94.7
    only repeats differ, as in A against A          93.5   99.3    94.3    99.1    94.8    98.8

Drawing with replacement on both levels counts the spread between repeats more than once: where that is most of the
spread, the interval errs to the wide side. Where speed-ups differ by 50 % it errs to the narrow one (91.1 with 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, reduce
from math import ceil, cos, log1p, pi, sin, sqrt, tan
from operator import iadd
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.results.schema import RunKey

RESAMPLES = 10_000
SEED = 20_260_530
TAIL_PERCENT = 2.5
MAX_DRAWS_AT_ONCE = 1_000_000
"""Draws held in memory at a time: about 8 MB an array of them, and a handful of arrays."""
MAX_DRAWS_REMEMBERED = 2_500_000
"""Draws that are kept for the next data of the same shape: 20 MB."""
MAX_DEGREES = 1_000
"""From here on t is the normal distribution to three digits."""
HALVINGS = 60
POWER = 0.8
"""How often as many prompts as `prompts_to_show` says do show the difference."""

Interval = tuple[float, float]


def sum_cells(
    conversations: Sequence[str], repeats: Sequence[int], columns: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Runs added up into cells. `columns` is [runs, K].

    Returns:
        The conversation of each cell as an index [M], ascending, and the cells' sums [M, K].
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(conversations))}
    width = max(repeats, default=0) + 1
    codes = [numbers[name] * width + repeat for name, repeat in zip(conversations, repeats, strict=True)]
    cells, cell_of_run = np.unique(np.array(codes, dtype=np.int64), return_inverse=True)
    sums = np.zeros((len(cells), columns.shape[1]))
    np.add.at(sums, cell_of_run.reshape(-1), columns)
    return cells // width, sums


def resample_sums(
    conversation_of_cell: NDArray[np.int64],
    cell_sums: NDArray[np.float64],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> NDArray[np.float64]:
    """Column totals [resamples, K] of `resamples` redrawn data sets, given cells [M] ascending and their sums [M, K].

    Each data set draws as many conversations as there are, with replacement, and for each one drawn as many of its
    repeats as it has, with replacement. Time grows with resamples x M; memory does not grow with `resamples`.
    """
    sizes = np.unique(conversation_of_cell, return_counts=True)[1].astype(np.int64)
    if is_remembered(len(cell_sums), resamples):
        totals_by_column: NDArray[np.float64] = cell_sums.T @ _remembered_counts(sizes.tobytes(), resamples, seed)
        return totals_by_column.T
    totals = np.empty((resamples, cell_sums.shape[1]))
    start = 0
    for counts in _counts(sizes, resamples, seed):
        totals[start : start + len(counts)] = counts @ cell_sums
        start += len(counts)
    return totals


def is_remembered(num_cells: int, resamples: int = RESAMPLES) -> bool:
    """True if resampling other data of the same shape later on costs little."""
    return resamples * num_cells <= MAX_DRAWS_REMEMBERED


@lru_cache(maxsize=8)
def _remembered_counts(sizes: bytes, resamples: int, seed: int) -> NDArray[np.float64]:
    """`_counts` in one piece, the other way round [M, resamples]: all results of the same prompts are redrawn alike."""
    pieces = _counts(np.frombuffer(sizes, dtype=np.int64), resamples, seed)
    return np.ascontiguousarray(np.concatenate(list(pieces)).T)


def _counts(sizes: NDArray[np.int64], resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each redrawn data set has each cell: [resamples, M] in pieces. `sizes` [C] are conversations' cells."""
    num_cells = int(sizes.sum())
    rng = np.random.default_rng(seed)
    rows_at_once = max(1, MAX_DRAWS_AT_ONCE // max(1, num_cells))
    for start in range(0, resamples, rows_at_once):
        rows = min(rows_at_once, resamples - start)
        places = _draw_cells(rng, rows, np.cumsum(sizes) - sizes, sizes)
        counts = reduce(iadd, (np.bincount(cells, minlength=rows * num_cells) for cells in places))
        yield counts.reshape(rows, num_cells).astype(np.float64)


def _draw_cells(
    rng: np.random.Generator, rows: int, first: NDArray[np.int64], size: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """The cells of `rows` redrawn data sets, one array for each place among a conversation's repeats.

    `first` and `size` [C] say where a conversation's cells begin and how many it has. A cell of data set r is given as
    r x (number of cells) + cell, ready to be counted.
    """
    num_conversations, num_cells = len(size), int(size.sum())
    picked = rng.integers(0, num_conversations, size=(rows, num_conversations))
    data_set = (np.arange(rows) * num_cells)[:, None]
    if num_cells == num_conversations:
        picked += data_set
        yield picked.reshape(-1)
        return
    start, width = first[picked] + data_set, size[picked]
    for place in range(int(size.max())):
        cells = start + (rng.random(picked.shape) * width).astype(np.int64)
        yield cells[place < width]


def percentile_interval(values: NDArray[np.float64], conversations: int) -> Interval | None:
    """The middle 95 % of bootstrap `values` [resamples], and as much more as so few `conversations` make due.

    None when none of them is a number.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    tail = expanded_tail_percent(conversations, TAIL_PERCENT)
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return float(low), float(high)


def divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Element-wise ratio, NaN where the denominator is 0."""
    quotient = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def interval_of(
    keys: Sequence[RunKey],
    columns: NDArray[np.float64],
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval | None:
    """95 % interval of what `value` computes of the sums of `columns` [runs, K] over the runs `keys`: it is given the
    sums of all redrawn data sets as [K, resamples].

    All columns of a cell are redrawn together, so that what a conversation does to all of them cancels. Conversations
    that add to no column count for nothing. None with fewer than two others, for one shows no spread.
    """
    conversations = [prompt for prompt, _, _ in keys]
    cells, sums = sum_cells(conversations, [repeat for _, _, repeat in keys], columns)
    adding = np.isin(cells, cells[sums.any(axis=1)])
    cells, sums = cells[adding], sums[adding]
    num_conversations = len(np.unique(cells))
    if num_conversations < 2:
        return None
    return percentile_interval(value(resample_sums(cells, sums, resamples, seed).T), num_conversations)


def ratio_interval(
    keys: Sequence[RunKey], *sides: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """95 % interval of how `sides` compare: [runs, 2] each, numerator and denominator of each of the runs `keys`.

    Of one side it is that of its ratio of sums. Of two sides it is that of (the second's ratio of sums) / (the
    first's); of four, that of the same ratio of the last two over that of the first two, such as (speed-up now) /
    (speed-up before). It does not include what differs from one start of a run to the next. None with fewer than two
    conversations.

    Source: T. Kalibera and R. Jones, "Quantifying Performance Changes with Effect Size Confidence Intervals" (2012,
    arXiv 2007.10899): the interval of a ratio, by resampling every level at which the experiment was repeated.
    """

    def compared(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        rates = [divide(totals[at], totals[at + 1]) for at in range(0, len(totals), 2)]
        while len(rates) > 1:
            rates = [divide(second, first) for first, second in zip(rates[::2], rates[1::2], strict=True)]
        return rates[0]

    return interval_of(keys, np.hstack(sides), compared, resamples, seed)


def spread_of_log_ratio(
    keys: Sequence[RunKey], first: NDArray[np.float64], second: NDArray[np.float64]
) -> float | None:
    """Standard deviation between conversations of log((second's ratio of sums) / (first's)); sides as above.

    A conversation with the share p of a column's sum moves the log of that sum by p, to first order, so that what C
    conversations add to the log of the ratio are the numbers C (p - p'), with both ratios' columns taken in turn; their
    deviation over sqrt(C) is the standard error. Source: the delta method, W. Cochran, "Sampling Techniques" (1977),
    section 6.3. None with fewer than two conversations that add to a column, or where a column sums to 0.
    """
    _, sums = sum_cells([prompt for prompt, _, _ in keys], [0] * len(keys), np.hstack([first, second]))
    sums = sums[sums.any(axis=1)]
    totals, num = sums.sum(axis=0), len(sums)
    if num < 2 or not totals.all():
        return None
    added = num * (sums / totals) @ np.array([-1.0, 1.0, 1.0, -1.0])
    return float(added.std(ddof=1))


def prompts_to_show(effect: float, spread: float) -> int:
    """About how many conversations show a speed-up of 1 + `effect` by a 95 % interval above 1, four times in five.

    `spread` is the standard deviation between conversations of the log speed-up, over the repeats that they had. With
    z = z(0.975) and delta = log(1 + effect) the number is

        n = ((z + z(POWER)) spread / delta)^2 + z^2 / 2

    where the last term makes up for Student's t. Source: W. Guenther, "Sample Size Formulas for Normal Theory T Tests",
    The American Statistician 35 (1981).
    """
    z, z_power = (NormalDist().inv_cdf(share) for share in (1 - TAIL_PERCENT / 100, POWER))
    return max(2, ceil(((z + z_power) * spread / log1p(effect)) ** 2 + z**2 / 2))


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
    degrees = min(degrees, MAX_DEGREES)
    low, _ = bisected(0.0, pi / 2, lambda angle: _share_within(angle, degrees) >= 2 * share - 1, HALVINGS)
    return tan(low) * sqrt(degrees)


def bisected(low: float, high: float, reached: Callable[[float], bool], halvings: int) -> tuple[float, float]:
    """The numbers between `low` and `high` around the one from which on `reached` is true, after so many halvings."""
    for _ in range(halvings):
        middle = (low + high) / 2.0
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low, high


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
