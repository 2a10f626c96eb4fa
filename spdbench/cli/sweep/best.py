"""The best point of a sweep by one metric, as options that `spdbench run` reads from a file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from spdbench.cli.run.settings import run_table
from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import point_results
from spdbench.errors import InputError, did_you_mean
from spdbench.judge.comparison.compare import Row, compare
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.metrics.metrics import DIALECT_METRICS, METRICS
from spdbench.judge.results.table import PARTS

Found = tuple[float, Row, Point]
OF_COMPARISONS = ("speedup", "speedup_per_device", "speedup_spread", "break_even_length")
"""Metrics of a result next to its baseline; all others are a result's own."""
NO_NUMBER = re.compile(r"_ci$|_by_|^disturbed_by$|^outliers$|^is_")
"""Metrics that are intervals, lists or facts, of which none is the best."""

LOSSES = {*PARTS} - {"useful"} | {"break_even_length", "slow_clock", "bubble_ratio"}
LOWER = re.compile(
    r"(?<!_per)(?<!slack)_s$|_s_per_|_per_token$|_bytes$|^busy_|"
    r"^num_(failed|truncated|degenerate|contradicted|disturbed|set_aside)$"
)
"""Metrics that are times, costs, or counts of what went wrong."""


def lower_is_better(metric: str) -> bool:
    """True if less of the metric, or of its mean over prompts, is better."""
    name = metric.removesuffix("_macro")
    return name in LOSSES or LOWER.search(name) is not None


def require_metric(metric: str) -> None:
    """Raises `InputError` for a metric that no point can have."""
    known = [name for name in (*OF_COMPARISONS, *METRICS, *DIALECT_METRICS) if not NO_NUMBER.search(name)]
    if metric not in known:
        raise InputError(f"--best {metric}: unknown metric{did_you_mean(metric, known)}")


def best_snippet(metric: str, points: Sequence[Point], folder: Path) -> str:
    """The options of the point with the best value, as an `spdbench.toml`. A label that is disqualified, such as one
    with a synthetic drafter, counts only if all are. Flags that only warn are named, and do not count.

    Raises:
        InputError: no point has this metric.
    """
    found = list(_valued(metric, points, folder))
    if not found:
        raise InputError(f"--best {metric}: no finished point has this metric")
    fair = [each for each in found if not each[1].disqualified]
    value, row, point = (min if lower_is_better(metric) else max)(fair or found, key=lambda each: each[0])
    note = "" if fair else _comment("disqualified, as all are", row, disqualifying=True)
    note += _comment("warnings", row, disqualifying=False)
    table, words = run_table(point.name, point.all_settings)
    command = shlex.join(["spdbench", "run", *words])
    return (
        f"# best {metric} of {len(points)} points: {value:.4g}, {row.label} of {point.name}\n"
        f"{note}# as spdbench.toml it sets the options of: {command}\n{table}"
    )


def _comment(what: str, row: Row, *, disqualifying: bool) -> str:
    """A line that names the flags of `row` which disqualify it, or the others; nothing where it has none."""
    names = [flag.name for flag in row.flags if (flag.name in DISQUALIFYING) == disqualifying]
    return f"# {what}: {', '.join(names)}\n" if names else ""


def point_rows(point: Point, folder: Path) -> Iterator[Row]:
    """The point's labels next to its own baseline, which counts only for metrics that need no other."""
    if results := point_results(folder, point):
        for table in compare(results, point.labels[0]):
            yield from (row for row in table.rows if not row.is_baseline or len(point.labels) == 1)


def _valued(metric: str, points: Sequence[Point], folder: Path) -> Iterator[Found]:
    for point in points:
        for row in point_rows(point, folder):
            if isinstance(value := row.metrics.get(metric), int | float):
                yield float(value), row, point
