"""Charts of drafts: acceptance by position, and how many ids a step commits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.metrics.definitions import steps_of
from spdbench.judge.metrics.steps import step_lengths, step_lengths_by_context, verdicts_by_position
from spdbench.judge.results.table import RunTable
from spdbench.render.columns import harmless
from spdbench.render.report.chart import (
    Chart,
    Panel,
    Record,
    height,
    listing,
    names,
    overall,
    quantity,
    series,
    spec,
)
from spdbench.render.report.style import Palette

ENOUGH_VERDICTS = 20
"""Positions with fewer are omitted from the picture, but for the first: their acceptance is chance."""
MAX_TICKS = 10
MAX_IDS = 7
"""From here on lengths share a colour."""


def _acceptance(table: Table, palette: Palette) -> list[Panel]:
    records: list[Record] = []
    for row in _drafting(table):
        runs = row.result.runs
        judged, accepted = verdicts_by_position(runs, ~runs.failed, steps_of(row.head.backend))
        counts = enumerate(zip(judged.tolist(), accepted.tolist(), strict=True), start=1)
        records += [
            {"label": harmless(row.label), "position": position, "judged": given, "acceptance": right / given}
            for position, (given, right) in counts
            if given
        ]
    if not records:
        return []
    look = series(table, palette, records)
    tip = [{"field": "label"}, {"field": "position"}, {"field": "judged"}, {"field": "acceptance", "format": ".1%"}]
    enough = {"filter": f"datum.judged >= {ENOUGH_VERDICTS} || datum.position === 1"}
    shown = [record["position"] for record in records if record["judged"] >= ENOUGH_VERDICTS]
    deepest = max(shown, default=1)
    whole = [*range(1, deepest + 1, ceil(deepest / MAX_TICKS))]  # a scale of few positions would have ticks at halves
    depth = quantity("position", "position of the draft", axis={"values": whole, "format": "d"})
    encoding = {"x": depth, "y": quantity("acceptance", "accepted", axis={"format": "%"}, scale={"domain": [0, 1]})}
    return [
        Panel(
            spec(
                records,
                {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**encoding, "color": look["color"]}},
                {
                    "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1},
                    "encoding": {**encoding, **look, "tooltip": tip},
                },
                transform=[enough],
                height=260,
            ),
            records,
        )
    ]


def _drafting(table: Table) -> list[Row]:
    """The rows of backends that draft."""
    kinds = ("draft_verify", "reported", "pipeline")
    return [row for row in overall(table) if steps_of(row.head.backend) in kinds and row.result.runs.num_steps.any()]


def _lengths_of(row: Row, runs: RunTable) -> NDArray[np.int64]:
    return step_lengths(runs, ~runs.failed, steps_of(row.head.backend))


def _counted(counts: NDArray[np.int64], most: int | None = None) -> Iterator[Record]:
    """A record a length, those above `most` together."""
    if most is not None and len(counts) > most:
        counts = np.append(counts[:most], counts[most:].sum())
    for length, count in enumerate(counts.tolist()):
        if count:
            ids = f"{length} or more" if length == most else str(length)
            yield {"ids": ids, "steps": count, "share": count / int(counts.sum())}


def _lengths(table: Table, palette: Palette) -> list[Panel]:
    records: list[Record] = []
    for row in _drafting(table):
        runs = row.result.runs
        records += [{"label": harmless(row.label), **each} for each in _counted(_lengths_of(row, runs))]
    if not records:
        return []
    look = series(table, palette, records)
    longest = sorted({record["ids"] for record in records}, key=int)
    tip = [{"field": "label"}, {"field": "ids"}, {"field": "steps"}, {"field": "share", "format": ".1%"}]
    return [
        Panel(
            spec(
                records,
                {
                    "mark": {"type": "bar"},
                    "encoding": {
                        "x": {
                            "field": "ids",
                            "type": "ordinal",
                            "sort": longest,
                            "title": "ids that a step commits",
                            "axis": {"labelAngle": 0, "ticks": False},
                        },
                        "xOffset": {"field": "label", "scale": {"domain": look["color"]["scale"]["domain"]}},
                        "y": quantity("share", "share of steps", axis={"format": "%"}),
                        "color": look["color"],
                        "tooltip": tip,
                    },
                },
                height=240,
            ),
            records,
        )
    ]


def _stacked(row: Row, groups: Mapping[str, NDArray[np.int64]], field: str, palette: Palette) -> Panel:
    """For one label a bar a group, of the shares of its steps' lengths."""
    records: list[Record] = []
    for name, counts in groups.items():
        mean = float(np.arange(len(counts)) @ counts / counts.sum())
        place = {
            "label": harmless(row.label),
            field: harmless(name),
            "mean": mean,
            "name": f"{harmless(name)}: {mean:.2f}",
        }
        records += [{**place, **each} for each in _counted(counts, MAX_IDS)]
    every = [*map(str, range(MAX_IDS)), f"{MAX_IDS} or more"]
    lengths = [ids for ids in every if any(record["ids"] == ids for record in records)]
    colours = [palette.lengths[every.index(ids)] for ids in lengths]
    colour = {
        "field": "ids",
        "type": "ordinal",
        "scale": {"domain": lengths, "range": colours},
        "legend": {"title": "ids a step", "titleOrient": "left"},
    }
    tip = [{"field": field}, {"field": "ids"}, {"field": "steps"}, {"field": "share", "format": ".1%"}]
    encoding = {
        "y": names("name", records),
        "x": quantity("share", "share of steps", axis={"format": "%"}, scale={"domain": [0, 1]}),
        "color": colour,
        "order": {"field": "ids", "type": "ordinal"},
        "tooltip": tip,
    }
    drawn = spec(records, {"mark": {"type": "bar"}, "encoding": encoding}, height=height(records, "name", 26))
    return Panel(drawn, records, harmless(row.label))


