"""The best point of a sweep by one metric, as a file that sweeps it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from spdbench.cli.sweep.points import Point, SweepFile
from spdbench.cli.sweep.progress import point_results
from spdbench.errors import InputError, did_you_mean
from spdbench.judge.comparison.compare import Row, compare

Found = tuple[float, Row, Point]


def lower_is_better(metric: str) -> bool:
    """True for times, costs and shares of idle time."""
    return (metric.endswith("_s") and not metric.endswith("_per_s")) or "_per_token" in metric or "bubble" in metric


def best_snippet(metric: str, file: SweepFile, points: Sequence[Point], folder: Path) -> str:
    """The label and point with the best value, as YAML. A label that is disqualified, such as one with a synthetic
    drafter, counts only if all are.

    Raises:
        InputError: no such metric, or no point has it.
    """
    rows = [(row, point) for point in points for row in point_rows(point, folder)]
    if rows and metric not in rows[0][0].metrics:
        raise InputError(f"--best {metric}: unknown metric{did_you_mean(metric, rows[0][0].metrics)}")
    found = list(_valued(metric, rows))
    if not found:
        raise InputError(f"--best {metric}: no finished point has this metric")
    fair = [each for each in found if not each[1].disqualified]
    value, row, point = (min if lower_is_better(metric) else max)(fair or found, key=lambda each: each[0])
    note = "" if fair else f"# disqualified, as all are: {', '.join(flag.name for flag in row.flags)}\n"
    alone = {"name": file.name, "fixed": file.fixed, "points": [dict(point.settings)]}
    snippet = yaml.safe_dump(alone, sort_keys=False)
    return f"# best {metric} of {len(points)} points: {value:.4g}, {row.label} of {point.name}\n{note}{snippet}"


def point_rows(point: Point, folder: Path) -> Iterator[Row]:
    """The point's labels next to its own baseline, which counts only for metrics that need no other."""
    if results := point_results(folder, point):
        for table in compare(results, point.labels[0]):
            yield from (row for row in table.rows if not row.is_baseline or len(point.labels) == 1)


def _valued(metric: str, rows: Sequence[tuple[Row, Point]]) -> Iterator[Found]:
    for row, point in rows:
        metrics: Mapping[str, object] = row.metrics
        value = metrics[metric]
        if isinstance(value, int | float):
            yield float(value), row, point
