"""Charts of time: what lanes do, the waterfall from ideal to measured; and the timeline of `timeline.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.waterfall import Waterfall, waterfall
from spdbench.judge.metrics.definitions import shares_devices
from spdbench.judge.results.table import PARTS
from spdbench.render.columns import harmless
from spdbench.render.notes import num_devices
from spdbench.render.report.chart import Chart, Panel, Record, height, listing, names, overall, quantity, spec
from spdbench.render.report.style import Palette
from spdbench.render.report.timeline import TIMELINE

PART_NAMES = {
    "useful": "useful work",
    "wasted": "work thrown away",
    "fill": "no token in the lane",
    "verify": "waits for a verdict",
    "draft": "waits for a draft",
    "imbalance": "waits for other lanes",
    "host": "host",
    "unattributed": "unexplained",
}
STEP_NAMES = {
    "ideal": "ideal",
    "draft": "draft cost",
    "verify": "verify inflation",
    "verdict": "verdicts",
    "flush": "fill and flush",
    "imbalance": "imbalance",
    "host": "host",
    "residual": "residual",
}
MS = 1000.0


def _bubble(table: Table, palette: Palette) -> list[Panel]:
    records = [
        {"label": harmless(row.label), "part": PART_NAMES[part], "order": order, "share": row.metrics[part]}
        for row in overall(table)
        if row.metrics["bubble_ratio"] is not None
        for order, part in enumerate(PARTS)
    ]
    if not records:
        return []
    colour = {
        "field": "part",
        "type": "nominal",
        "scale": {"domain": list(PART_NAMES.values()), "range": list(palette.parts)},
        "legend": {"columns": 2},
    }
    encoding = {
        "y": names("label", records),
        "x": quantity("share", "share of lanes x decode time", axis={"format": "%"}, scale={"domain": [0, 1]}),
        "color": colour,
        "order": {"field": "order"},
        "tooltip": [{"field": "label"}, {"field": "part"}, {"field": "share", "format": ".2%"}],
    }
    return [
        Panel(
            spec(records, {"mark": {"type": "bar"}, "encoding": encoding}, height=height(records, "label", 34)), records
        )
    ]


def _waterfalls(table: Table, palette: Palette) -> list[Panel]:
    falls = [(row, waterfall(row.pairing)) for row in overall(table) if row.pairing is not None]
    found = [(row, fall) for row, fall in falls if fall is not None]
    longest = max(map(_longest_s, (fall for _, fall in found)), default=0.0) * MS
    panels = []
    for row, fall in found:
        records: list[Record] = []
        end = 0.0
        for part in fall.parts:
            start, end = end, end + part.seconds * MS
            kind = "ideal" if part.name == "ideal" else "cost" if part.seconds >= 0 else "gain"
            sign = "" if part.name == "ideal" else "+"
            name = f"{STEP_NAMES[part.name]} {part.seconds * MS:{sign}.2f}"
            records.append({"label": harmless(row.label), "step": name, "start": start, "end": end, "kind": kind})
        measured = {"step": f"measured {fall.measured_s * MS:.2f}", "start": 0.0, "end": fall.measured_s * MS}
        records.append({"label": harmless(row.label), **measured, "kind": "total"})
        vanilla = {"step": f"{harmless(table.baseline or '')} {fall.vanilla_s * MS:.2f}", "start": 0.0}
        records.append({"label": harmless(row.label), **vanilla, "end": fall.vanilla_s * MS, "kind": "baseline"})
        colours = [palette.good, palette.bad, palette.good, palette.series[0], palette.baseline]
        encoding = {
            "y": names("step", records),
            "x": quantity("start", "ms a token", scale={"domain": [0, longest]}),
            "x2": {"field": "end"},
            "color": {
                "field": "kind",
                "type": "nominal",
                "scale": {"domain": ["ideal", "cost", "gain", "total", "baseline"], "range": colours},
                "legend": None,
            },
            "tooltip": [{"field": "step"}, *({"field": name, "format": ".3f"} for name in ("start", "end"))],
        }
        drawn = spec(records, {"mark": {"type": "bar"}, "encoding": encoding}, height=height(records, "step", 22))
        panels.append(Panel(drawn, records, _heading(row, fall)))
    return panels


def _heading(row: Row, fall: Waterfall) -> str:
    """The label, with the cause of a pipeline's slower passes where its stages share a device."""
    backend = row.head.backend
    inflation_s = dict(fall.parts)["verify"]
    if not (shares_devices(backend) and inflation_s > 0):
        return harmless(row.label)
    cause = f"its {backend.num_stages} stages share the cores of {num_devices(backend.num_devices)}"
    return harmless(f"{row.label}: {cause}, so that each pass takes longer (verify inflation)")


def _longest_s(fall: Waterfall) -> float:
    """How far its bars reach: a gain may follow a step beyond what was measured."""
    return max(fall.measured_s, fall.vanilla_s, *accumulate(part.seconds for part in fall.parts))


def _describe_bubble(records: Sequence[Record]) -> str:
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        own = [record for record in records if record["label"] == label and record["share"] >= 0.005]
        parts.append(f"{label}: " + ", ".join(f"{record['part']} {record['share']:.0%}" for record in own))
    return listing(parts)


def _describe_waterfalls(records: Sequence[Record]) -> str:
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        parts.append(f"{label}, ms a token: " + ", ".join(r["step"] for r in records if r["label"] == label))
    return listing(parts)


NO_SPANS = "None of these results has spans: plain decoding, in-process pipelines and servers give none."
CHARTS = (
    Chart(
        "bubble",
        "What the lanes did",
        "A lane is a device slot that holds layers of the target. Useful work counts; all else is work thrown away, or "
        "waiting by its first cause.",
        NO_SPANS,
        _bubble,
        _describe_bubble,
    ),
    Chart(
        "waterfall",
        "From ideal to measured",
        "Ideal is the target's passes at the baseline's time a token, shared by the lanes. Each step adds what it "
        "costs, and together they are the measured time a token; the residual is what spans do not explain. Verify "
        "inflation is by how much passes over several tokens, or on cores that stages share, take longer than the "
        "baseline's.",
        NO_SPANS,
        _waterfalls,
        _describe_waterfalls,
    ),
    TIMELINE,
)
