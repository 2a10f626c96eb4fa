"""From runs to the numbers of METRICS.md, in one pass and with little memory a run.

`summarise` reads an iterable of runs once, keeping some 20 numbers of each and its inter-token times in compact arrays:
10,000 runs of 256 steps take tens of megabytes. What each metric is stands in `ratios.py`. Must not know files, tables.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spdbench.judge import stats
from spdbench.judge.flags import is_degenerate
from spdbench.judge.lane_metrics import LANE_COLUMNS, LANE_RATIOS, lane_columns
from spdbench.judge.ratios import (
    COLUMN,
    COLUMNS,
    ITL_PERCENTS,
    RATIO_NAMES,
    Ratio,
    is_failed,
    ratios,
    run_columns,
    token_intervals,
    verdicts,
    weighted_percentiles,
)
from spdbench.judge.result import BackendRecord, Run, Summary

WITHOUT_DEGENERATE = ("acceptance_rate", "acceptance_length", "tokens_per_cycle", "ideal_speedup")
"""Shown a second time without degenerate outputs, when there are any."""

MAX_CHUNK = np.iinfo(np.uint16).max
"""Ids in one chunk, as far as inter-token percentiles count them."""


def summarise(runs: Iterable[Run], backend: BackendRecord, read_bandwidth: float | None) -> Summary:
    """Every metric, overall and by category; `runs` is consumed once.

    `read_bandwidth` is the machine's measured read bandwidth in bytes/s, for `roofline_share`.
    """
    tally = _Tally(backend)
    for run in runs:
        tally.add(run)
    defined = ratios(backend, read_bandwidth)
    return Summary(
        overall=_metrics(tally, defined, tally.categories),
        by_category={name: _metrics(tally, defined, [name]) for name in sorted(tally.categories)},
    )


class _Tally:
    """What one pass over the runs leaves behind, by category where percentiles or positions need it."""

    def __init__(self, backend: BackendRecord) -> None:
        self.backend = backend
        self.categories: dict[str, int] = {}
        self.columns = array("d")
        self.lane_columns = array("d")
        self.conversations: list[str] = []
        self.repeats = array("l")
        self.category_of_run = array("l")
        self.degenerate = array("b")
        self.truncated = array("b")
        self.num_failed: Counter[str] = Counter()
        self.peak_bytes: dict[str, int] = {}
        self.itl_seconds: dict[str, array[float]] = defaultdict(lambda: array("f"))
        self.itl_tokens: dict[str, array[int]] = defaultdict(lambda: array("H"))
        self.judged: dict[str, Counter[int]] = defaultdict(Counter)
        self.accepted: dict[str, Counter[int]] = defaultdict(Counter)

    def add(self, run: Run) -> None:
        category = run.category
        number = self.categories.setdefault(category, len(self.categories))
        if is_failed(run):
            self.num_failed[category] += 1
            return
        seconds, tokens = token_intervals(run.steps)
        self.columns.extend(run_columns(run, seconds, tokens))
        self.lane_columns.extend(lane_columns(run))
        self.conversations.append(run.prompt_id)
        self.repeats.append(run.repeat)
        self.category_of_run.append(number)
        self.degenerate.append(is_degenerate(run.output_ids))
        self.truncated.append(run.finish_reason == "length")
        self.itl_seconds[category].frombytes(seconds.astype(np.float32).tobytes())
        self.itl_tokens[category].frombytes(np.minimum(tokens, MAX_CHUNK).astype(np.uint16).tobytes())
        for position, judged, accepted in verdicts(run.steps, self.backend.kind):
            self.judged[category][position] += judged
            self.accepted[category][position] += accepted
        if run.peak_memory_bytes is not None:
            self.peak_bytes[category] = max(self.peak_bytes.get(category, 0), run.peak_memory_bytes)

    def rows_of(self, categories: Iterable[str]) -> NDArray[np.bool_]:
        """Which runs belong to `categories`: [runs]."""
        return np.isin(np.asarray(self.category_of_run), [self.categories[name] for name in categories])

    def table(self) -> NDArray[np.float64]:
        """Every run's columns: [runs, len(COLUMNS)]."""
        return np.asarray(self.columns).reshape(-1, len(COLUMNS))

    def lane_table(self) -> NDArray[np.float64]:
        """Every run's lane columns: [runs, len(LANE_COLUMNS)]."""
        return np.asarray(self.lane_columns).reshape(-1, len(LANE_COLUMNS))


