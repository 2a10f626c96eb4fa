"""From a table of runs to the numbers of docs/metrics.md: `METRICS` lists all of them.

A table shows few metrics, and intervals take time, so each metric is computed when it is first asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics import stats
from spdbench.judge.metrics.definitions import COUNTS, RATIO_NAMES, Count, Ratio, ratios_for, steps_of
from spdbench.judge.metrics.dialects import DIALECTS, acceptance_length, metric_name
from spdbench.judge.metrics.steadiness import MIN_REQUESTS, MIN_STEPS, Drift, find_drift, find_outliers, log_paces
from spdbench.judge.metrics.steps import PERCENTS, percentiles, token_intervals, verdicts_by_position
from spdbench.judge.results.machine_load import PARTS as LOAD_PARTS
from spdbench.judge.results.machine_load import SLOW_CLOCK, is_busy
from spdbench.judge.results.schema import BackendRecord
from spdbench.judge.results.table import COLUMN, COLUMNS, RunTable
from spdbench.types import MeasurementKind

SPEED = "decode_tokens_per_s"
WITHOUT = "_without_degenerate"
WITHOUT_DEGENERATE = ("acceptance_rate", "acceptance_length", "tokens_per_cycle", "ideal_speedup")
"""Shown a second time without degenerate outputs, when there are any."""


class Metrics(Mapping[str, Any]):
    """All metrics of a table's runs that did not fail; by docs/metrics.md's names.

    `read_bandwidth` is the machine's measured read bandwidth in bytes/s, for `roofline_share`. Acceptance lengths in
    dialects can be asked for by name, and are not listed among the others.
    """

    def __init__(self, runs: RunTable, backend: BackendRecord, read_bandwidth: float | None) -> None:
        self.runs = runs
        self.backend = backend
        self._ratios = ratios_for(backend, read_bandwidth)
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            if name.endswith(WITHOUT) and not self["num_degenerate"]:
                raise KeyError(name)
            metric = METRICS.get(name) or DIALECT_METRICS[name]
            self._found[name] = None if metric.needs in self.backend.unknown else metric.value(self)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in METRICS if self["num_degenerate"] or not name.endswith(WITHOUT))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @cached_property
    def _rows(self) -> NDArray[np.bool_]:
        """Which runs did not fail: [R]."""
        return ~self.runs.failed

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        return self.runs.sums[self._rows]

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        totals: NDArray[np.float64] = self._table.sum(axis=0)
        return totals

    @cached_property
    def _conversations(self) -> list[str]:
        return [self.runs.keys[row][0] for row in np.flatnonzero(self._rows)]

    @cached_property
    def _repeats(self) -> list[int]:
        return [self.runs.keys[row][2] for row in np.flatnonzero(self._rows)]

    # Sums and ratios

    def sum_of(self, column: str) -> int:
        return round(float(self._sums[COLUMN[column]]))

    def count(self, count: Count) -> int | None:
        return self.sum_of(count.column) if steps_of(self.backend) in count.steps else None

    def num_failed(self) -> int:
        return int(self.runs.failed.sum())

    def num_prompts(self) -> int:
        return len(set(self._conversations))

    def peak_memory_bytes(self) -> int | None:
        return int(self._table[:, COLUMN["peak_memory_bytes"]].max(initial=0)) or None

    def micro(self, name: str) -> float | None:
        """Totals over totals; None where docs/metrics.md says null."""
        return _ratio_of(self._ratios.get(name), self._sums)

    def macro(self, name: str) -> float | None:
        """The mean over runs."""
        return None if self[name] is None else _finite_mean(self._ratios[name].of(self._table))

    def without_degenerate(self, name: str) -> float | None:
        kept = self._table[self._table[:, COLUMN["degenerate"]] == 0]
        return _ratio_of(self._ratios.get(name), kept.sum(axis=0))

    def interval(self, name: str) -> list[float] | None:
        """The 95 % interval. All comparisons ask for that of the speed, so it comes alone; the others come together."""
        if name == SPEED and stats.is_remembered(len(self._conversations)):
            return self._intervals([name])[name]
        found = self._intervals([other for other in RATIO_NAMES if f"{other}_ci" not in self._found])
        self._found |= {f"{other}_ci": interval for other, interval in found.items()}
        return found[name]

    def _intervals(self, names: Sequence[str]) -> dict[str, list[float] | None]:
        """Intervals by name; None with fewer than two conversations that a ratio is made of, which show no spread."""
        found: dict[str, list[float] | None] = dict.fromkeys(names)
        counts = {name: self._num_conversations(self._ratios[name]) for name in names if self[name] is not None}
        defined = {name: self._ratios[name] for name, count in counts.items() if count > 1}
        if not defined:
            return found
        columns = sorted({COLUMN[column] for ratio in defined.values() for column in ratio.columns})
        totals = stats.resample_sums(*stats.sum_cells(self._conversations, self._repeats, self._table[:, columns]))
        samples = np.zeros((len(COLUMNS), len(totals)))
        samples[columns] = totals.T
        for name, ratio in defined.items():
            interval = stats.percentile_interval(ratio.of(samples.T), counts[name])
            found[name] = None if interval is None else list(interval)
        return found

    def _num_conversations(self, ratio: Ratio) -> int:
        """Those that add to the denominator: of a score, the conversations that were scored."""
        adds = self._table[:, COLUMN[ratio.denominator]] != 0
        return len({name for name, chosen in zip(self._conversations, adds, strict=True) if chosen})

    def in_dialect(self, dialect: str) -> float | None:
        """The acceptance length as `dialect` prints it."""
        return acceptance_length(dialect, self._table, self.backend)

    # Times between tokens, and drafts by position

    @cached_property
    def _latencies(self) -> NDArray[np.float64]:
        """Percentiles over all tokens: [percents]."""
        seconds, tokens, _ = token_intervals(self.runs, self._rows)
        overall: NDArray[np.float64] = percentiles(seconds, tokens, [len(seconds)])[0]
        return overall

    @cached_property
    def _latencies_of_runs(self) -> NDArray[np.float64]:
        """Each run's own percentiles: [R, percents]."""
        return percentiles(*token_intervals(self.runs, self._rows))

    def ttft(self, index: int) -> float | None:
        """A percentile over requests."""
        seconds = self._table[:, COLUMN["ttft_s"]]
        return _finite_or_none(percentiles(seconds, np.ones(len(seconds), dtype=np.int64), [len(seconds)])[0, index])

    def latency(self, index: int) -> float | None:
        return _finite_or_none(self._latencies[index])

    def latency_macro(self, index: int) -> float | None:
        """The mean of the runs' own percentiles, of those that have decode tokens."""
        return _finite_mean(self._latencies_of_runs[:, index])

    def acceptance_by_position(self) -> list[float] | None:
        """accepted / judged at positions 1, 2, ...; None where nothing was judged, or that is unknown."""
        judged, accepted = verdicts_by_position(self.runs, self._rows, steps_of(self.backend))
        deep = np.flatnonzero(judged)
        return (accepted[deep] / judged[deep]).tolist() if len(deep) else None

    def by_fill(self, column: str) -> list[float] | None:
        """A column of `CyclesByFill` summed over the runs that have it; None without any."""
        found = [fill for fill, kept in zip(self.runs.by_fill, self._rows, strict=True) if kept and fill is not None]
        if not found:
            return None
        return [sum(numbers) for numbers in zip_longest(*(getattr(fill, column) for fill in found), fillvalue=0)]

    # Steadiness

    @cached_property
    def _paces(self) -> _Paces:
        columns = {name: self._table[:, COLUMN[name]] for name in COLUMNS[: COLUMN["forwards"] + 1]}
        paced = (columns["steps"] >= MIN_STEPS) & (columns["decode_s"] > 0)
        columns = {name: column[paced] for name, column in columns.items()}
        context = columns["prompt_tokens"] + columns["new_tokens"] / 2
        width = columns["forwards"] / columns["steps"]
        return _Paces(
            log_paces(columns["decode_s"], columns["steps"], [context, width]),
            [self.runs.keys[row][:2] for row in np.flatnonzero(self._rows)[paced]],
        )

    @cached_property
    def _trend(self) -> Drift | None:
        return find_drift(*self._paces)

    def drift(self) -> float | None:
        return self._trend.change if self._trend else None

    def drift_p_value(self) -> float | None:
        return self._trend.p_value if self._trend else None

    def outliers(self) -> list[str] | None:
        """The prompts of requests that took far more or less time a step than the others; one entry a request."""
        paces, requests = self._paces
        if len(paces) < MIN_REQUESTS:
            return None
        return [name for (name, _), is_far in zip(requests, find_outliers(paces, requests), strict=True) if is_far]

    # What else the machine did

    def taken(self, part: str) -> float | None:
        """The share of the machine's time that `part` of `LOAD_PARTS` took; None where nothing was watched."""
        watched = float(self._sums[COLUMN["watched_core_s"]])
        return float(self._sums[COLUMN[f"{part}_core_s"]]) / watched if watched else None

    def slow_clock(self) -> float | None:
        """The share of the watched time in which clocks ran below 80 % of the run's highest; None where unknown."""
        clocks, core_s = self._table[:, COLUMN["clock_mhz"]], self._table[:, COLUMN["watched_core_s"]]
        known = clocks > 0
        slow = core_s[known & (clocks < SLOW_CLOCK * clocks.max(initial=0))]
        return float(slow.sum() / core_s[known].sum()) if core_s[known].sum() else None

    def disturbed_by(self) -> list[str] | None:
        """The processes that took most time from disturbed requests, those of most requests first."""
        counts = Counter(name for row in np.flatnonzero(self._rows) for name in self.runs.disturbed_by[row])
        return [name for name, _ in counts.most_common()] or None

    def busy_share(self) -> float | None:
        """All parts together, over 0."""
        shares = [self.taken(part) for part in LOAD_PARTS]
        return None if None in shares else max(0.0, sum(share or 0.0 for share in shares))

    def is_busy(self) -> bool | None:
        """True if too much of the time in which requests were measured went elsewhere."""
        share = self["busy_share"]
        return None if share is None else is_busy(share, float(self._sums[COLUMN["watched_core_s"]]))


