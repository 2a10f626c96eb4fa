"""Charts of speed: speed-ups with their intervals, by category, and prompt by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.conclusion import outcome_of
from spdbench.judge.comparison.pairing import prompt_speeds
from spdbench.render.columns import harmless
from spdbench.render.report.chart import (
    Chart,
    Panel,
    Record,
    Spec,
    height,
    listing,
    names,
    overall,
    quantity,
    series,
    spec,
)
from spdbench.render.report.style import Palette

OUTCOMES = ("faster", "slower", "no difference shown", "baseline", "no interval")
EMPTY = {"field": "outcome", "oneOf": ["no difference shown", "no interval"]}
"""Which dots are drawn empty."""
MAX_LETTERS = 44


def _outcome(row: Row) -> str:
    found = outcome_of(row)
    return "faster" if found == "pays" else found


def _record(row: Row) -> Record:
    """One label's speed-up, as all charts of speed-ups show it."""
    low, high = row.metrics["speedup_ci"] or (None, None)
    speedup = row.metrics["speedup"]
    return {"label": harmless(row.label), "speedup": speedup, "low": low, "high": high, "outcome": _outcome(row)}


def _words(record: Record) -> str:
    if record["outcome"] == "baseline":
        return "baseline"
    if record["low"] is None:
        return f"{record['speedup']:.2f}x (no interval)"
    interval = f"[{record['low']:.2f}, {record['high']:.2f}]"
    unclear = ", no difference shown" if record["outcome"] == OUTCOMES[2] else ""
    return f"{record['speedup']:.2f}x {interval}{unclear}"


def _cost(row: Row) -> str:
    """`3 stages on 1 device`; empty where the devices are unknown."""
    if row.result.known_devices is None:
        return ""
    backend, num = row.head.backend, row.head.backend.num_devices
    stages = f"{backend.num_stages} stages on " if backend.kind == "pipeline" else ""
    if num == 1:
        return f"{stages}1 device"
    return f"{stages}{num} devices, {row.metrics['speedup_per_device']:.2f}x a device"


def _marks(flags: Sequence[str]) -> str:
    """`flags: drift, noisy and 2 more`, in at most `MAX_LETTERS`: a narrow page has no room for longer lines."""
    shown = list(flags)
    while shown:
        more = f" and {len(flags) - len(shown)} more" if len(shown) < len(flags) else ""
        line = f"flags: {', '.join(shown)}{more}"
        if len(line) <= MAX_LETTERS:
            return line
        shown.pop()
    return f"{len(flags)} flags" if flags else ""


def _domain(records: Sequence[Record]) -> list[float]:
    values = [1.0, *(record[name] for record in records for name in ("speedup", "low", "high") if record[name])]
    room = 0.08 * (max(values) - min(values)) or 0.1
    return [max(0.0, min(values) - room), max(values) + room]


def _speedups(table: Table, palette: Palette) -> list[Panel]:
    rows = [row for row in overall(table) if row.metrics["speedup"] is not None]
    if table.baseline is None or len(rows) < 2:
        return []
    records = [_record(row) for row in rows]
    domain = _domain(records)
    for row, record in zip(rows, records, strict=True):
        flags = list(dict.fromkeys(flag.name for flag in row.flags))
        record["words"], record["cost"] = _words(record), _cost(row)
        record["flags"], record["marks"] = ", ".join(flags), _marks(flags)
        record["devices"] = row.head.backend.num_devices
    y = names("label", records, labelFontWeight="bold")
    x = quantity(
        "speedup", f"speed-up over {harmless(table.baseline)}", scale={"domain": domain, "nice": False, "zero": False}
    )
    colours = [palette.good, palette.bad, palette.neutral, palette.baseline, palette.neutral]
    colour = {
        "field": "outcome",
        "type": "nominal",
        "scale": {"domain": list(OUTCOMES), "range": colours},
        "legend": None,
    }
    tip = [{"field": name} for name in ("label", "words", "cost", "flags")]
    return [
        Panel(
            spec(
                records,
                {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"x": {"datum": 1}}},
                {
                    "mark": {"type": "rule", "strokeWidth": 5, "opacity": 0.45},
                    "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y, "color": colour},
                },
                *_points({"x": x, "y": y, "color": colour, "tooltip": tip}, 120),
                _text("words", -0.25 / len(records), y, {"fontWeight": "bold"}),
                _text("cost", 0.22 / len(records), y, {}),
                _text("marks", 0.42 / len(records), y, {"color": palette.flag}),
                height=height(records, "label", 70),
            ),
            records,
        )
    ]


def _points(encoding: Spec, size: int) -> list[Spec]:
    """Points; empty ones where no difference is shown, and where one prompt has no interval."""
    return [
        {
            "transform": [{"filter": {"not": EMPTY} if filled else EMPTY}],
            "mark": {"type": "point", "filled": filled, "size": size, "opacity": 1, "strokeWidth": 2},
            "encoding": encoding,
        }
        for filled in (True, False)
    ]


