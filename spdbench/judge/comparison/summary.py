"""Over several suites: each label's speed-up in every one, and their mean.

The headline is the geometric mean, in which every suite counts alike: speed-ups are ratios, and no other mean gives the
same order whichever label is the baseline (P. Fleming and J. Wallace, "How not to lie with statistics", CACM 29, 1986).
The arithmetic mean is the "average over tasks" of the field's papers. Totals over all suites are neither: the suite
with the most tokens would decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, hypot, log
from statistics import fmean

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.pairing import concurrency, machine
from spdbench.judge.metrics.stats import Interval


@dataclass(frozen=True)
class SuiteSpeedup:
    """A label's speed-up in one suite; None without a pair, the interval also with one conversation."""

    suite: str
    speedup: float | None
    interval: Interval | None


@dataclass(frozen=True)
class LabelSummary:
    """One label over all suites. The means are None unless it has a speed-up in each of them; so are their 95 %
    intervals unless each has one. `disqualified` names the suites in which a flag takes it out of any ranking."""

    label: str
    is_baseline: bool
    suites: tuple[SuiteSpeedup, ...]
    mean: float | None
    interval: Interval | None
    arithmetic_mean: float | None
    arithmetic_interval: Interval | None
    disqualified: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Tables of the same model and machine with another suite each."""

    tables: tuple[Table, ...]
    labels: tuple[LabelSummary, ...]

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(table.head.suite.name for table in self.tables)


def summaries(tables: Sequence[Table]) -> list[Summary]:
    """A summary for each group of two suites or more that share model, dtype, template, sampling, requests at once,
    machine and the baseline's label; none for a group in which a suite occurs twice."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        head, how = table.head, table.head.decoding
        model = head.model
        chosen = (model.sha256, model.dtype, model.chat_template, sorted(model.template_args.items()))
        key = (*chosen, how.temperature, how.top_p, how.top_k, concurrency(head), machine(head), table.baseline)
        groups.setdefault(repr(key), []).append(table)
    found = (tuple(group) for group in groups.values() if group[0].baseline is not None)
    return [
        Summary(group, _summarise(group))
        for group in found
        if len(group) > 1 and len({table.head.suite.name for table in group}) == len(group)
    ]


def _summarise(tables: Sequence[Table]) -> tuple[LabelSummary, ...]:
    by_suite = [(table.head.suite.name, {row.label: row for row in table.rows if not row.category}) for table in tables]
    labels = dict.fromkeys(label for _, rows in by_suite for label in rows)
    return tuple(_label(label, [(suite, rows.get(label)) for suite, rows in by_suite]) for label in labels)


def _label(label: str, rows: Sequence[tuple[str, Row | None]]) -> LabelSummary:
    suites = tuple(_in_suite(suite, row) for suite, row in rows)
    is_baseline = any(row is not None and row.is_baseline for _, row in rows)
    values = [each.speedup for each in suites if each.speedup]
    bounds = [each.interval for each in suites if each.speedup and each.interval and each.interval[0] > 0]
    complete = not is_baseline and len(values) == len(suites)
    intervals = complete and len(bounds) == len(suites)
    logs = [log(value) for value in values]
    of_logs = mean_interval(logs, [(log(low), log(high)) for low, high in bounds]) if intervals else None
    return LabelSummary(
        label=label,
        is_baseline=is_baseline,
        suites=suites,
        mean=exp(fmean(logs)) if complete else None,
        interval=(exp(of_logs[0]), exp(of_logs[1])) if of_logs else None,
        arithmetic_mean=fmean(values) if complete else None,
        arithmetic_interval=mean_interval(values, bounds) if intervals else None,
        disqualified=tuple(suite for suite, row in rows if row is not None and row.disqualified),
    )


def _in_suite(suite: str, row: Row | None) -> SuiteSpeedup:
    if row is None or row.is_baseline:
        return SuiteSpeedup(suite, None, None)
    interval = row.metrics["speedup_ci"]
    return SuiteSpeedup(suite, row.metrics["speedup"], interval and (interval[0], interval[1]))


def mean_interval(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """The 95 % interval of the mean of independent `values`, of which each has one.

    The distances from value to bound add up as standard errors do, each side by itself, so that lopsided intervals stay
    so. Source: G. Zou and A. Donner, "Construction of confidence limits about effect measures: A general approach",
    Statistics in Medicine 27 (2008).
    """
    pairs = list(zip(values, intervals, strict=True))
    mean, num = fmean(values), len(values)
    below = hypot(*(value - low for value, (low, _) in pairs)) / num
    above = hypot(*(high - value for value, (_, high) in pairs)) / num
    return mean - below, mean + above
