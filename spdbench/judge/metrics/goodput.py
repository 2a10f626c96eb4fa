"""Goodput: the share of requests that kept the given limits of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from spdbench.errors import InputError, did_you_mean
from spdbench.judge.results.table import COLUMN, RunTable

Seconds = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def _column(name: str) -> Seconds:
    return lambda sums: sums[:, COLUMN[name]]


def _time_per_token(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 for a request of one token, which has no time between tokens."""
    return sums[:, COLUMN["decode_s"]] / np.maximum(sums[:, COLUMN["decode_tokens"]], 1)


TIMES: Mapping[str, Seconds] = {"ttft": _column("ttft_s"), "tpot": _time_per_token, "e2el": _column("total_s")}
"""What may be limited, under the names of `vllm bench serve --goodput`: time to first token, mean time of each further
token, time of the whole request."""


def parse_limits(word: str) -> dict[str, float]:
    """Limits in seconds by name, from `ttft:500,tpot:50`, which are milliseconds.

    Raises:
        InputError: an unknown or repeated name, or no number above 0.
    """
    limits: dict[str, float] = {}
    for part in word.split(","):
        name, _, number = part.strip().partition(":")
        if name not in TIMES:
            raise InputError(f"--goodput {word}: unknown time '{name}'{did_you_mean(name, TIMES)}")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if name in limits or not 0 < limit < math.inf:
            raise InputError(
                f"--goodput {word}: takes each time once, in milliseconds above 0, such as ttft:500,tpot:50"
            )
        limits[name] = limit / 1000
    return limits


def goodput(runs: RunTable, limits: Mapping[str, float]) -> float | None:
    """The share of requests that kept all `limits` (in s); one that failed kept none. None without requests."""
    within = [np.less_equal(TIMES[name](runs.sums), limit) for name, limit in limits.items()]
    kept = np.logical_and.reduce([~runs.failed, *within])
    return float(kept.mean()) if len(kept) else None


def note(limits: Mapping[str, float]) -> str:
    """What the figure means, for below a table."""
    words = ", ".join(f"{name} up to {1000 * limit:g} ms" for name, limit in limits.items())
    return f"goodput: share of all requests with {words}; a failed one counts as not among these."