def _text(field: str, below: float, y: Spec, style: dict[str, Any]) -> Spec:
    """The words of `field` at the left of the picture, by a share of its height `below` the bar that they are about."""
    place = {"dx": 2, "dy": {"expr": f"{below} * height"}, "limit": {"expr": "width"}}
    mark = {"type": "text", "align": "left", **place, **style}
    return {"mark": mark, "encoding": {"x": {"value": 0}, "y": y, "text": {"field": field}}}


def _categories(table: Table, palette: Palette) -> list[Panel]:
    rows = [row for row in table.rows if row.category is not None and not row.is_baseline]
    prompts: Counter[str] = Counter()
    for row in rows:
        name = harmless(row.category or "")
        prompts[name] = max(prompts[name], row.metrics["num_paired_prompts"] or 0)
    records = [{"category": harmless(row.category or ""), **_record(row)} for row in rows]
    records = [record for record in records if record["speedup"] is not None]
    for record in records:
        record["name"] = f"{record['category']} ({prompts[record['category']]})"
    if not records:
        return []
    x = quantity("speedup", "speed-up", scale={"domain": _domain(records), "nice": False, "zero": False})
    look = series(table, palette, records)
    labels = look["color"]["scale"]["domain"]
    place = {"y": names("name", records), "yOffset": {"field": "label", "scale": {"domain": labels}}}
    tip = [{"field": name} for name in ("category", "label", "outcome")]
    tip += [{"field": name, "format": ".3f"} for name in ("speedup", "low", "high")]
    return [
        Panel(
            spec(
                records,
                {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"x": {"datum": 1}}},
                {
                    "mark": {"type": "rule", "strokeWidth": 2.5, "opacity": 0.5},
                    "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}, **place, "color": look["color"]},
                },
                *_points({"x": x, **place, **look, "tooltip": tip}, 60),
                height=height(records, "category", 15 * len(labels) + 12),
            ),
            records,
        )
    ]


def _prompts(table: Table, palette: Palette) -> list[Panel]:
    records: list[Record] = [
        {
            "prompt": harmless(each.prompt_id),
            "category": harmless(each.category),
            "label": harmless(row.label),
            "baseline": each.baseline,
            "tokens_per_s": each.candidate,
            "speedup": each.speedup,
        }
        for row in overall(table)
        if row.pairing is not None
        for each in prompt_speeds(row.pairing)
    ]
    if not records:
        return []
    values = [record[name] for record in records for name in ("baseline", "tokens_per_s")]
    low, high = min(values) * 0.95, max(values) * 1.05
    scale = {"domain": [low, high], "nice": False, "zero": False}
    tip = [{"field": name} for name in ("prompt", "category", "label")]
    tip += [{"field": name, "format": ".2f"} for name in ("baseline", "tokens_per_s", "speedup")]
    look = series(table, palette, records)
    return [
        Panel(
            spec(
                records,
                {
                    "data": {"values": [{"v": low}, {"v": high}]},
                    "mark": {"type": "line", "strokeDash": [4, 3], "strokeWidth": 1, "color": palette.muted},
                    "encoding": {
                        "x": {"field": "v", "type": "quantitative"},
                        "y": {"field": "v", "type": "quantitative"},
                    },
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.75, "cursor": "pointer"},
                    "encoding": {
                        "x": quantity("baseline", f"{harmless(table.baseline or '')}: tokens/s", scale=scale),
                        "y": quantity("tokens_per_s", "tokens/s", scale=scale),
                        **look,
                        "tooltip": tip,
                    },
                },
                height=360,
            ),
            records,
        )
    ]


def _describe_speedups(records: Sequence[Record]) -> str:
    return listing([f"{record['label']}: {_words(record)}" for record in records])


def _describe_categories(records: Sequence[Record]) -> str:
    return listing([f"{record['category']}, {record['label']}: {_words(record)}" for record in records])


def _describe_prompts(records: Sequence[Record]) -> str:
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        own = [record for record in records if record["label"] == label]
        parts.append(f"{label} is faster on {sum(record['speedup'] > 1 for record in own)} of {len(own)} prompts")
    return listing(parts)


NO_BASELINE = "There is no baseline among these results, so there are no speed-ups."
CHARTS = (
    Chart(
        "speedup",
        "Speed-up over the baseline",
        "A dot right of the dashed line is faster than the baseline on the same prompts; the bar is its 95 % interval. "
        "An empty dot shows no difference: its bar crosses the line, or there is none, as of one prompt. Below a bar "
        "stand the devices, and the flags that concern it.",
        NO_BASELINE,
        _speedups,
        _describe_speedups,
    ),
    Chart(
        "categories",
        "Speed-up by category",
        "As above, each category of prompts by itself, with their number. A single prompt has no interval: its dot is "
        "empty and has no bar. Two or three have one that is hardly wider than what they span.",
        NO_BASELINE,
        _categories,
        _describe_categories,
    ),
    Chart(
        "prompts",
        "Each prompt against the baseline",
        "A dot is one prompt: above the dashed line the method was faster than the baseline.",
        NO_BASELINE,
        _prompts,
        _describe_prompts,
    ),
)