def _metrics(tally: _Tally, defined: dict[str, Ratio], categories: Iterable[str]) -> dict[str, Any]:
    """All metrics of the runs in `categories`."""
    categories = list(categories)
    rows = tally.rows_of(categories)
    table = tally.table()[rows]
    degenerate = np.asarray(tally.degenerate, dtype=np.bool_)[rows]
    conversations = [name for name, chosen in zip(tally.conversations, rows, strict=True) if chosen]
    sums = table.sum(axis=0)
    found: dict[str, Any] = _counts(sums, tally.backend)
    found["num_failed"] = sum(tally.num_failed[name] for name in categories)
    found["num_prompts"] = len(set(conversations))
    found["num_truncated"] = int(np.asarray(tally.truncated)[rows].sum())
    found["num_degenerate"] = int(degenerate.sum())
    samples = _bootstrap(conversations, np.asarray(tally.repeats)[rows], table)
    for name in RATIO_NAMES:
        found |= _values(name, defined.get(name), table, sums, samples)
    lanes = tally.lane_table()[rows]
    samples = _bootstrap(conversations, np.asarray(tally.repeats)[rows], lanes) if lanes.any() else None
    for name, ratio in LANE_RATIOS.items():
        found |= _values(name, ratio, lanes, lanes.sum(axis=0), samples)
    if degenerate.any():
        rest = table[~degenerate].sum(axis=0)
        found |= {f"{name}_without_degenerate": _micro(defined.get(name), rest) for name in WITHOUT_DEGENERATE}
    found |= _inter_token_latencies(tally, categories, sums)
    found["acceptance_by_position"] = _acceptance_by_position(tally, categories)
    found["peak_memory_bytes"] = max((tally.peak_bytes.get(name, 0) for name in categories), default=0) or None
    return found


def _counts(sums: NDArray[np.float64], backend: BackendRecord) -> dict[str, int | None]:
    def count(column: str) -> int:
        return round(float(sums[COLUMN[column]]))

    return {
        "num_runs": count("runs"),
        "num_prompt_tokens": count("prompt_tokens"),
        "num_new_tokens": count("new_tokens"),
        "num_steps": count("steps"),
        "num_cycles": count("steps") if backend.kind == "pipeline" else None,
        "num_judged": count("judged"),
        "num_accepted": count("accepted"),
    }


def _bootstrap(
    conversations: Sequence[str], repeats: NDArray[np.int64], table: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Resampled column totals [resamples, columns]; None with fewer than two conversations, which show no spread."""
    if len(set(conversations)) < 2:
        return None
    return stats.resample_sums(*stats.sum_cells(conversations, [int(repeat) for repeat in repeats], table))


def _values(
    name: str,
    ratio: Ratio | None,
    table: NDArray[np.float64],
    sums: NDArray[np.float64],
    samples: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """`name` (totals over totals), its mean over runs and its interval; all None where METRICS.md says null."""
    micro = macro = interval = None
    if ratio is not None and (micro := _number(ratio.of(sums))) is not None:
        per_run = ratio.of(table)
        macro = _number(per_run[np.isfinite(per_run)].mean()) if np.isfinite(per_run).any() else None
        interval = None if samples is None else stats.percentile_interval(ratio.of(samples))
    return {name: micro, f"{name}_macro": macro, f"{name}_ci": None if interval is None else list(interval)}


def _micro(ratio: Ratio | None, sums: NDArray[np.float64]) -> float | None:
    return None if ratio is None else _number(ratio.of(sums))


def _number(value: NDArray[np.float64] | np.float64) -> float | None:
    return float(value) if np.isfinite(value) else None


def _inter_token_latencies(
    tally: _Tally, categories: Sequence[str], sums: NDArray[np.float64]
) -> dict[str, float | None]:
    """Percentiles over all tokens, and the mean of the runs' own percentiles."""
    seconds = np.concatenate([np.empty(0, np.float32), *(np.asarray(tally.itl_seconds[name]) for name in categories)])
    tokens = np.concatenate([np.empty(0, np.uint16), *(np.asarray(tally.itl_tokens[name]) for name in categories)])
    overall = weighted_percentiles(seconds, tokens, ITL_PERCENTS) or (None, None, None)
    found: dict[str, float | None] = {}
    for percent, value in zip(ITL_PERCENTS, overall, strict=True):
        name = f"itl_p{percent}_s"
        found[name] = value
        found[f"{name}_macro"] = _number(Ratio(name, "decoded").of(sums))
    return found


def _acceptance_by_position(tally: _Tally, categories: Sequence[str]) -> list[float] | None:
    """accepted / judged at positions 1, 2, ...; None where nothing was judged."""
    judged, accepted = Counter[int](), Counter[int]()
    for name in categories:
        judged.update(tally.judged[name])
        accepted.update(tally.accepted[name])
    return [accepted[position] / judged[position] for position in range(1, len(judged) + 1)] or None
