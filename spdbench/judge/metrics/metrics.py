"""From runs to the numbers of METRICS.md, in one pass and with little memory a run.

A `Tally` keeps some 15 numbers of each run and its inter-token times in compact arrays: 10,000 runs of 256 steps take
tens of megabytes. `Metrics` works each metric out when it is asked for, since a table shows few of them and intervals
take time. What each metric is stands in `ratios.py`. Must not know files, tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import methodcaller
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics import stats
from spdbench.judge.metrics.dialects import DIALECTS, acceptance_length, metric_name
from spdbench.judge.metrics.flags import degenerate
from spdbench.judge.metrics.lane_metrics import LANE_COLUMNS, LANE_RATIOS, lane_columns
from spdbench.judge.metrics.ratios import (
    COLUMN,
    COLUMNS,
    ITL_PERCENTS,
    RATIO_NAMES,
    Ratio,
    batch_intervals,
    is_failed,
    percentiles_by_run,
    ratios,
    run_columns,
    verdicts,
    weighted_percentiles,
)
from spdbench.judge.metrics.steadiness import MIN_REQUESTS, MIN_STEPS, Drift, find_drift, find_outliers, log_paces
from spdbench.judge.results.batch import Batch, batches_of
from spdbench.judge.results.schema import BackendRecord, Run, Summary

WITHOUT = "_without_degenerate"
WITHOUT_DEGENERATE = ("acceptance_rate", "acceptance_length", "tokens_per_cycle", "ideal_speedup")
"""Shown a second time without degenerate outputs, when there are any."""

COUNTS = {
    "num_runs": "runs",
    "num_prompt_tokens": "prompt_tokens",
    "num_new_tokens": "new_tokens",
    "num_steps": "steps",
    "num_cycles": "steps",
    "num_judged": "judged",
    "num_accepted": "accepted",
    "num_scored": "scored",
}
"""Metrics that are the sum of a column."""

TOLD = ("num_steps", "num_judged", "num_accepted")
"""Counts that nobody has where a backend's steps are not its engine's."""

SPEED = "decode_tokens_per_s"
PACE_COLUMNS = ("prompt_tokens", "new_tokens", "decode_s", "steps", "forwards")

MAX_CHUNK = np.iinfo(np.uint16).max
"""Ids in one chunk, as far as inter-token percentiles count them."""


def summarise(runs: Iterable[Run], backend: BackendRecord, read_bandwidth: float | None) -> Summary:
    """Every metric that needs no spans, overall and by category; `runs` is consumed once.

    `read_bandwidth` is the machine's measured read bandwidth in bytes/s, for `roofline_share`.
    """
    tally = Tally(backend)
    for batch in batches_of(runs):
        tally.add(batch)
    return tally.summary(read_bandwidth)


class Tally:
    """What one pass over the runs leaves behind; failed runs leave nothing but their number."""

    def __init__(self, backend: BackendRecord) -> None:
        self.backend = backend
        self.categories: dict[str, int] = {}
        self.num_failed: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}
        self.conversations: list[str] = []
        self.repeats = array("q")
        self.category_of_run = array("q")
        self.degenerate = array("b")
        self.truncated = array("b")
        self._columns = array("d")
        self._lanes = array("d")
        self._num_intervals = array("q")
        self._seconds = array("f")
        self._tokens = array("H")
        self.judged = self.accepted = np.zeros((0, 0), dtype=np.int64)

    def add(self, batch: Batch) -> None:
        for run in batch.runs:
            self.categories.setdefault(run.category, len(self.categories))
        good = [not is_failed(run) for run in batch.runs]
        for run, is_good in zip(batch.runs, good, strict=True):
            if not is_good:
                self.num_failed[run.category] = self.num_failed.get(run.category, 0) + 1
        self._add_good(batch.only(good))

    def _add_good(self, batch: Batch) -> None:
        for run in batch.runs:
            self.conversations.append(run.prompt_id)
            self.repeats.append(run.repeat)
            self.truncated.append(run.finish_reason == "length")
            self._lanes.extend(lane_columns(run))
            if run.peak_memory_bytes is not None:
                self.peak_bytes[run.category] = max(self.peak_bytes.get(run.category, 0), run.peak_memory_bytes)
        categories = np.array([self.categories[run.category] for run in batch.runs], dtype=np.int64)
        self.category_of_run.frombytes(categories.tobytes())
        self.degenerate.frombytes(degenerate(batch.outputs).tobytes())
        self._columns.frombytes(run_columns(batch).tobytes())
        seconds, tokens, run_of_interval = batch_intervals(batch)
        self._num_intervals.frombytes(np.bincount(run_of_interval, minlength=len(batch.runs)).tobytes())
        self._seconds.frombytes(seconds.astype(np.float32).tobytes())
        self._tokens.frombytes(np.minimum(tokens, MAX_CHUNK).astype(np.uint16).tobytes())
        judged, accepted = verdicts(batch, self.backend.kind, categories)
        self.judged, self.accepted = _plus(self.judged, judged), _plus(self.accepted, accepted)

    def summary(self, read_bandwidth: float | None) -> Summary:
        """All metrics, overall and by category."""
        overall, by_category = self.metrics(read_bandwidth)
        return Summary(overall=dict(overall), by_category={name: dict(part) for name, part in by_category.items()})

    def metrics(self, read_bandwidth: float | None) -> tuple[Metrics, dict[str, Metrics]]:
        """All metrics, overall and by category, for whoever needs only some of them."""
        defined = ratios(self.backend, read_bandwidth)
        return Metrics(self, defined, self.categories), {
            name: Metrics(self, defined, [name]) for name in sorted(self.categories)
        }

    @property
    def table(self) -> NDArray[np.float64]:
        """Every run's columns: [runs, len(COLUMNS)]."""
        return np.asarray(self._columns).reshape(-1, len(COLUMNS))

    @property
    def lane_table(self) -> NDArray[np.float64]:
        """Every run's lane columns: [runs, len(LANE_COLUMNS)]."""
        return np.asarray(self._lanes).reshape(-1, len(LANE_COLUMNS))

    def intervals(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
        """Times between tokens of the chosen `rows` [runs], and the tokens that each counts for."""
        chosen = np.repeat(rows, np.asarray(self._num_intervals))
        return np.asarray(self._seconds)[chosen], np.asarray(self._tokens)[chosen]

    @cached_property
    def percentiles(self) -> NDArray[np.float64]:
        """Each run's own inter-token percentiles, when all runs are there: [runs, len(ITL_PERCENTS)]."""
        columns = np.asarray(self._seconds), np.asarray(self._tokens), np.asarray(self._num_intervals)
        return percentiles_by_run(*columns, ITL_PERCENTS)


class Metrics(Mapping[str, Any]):
    """All metrics of the runs in `categories`, by METRICS.md's names, each worked out when it is first asked for.

    Acceptance lengths in dialects are given to whoever asks for them by name, and not listed among the others.
    """

    def __init__(self, tally: Tally, defined: Mapping[str, Ratio], categories: Iterable[str]) -> None:
        self._tally = tally
        self._defined = defined
        self._categories = list(categories)
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            if name.endswith(WITHOUT) and not self["num_degenerate"]:
                raise KeyError(name)
            self._found[name] = (MAKERS.get(name) or UNLISTED[name])(self)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in MAKERS if self["num_degenerate"] or not name.endswith(WITHOUT))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def _rows(self) -> NDArray[np.bool_]:
        """Which runs belong to the categories: [runs]."""
        numbers = [self._tally.categories[name] for name in self._categories]
        return np.isin(np.asarray(self._tally.category_of_run), numbers)

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        return self._tally.table[self._rows]

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        totals: NDArray[np.float64] = self._table.sum(axis=0)
        return totals

    @cached_property
    def _degenerate(self) -> NDArray[np.bool_]:
        return np.asarray(self._tally.degenerate, dtype=np.bool_)[self._rows]

    @cached_property
    def _conversations(self) -> list[str]:
        return [name for name, chosen in zip(self._tally.conversations, self._rows, strict=True) if chosen]

    def num_failed(self) -> int:
        return sum(self._tally.num_failed.get(name, 0) for name in self._categories)

    def num_prompts(self) -> int:
        return len(set(self._conversations))

    def num_truncated(self) -> int:
        return int(np.asarray(self._tally.truncated)[self._rows].sum())

    def num_degenerate(self) -> int:
        return int(self._degenerate.sum())

    def count(self, name: str) -> int | None:
        if name == "num_cycles" and self._tally.backend.kind != "pipeline":
            return None
        if name in TOLD and "drafts" in self._tally.backend.unknown:
            return None
        return round(float(self._sums[COLUMN[COUNTS[name]]]))

    def micro(self, name: str) -> float | None:
        """Totals over totals; None where METRICS.md says null."""
        return _ratio_of(self._defined.get(name), self._sums)

    def macro(self, name: str) -> float | None:
        """The mean over runs."""
        if self[name] is None:
            return None
        per_run = self._defined[name].of(self._table)
        finite = per_run[np.isfinite(per_run)]
        return float(finite.mean()) if len(finite) else None

    def interval(self, name: str) -> list[float] | None:
        """The 95 % interval. All comparisons ask for the speed's, so it comes alone; the others come together."""
        if name == SPEED and stats.is_remembered(len(self._conversations)):
            return self._intervals([name])[name]
        found = self._intervals([other for other in RATIO_NAMES if f"{other}_ci" not in self._found])
        self._found |= {f"{other}_ci": interval for other, interval in found.items()}
        return found[name]

    def _intervals(self, names: Sequence[str]) -> dict[str, list[float] | None]:
        """Intervals by name; None with fewer than two conversations, which show no spread."""
        found: dict[str, list[float] | None] = dict.fromkeys(names)
        asked = {name: self._defined[name] for name in names if self[name] is not None}
        if not asked or self["num_prompts"] < 2:
            return found
        columns = sorted({COLUMN[column] for ratio in asked.values() for column in ratio.columns})
        repeats = np.asarray(self._tally.repeats)[self._rows].tolist()
        totals = stats.resample_sums(*stats.sum_cells(self._conversations, repeats, self._table[:, columns]))
        samples = np.zeros((len(COLUMNS), len(totals)))
        samples[columns] = totals.T
        for name, ratio in asked.items():
            interval = stats.percentile_interval(ratio.of(samples.T), self["num_prompts"])
            found[name] = None if interval is None else list(interval)
        return found

    @cached_property
    def _lanes(self) -> NDArray[np.float64]:
        return self._tally.lane_table[self._rows]

    def lane_share(self, name: str) -> float | None:
        """Totals over totals; None without spans."""
        return _ratio_of(LANE_RATIOS[name], self._lanes.sum(axis=0))

    def lane_share_macro(self, name: str) -> float | None:
        per_run = LANE_RATIOS[name].of(self._lanes)
        finite = per_run[np.isfinite(per_run)]
        return float(finite.mean()) if len(finite) else None

    def lane_interval(self, name: str) -> list[float] | None:
        """The 95 % interval; None without spans, or with fewer than two conversations."""
        if self[name] is None or self["num_prompts"] < 2:
            return None
        found = stats.percentile_interval(LANE_RATIOS[name].of(self._lane_samples), self["num_prompts"])
        return None if found is None else list(found)

    @cached_property
    def _lane_samples(self) -> NDArray[np.float64]:
        """Resampled totals of the lane columns: [resamples, len(LANE_COLUMNS)]."""
        repeats = np.asarray(self._tally.repeats)[self._rows].tolist()
        return stats.resample_sums(*stats.sum_cells(self._conversations, repeats, self._lanes))

    def without_degenerate(self, name: str) -> float | None:
        return _ratio_of(self._defined.get(name), self._table[~self._degenerate].sum(axis=0))

    @cached_property
    def _latencies(self) -> tuple[float | None, ...]:
        """Percentiles over all tokens."""
        found = weighted_percentiles(*self._tally.intervals(self._rows), ITL_PERCENTS)
        return found or (None,) * len(ITL_PERCENTS)

    def latency(self, index: int) -> float | None:
        return None if "times" in self._tally.backend.unknown else self._latencies[index]

    def latency_macro(self, index: int) -> float | None:
        """The mean of the runs' own percentiles, of those that have decode tokens."""
        if "times" in self._tally.backend.unknown:
            return None
        found = self._tally.percentiles[self._rows, index]
        finite = found[np.isfinite(found)]
        return float(finite.mean()) if len(finite) else None

    def acceptance_by_position(self) -> list[float] | None:
        """accepted / judged at positions 1, 2, ...; None where nothing was judged, or nobody here knows."""
        if "drafts" in self._tally.backend.unknown:
            return None
        groups = [self._tally.categories[name] for name in self._categories]
        rows = [group for group in groups if group < len(self._tally.judged)]
        judged, accepted = self._tally.judged[rows].sum(axis=0), self._tally.accepted[rows].sum(axis=0)
        deep = np.flatnonzero(judged)
        return (accepted[deep] / judged[deep]).tolist() if len(deep) else None

    @cached_property
    def _paced(self) -> NDArray[np.bool_]:
        """Which runs have decode steps enough to tell the time of one: [runs of the categories]."""
        table = self._table
        return (table[:, COLUMN["steps"]] >= MIN_STEPS) & (table[:, COLUMN["decode_s"]] > 0)

    @cached_property
    def _paces(self) -> NDArray[np.float64]:
        """The paces of these runs, in the order of measuring."""
        columns = {name: self._table[self._paced, COLUMN[name]] for name in PACE_COLUMNS}
        context = columns["prompt_tokens"] + columns["new_tokens"] / 2
        width = columns["forwards"] / columns["steps"]
        return log_paces(columns["decode_s"], columns["steps"], [context, width])

    @cached_property
    def _askings(self) -> list[tuple[str, float]]:
        """What these runs were asked, equal for repeats: every turn of a conversation is longer than the one before."""
        lengths = self._table[:, COLUMN["prompt_tokens"]].tolist()
        asked = zip(self._conversations, lengths, self._paced, strict=True)
        return [(name, length) for name, length, chosen in asked if chosen]

    @cached_property
    def _trend(self) -> Drift | None:
        return find_drift(self._paces, self._askings)

    def drift(self) -> float | None:
        return self._trend.change if self._trend else None

    def drift_p_value(self) -> float | None:
        return self._trend.p_value if self._trend else None

    def outliers(self) -> list[str] | None:
        """The prompts of requests that took far more or less time a step than the others; one entry a request."""
        if len(self._paces) < MIN_REQUESTS:
            return None
        far = find_outliers(self._paces, self._askings)
        return [name for (name, _), is_far in zip(self._askings, far, strict=True) if is_far]

    def in_dialect(self, dialect: str) -> float | None:
        """The acceptance length as `dialect` prints it."""
        return acceptance_length(dialect, self._table, self._tally.backend)

    def peak_memory_bytes(self) -> int | None:
        return max((self._tally.peak_bytes.get(name, 0) for name in self._categories), default=0) or None


