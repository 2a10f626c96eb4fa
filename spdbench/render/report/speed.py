"""Charts of speed: speed-ups with their intervals, by category, and prompt by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Any

import numpy as np

from spdbench.console import counted
from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.pairing import prompt_speeds
from spdbench.judge.conclusion import outcome_of
from spdbench.render.columns import harmless
from spdbench.render.report.chart import (
    NUM_TICKS,
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
    shortened,
    spec,
)
from spdbench.render.report.style import Palette

OUTCOMES = ("faster", "slower", "no difference shown", "baseline", "no interval")
EMPTY = {"field": "outcome", "oneOf": ["no difference shown", "no interval"]}
"""Which dots are drawn empty."""
MAX_LETTERS = 44
FAR_LOG, FAR_SPREADS = 1.0, 6.0
"""How far from the median of its label a prompt is before it may be outside: a factor of e, and six times the median
distance (in logarithms)."""
FEW = 0.03
"""The share of a label's prompts that may be outside at either end; one may always."""
MAX_EVEN = 5
"""Times the lower end of a logarithmic axis: up to here its ticks may be equally far apart in value."""
DIGITS = 4
"""Behind the point, of numbers of which a page has hundreds."""


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
    y = names("label", records, labelFontWeight="bold", labelExpr=shortened("(width < 340 ? 9 : 20)"))
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
                _no_change(y, len(records), palette),
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


def _no_change(y: Spec, num_rows: int, palette: Palette) -> Spec:
    """A line at 1.0 as high as a row's bar: one through all rows would run through their words on a narrow page."""
    mark = {"type": "tick", "orient": "vertical", "thickness": 1.5, "color": palette.ink}
    size = {"expr": f"{0.24 / num_rows} * height"}
    return {"mark": mark | {"size": size}, "encoding": {"x": {"datum": 1}, "y": y}}


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
            "baseline": round(each.baseline, DIGITS),
            "tokens_per_s": round(each.candidate, DIGITS),
            "speedup": round(each.speedup, DIGITS),
        }
        for row in overall(table)
        if row.pairing is not None
        for each in prompt_speeds(row.pairing)
    ]
    if not records:
        return []
    x, y = _limits(records, "baseline"), _limits(records, "tokens_per_s")
    y = min(x[0], y[0]), max(x[1], y[1])  # so that the dashed line crosses the picture
    num_beyond = sum(_beyond(record, x, y) for record in records)
    beyond = f"{counted(num_beyond, 'dot')} beyond the axes: empty, at the edge" if num_beyond else None
    tip = [{"field": name} for name in ("prompt", "category", "label")]
    tip += [{"field": name, "format": ".2f"} for name in ("baseline", "tokens_per_s", "speedup")]
    look = series(table, palette, records)
    place: Spec = {
        "x": quantity("baseline", f"{harmless(table.baseline or '')}: tokens/s", **_logarithmic(x)),
        "y": quantity("tokens_per_s", "tokens/s", **_logarithmic(y)),
    }
    encoding: Spec = {**place, **look, "tooltip": tip}
    mark: Spec = {"type": "point", "size": 70, "opacity": 0.75, "cursor": "pointer"}
    inside = f"inrange(datum.baseline, {[*x]}) && inrange(datum.tokens_per_s, {[*y]})"
    same = [{"x": limit, "y": limit} for limit in x]
    return [
        Panel(
            spec(
                records,
                {
                    "data": {"values": same},
                    "mark": {"type": "line", "strokeDash": [4, 3], "strokeWidth": 1, "color": palette.muted},
                    "encoding": {name: {"field": name, "type": "quantitative"} for name in ("x", "y")},
                },
                *(
                    {
                        "transform": [{"filter": f"{'' if filled else '!'}({inside})"}],
                        "mark": mark | {"filled": filled},
                        "encoding": encoding,
                    }
                    for filled in (True, False)
                ),
                height=360,
            ),
            records,
            beyond,
        )
    ]


def _limits(records: Sequence[Record], field: str) -> tuple[float, float]:
    """Ends of a logarithmic axis: they hold all but a few values that are far from the others of their label, and would
    squeeze these into a strip."""
    lows, highs = [], []
    for label in {record["label"] for record in records}:
        logs = np.sort(np.log([record[field] for record in records if record["label"] == label]))
        middle, few = np.median(logs), max(1, round(FEW * len(logs)))
        far = max(FAR_LOG, FAR_SPREADS * float(np.median(abs(logs - middle))))
        # What is far is outside only where few are: a second group of prompts stays in the picture.
        inner_low, inner_high = logs[min(few, len(logs) - 1)], logs[max(-1 - few, -len(logs))]
        lows.append(logs[0] if logs[0] > middle - far else min(inner_low, middle - far))
        highs.append(logs[-1] if logs[-1] < middle + far else max(inner_high, middle + far))
    return float(np.exp(min(lows))) * 0.95, float(np.exp(max(highs))) * 1.05


def _logarithmic(limits: tuple[float, float]) -> Spec:
    """Scale and axis. Vega's own ticks are 10, 20, 30 ... of which a short axis holds one or none."""
    low, high = limits
    unit = 10 ** floor(log10((high - low) / NUM_TICKS))
    step = next(size * unit for size in (1, 2, 5, 10) if size * unit >= (high - low) / NUM_TICKS)
    values = [round(count * step, DIGITS) for count in range(ceil(low / step), floor(high / step) + 1)]
    if high > MAX_EVEN * low:
        decades = range(floor(log10(low)), ceil(log10(high)))
        values = [size * 10.0**decade for decade in decades for size in (1, 2, 5)]
    values = [value for value in values if low <= value <= high]
    return {
        "scale": {"type": "log", "domain": limits, "nice": False, "clamp": True},
        "axis": {"values": values, "format": ",~f"},
    }


def _beyond(record: Record, x: tuple[float, float], y: tuple[float, float]) -> bool:
    return not (x[0] <= record["baseline"] <= x[1] and y[0] <= record["tokens_per_s"] <= y[1])


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


NO_BASELINE = "No label has an answer to a prompt that a baseline answered, so there are no speed-ups."
CHARTS = (
    Chart(
        "speedup",
        "Speed-up over the baseline",
        "A dot right of the line at 1.0 is faster than the baseline on the same prompts; the bar is its 95 % interval. "
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
        "A dot is one prompt: above the dashed line the method was faster than the baseline. Both axes are "
        "logarithmic: equal speed-ups are equally far from the line. A click on a dot opens the prompt's answers.",
        NO_BASELINE,
        _prompts,
        _describe_prompts,
    ),
)