class _Paces(NamedTuple):
    """The paces of runs with enough decode steps, in the order of measuring; and what each was asked, equal for
    repeats: every turn of a conversation is longer than the one before."""

    paces: NDArray[np.float64]
    requests: list[tuple[str, float]]


@dataclass(frozen=True)
class Metric:
    """How a metric is computed; null where the backend does not know `needs`."""

    value: Callable[[Metrics], Any]
    needs: MeasurementKind | None = None


def _list_metrics() -> dict[str, Metric]:
    """Every metric, in the order in which files list them."""
    found = {count.name: Metric(partial(Metrics.count, count=count), count.needs) for count in COUNTS}
    found["num_failed"] = Metric(Metrics.num_failed)
    found["num_prompts"] = Metric(Metrics.num_prompts)
    for column in ("truncated", "degenerate", "contradicted"):
        found[f"num_{column}"] = Metric(partial(Metrics.sum_of, column=column))
    for name in RATIO_NAMES:
        found[name] = Metric(partial(Metrics.micro, name=name))
        found[f"{name}_macro"] = Metric(partial(Metrics.macro, name=name))
        found[f"{name}_ci"] = Metric(partial(Metrics.interval, name=name))
    for name in WITHOUT_DEGENERATE:
        found[name + WITHOUT] = Metric(partial(Metrics.without_degenerate, name=name))
    for index, percent in enumerate(PERCENTS):
        found[f"ttft_p{percent}_s"] = Metric(partial(Metrics.ttft, index=index))
        found[f"itl_p{percent}_s"] = Metric(partial(Metrics.latency, index=index), "times")
        found[f"itl_p{percent}_s_macro"] = Metric(partial(Metrics.latency_macro, index=index), "times")
    found["acceptance_by_position"] = Metric(Metrics.acceptance_by_position)
    for name, column in (("cycles_by_fill", "num"), ("cycle_s_by_fill", "wall_s")):
        found[name] = Metric(partial(Metrics.by_fill, column=column))
    for part in LOAD_PARTS:
        found[f"busy_{part}"] = Metric(partial(Metrics.taken, part=part))
    for column in ("disturbed", "set_aside"):
        found[f"num_{column}"] = Metric(partial(Metrics.sum_of, column=column))
    others: list[Callable[[Metrics], Any]] = [
        *(Metrics.peak_memory_bytes, Metrics.drift, Metrics.drift_p_value, Metrics.outliers),
        *(Metrics.slow_clock, Metrics.disturbed_by, Metrics.busy_share, Metrics.is_busy),
    ]
    return found | {method.__name__: Metric(method) for method in others}


METRICS = _list_metrics()
DIALECT_METRICS = {metric_name(dialect): Metric(partial(Metrics.in_dialect, dialect=dialect)) for dialect in DIALECTS}


def _ratio_of(ratio: Ratio | None, sums: NDArray[np.float64]) -> float | None:
    return None if ratio is None else _finite_or_none(ratio.of(sums))


def _finite_or_none(value: np.floating | NDArray[np.float64]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _finite_mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