def _makers() -> dict[str, Callable[[Metrics], Any]]:
    """How each metric is worked out, in the order in which they are listed."""
    makers: dict[str, Callable[[Metrics], Any]] = {name: methodcaller("count", name) for name in COUNTS}
    makers |= {name: methodcaller(name) for name in ("num_failed", "num_prompts", "num_truncated", "num_degenerate")}
    for name in RATIO_NAMES:
        makers[name] = methodcaller("micro", name)
        makers[f"{name}_macro"] = methodcaller("macro", name)
        makers[f"{name}_ci"] = methodcaller("interval", name)
    for name in LANE_RATIOS:
        makers[name] = methodcaller("lane_share", name)
        makers[f"{name}_macro"] = methodcaller("lane_share_macro", name)
        makers[f"{name}_ci"] = methodcaller("lane_interval", name)
    makers |= {name + WITHOUT: methodcaller("without_degenerate", name) for name in WITHOUT_DEGENERATE}
    for index, percent in enumerate(ITL_PERCENTS):
        makers[f"itl_p{percent}_s"] = methodcaller("latency", index)
        makers[f"itl_p{percent}_s_macro"] = methodcaller("latency_macro", index)
    last = ("acceptance_by_position", "peak_memory_bytes", "drift", "drift_p_value", "outliers")
    return makers | {name: methodcaller(name) for name in last}


MAKERS = _makers()
UNLISTED = {metric_name(dialect): methodcaller("in_dialect", dialect) for dialect in DIALECTS}


def _ratio_of(ratio: Ratio | None, sums: NDArray[np.float64]) -> float | None:
    if ratio is None:
        return None
    value = ratio.of(sums)
    return float(value) if np.isfinite(value) else None


def _plus(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of two tables, the smaller filled up with zeros."""
    total = np.zeros(np.maximum(left.shape, right.shape), dtype=np.int64)
    total[: left.shape[0], : left.shape[1]] += left
    total[: right.shape[0], : right.shape[1]] += right
    return total