def _lengths_by_category(table: Table, palette: Palette) -> list[Panel]:
    panels = []
    for row in _drafting(table):
        parts = {name: part.runs for name, part in row.result.by_category.items()}
        groups = {name: _lengths_of(row, runs) for name, runs in parts.items()}
        panels.append(
            _stacked(row, {name: counts for name, counts in groups.items() if counts.any()}, "category", palette)
        )
    return [panel for panel in panels if panel.rows]


def _lengths_by_context(table: Table, palette: Palette) -> list[Panel]:
    panels = []
    for row in _drafting(table):
        if steps_of(row.head.backend) == "reported":  # no engine says with how much context a step began
            continue
        runs = row.result.runs
        by_size = step_lengths_by_context(runs, ~runs.failed)
        groups = {f"{size // 2 + 1} to {size}" if size > 1 else "1": counts for size, counts in by_size.items()}
        panels.append(_stacked(row, groups, "context", palette))
    return [panel for panel in panels if panel.rows]


def _describe_acceptance(records: Sequence[Record]) -> str:
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        shares = [f"{record['acceptance']:.0%}" for record in records if record["label"] == label]
        parts.append(f"{label}, from the first position on: {listing(shares, 6)}")
    return listing(parts)


def _describe_lengths(records: Sequence[Record]) -> str:
    return listing([f"{record['label']} {record['ids']}: {record['share']:.0%}" for record in records])


def _describe_means(records: Sequence[Record]) -> str:
    words = dict.fromkeys(f"{record['label']}, {record['name']} ids a step" for record in records)
    return listing(list(words))


NO_DRAFTS = "None of these results drafts, or their engines do not report it step by step."
STACKED = "Each bar is the share of steps by the number of ids that they commit; the number after the name is the mean."
CHARTS = (
    Chart(
        "acceptance",
        "Acceptance by position",
        "The share of drafts that the target accepts, by their depth in the draft; in a pipeline by the number of "
        f"verdicts since the last flush. Positions with fewer than {ENOUGH_VERDICTS} verdicts are in the CSV only.",
        NO_DRAFTS,
        _acceptance,
        _describe_acceptance,
    ),
    Chart(
        "step-lengths",
        "Step lengths",
        "How many ids a verify step, or a pipeline's cycle, commits. Cycles that fill the pipe commit none.",
        NO_DRAFTS,
        _lengths,
        _describe_lengths,
    ),
    Chart(
        "step-lengths-by-category",
        "Step lengths by category",
        STACKED,
        NO_DRAFTS,
        _lengths_by_category,
        _describe_means,
    ),
    Chart(
        "step-lengths-by-context",
        "Step lengths by context",
        f"Context is the tokens before a step, the prompt's included. {STACKED}",
        NO_DRAFTS,
        _lengths_by_context,
        _describe_means,
    ),
)
