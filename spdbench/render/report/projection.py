"""The chart of a projection: speed-up by devices, and time against device time under load; and its page."""

from __future__ import annotations

from collections.abc import Sequence

from spdbench.judge.metrics.stats import Interval
from spdbench.judge.projection.opponents import Load, Opponent, frontier
from spdbench.judge.projection.project import Projection
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.render.columns import harmless
from spdbench.render.projection import (
    PIPELINE_COLUMNS,
    SPEED_COLUMNS,
    pipeline_rows,
    sentences,
    speed_rows,
    verdict,
)
from spdbench.render.report.chart import Chart, Panel, Record, listing, quantity, spec
from spdbench.render.report.page import Numbers, figure, fill
from spdbench.render.report.style import Palette

MS = 1e3
TENSOR, ONE = "tensor parallel", "one device"


def to_html(projection: Projection, title: str, sources: Sequence[EmbeddedFile] | None, command: str) -> str:
    """The page of a projection; `command` makes it again."""
    tables = [
        Numbers("One request", SPEED_COLUMNS, speed_rows(projection)),
        Numbers("Pipelines", [each.replace("\n", " ") for each in PIPELINE_COLUMNS], pipeline_rows(projection)),
    ]
    if projection.loads:
        tables.append(Numbers("Several requests at once", LOAD_COLUMNS, _load_rows(projection.loads)))
    return fill(
        "plain.html",
        [figure(CHART, projection, f"{command} --chart {CHART.name}.svg")],
        embed(sources) if sources is not None else "",
        question="Would it pay there?",
        title=title,
        verdicts=[verdict(projection)],
        tables=tables,
        notes=sentences(projection),
        environment=[("a device", projection.device), ("projected from", _files(projection))],
    )


LOAD_COLUMNS = ("", "requests", "devices", "ms a token", "device ms a token", "no better")


def _load_rows(loads: Sequence[Load]) -> list[list[str]]:
    best = frontier(loads)
    return [
        [
            *(each.label, str(each.requests), str(each.devices)),
            *(f"{MS * seconds:.2f}" for seconds in (each.token_s, each.device_s_per_token)),
            "*" if each in best else "",
        ]
        for each in loads
    ]


def _files(projection: Projection) -> str:
    return ", ".join(dict.fromkeys(row.source for row in projection.pipelines))


def _panels(projection: Projection, palette: Palette) -> list[Panel]:
    return [_speedups(projection, palette), *([_frontier(projection, palette)] if projection.loads else [])]


def _speedups(projection: Projection, palette: Palette) -> Panel:
    records = [
        *(
            _bar(row.label, _kind(row.label), row.devices, row.speedup, row.speedup_interval)
            for row in projection.pipelines
        ),
        *(_rivals_bar(projection, rival) for rival in projection.opponents),
    ]
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    look = {"field": "kind", "type": "nominal", "scale": {"domain": kinds, "range": list(palette.series[: len(kinds)])}}
    x = quantity("devices", "devices", scale={"zero": True})
    y = quantity("speedup", "speed-up over plain decoding", scale={"zero": True})
    tip = [{"field": "label"}, {"field": "devices"}, {"field": "speedup", "format": ".2f"}]
    return Panel(
        spec(
            records,
            {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"y": {"datum": 1}}},
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.45},
                "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": look},
            },
            {
                "transform": [{"filter": f"datum.kind !== '{ONE}'"}],
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": y, "color": look},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": look,
                    "shape": look | {"scale": {"domain": kinds}, "legend": None},
                    "tooltip": tip,
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 7, "dy": -7},
                "encoding": {"x": x, "y": y, "text": {"field": "short"}},
            },
            height=320,
        ),
        records,
        "One request" if projection.loads else None,
    )


def _rivals_bar(projection: Projection, rival: Opponent) -> Record:
    kind, interval = TENSOR if rival.method == "tensor_parallel" else ONE, rival.interval
    ends = interval and (projection.speedup(interval[0]), projection.speedup(interval[1]))
    return _bar(rival.label, kind, rival.devices, projection.speedup(rival.tokens_per_s), ends)


def _bar(label: str, kind: str, devices: int, speedup: float, interval: Interval | None) -> Record:
    low, high = interval or (speedup, speedup)
    return {
        "label": harmless(label),
        "kind": harmless(kind),
        "short": harmless(_short(label)),
        "devices": devices,
        "speedup": speedup,
        "low": low,
        "high": high,
    }


def _frontier(projection: Projection, palette: Palette) -> Panel:
    records: list[Record] = [
        {
            "label": harmless(load.label),
            "kind": harmless(_kind(load.label)),
            "short": harmless(_short(load.label)),
            "requests": load.requests,
            "token_ms": MS * load.token_s,
            "device_ms": MS * load.device_s_per_token,
        }
        for load in projection.loads
    ]
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    colours = [palette.series[number % len(palette.series)] for number in range(len(kinds))]
    tip = [{"field": "label"}, {"field": "requests"}]
    tip += [{"field": name, "format": ".2f"} for name in ("token_ms", "device_ms")]
    scale = {"type": "log", "nice": False, "padding": 20}
    place = {
        "x": quantity("token_ms", "ms between two tokens of a request", scale=scale),
        "y": quantity("device_ms", "device ms a token", scale=scale),
    }
    encoding = {
        **place,
        "color": {"field": "kind", "type": "nominal", "scale": {"domain": kinds, "range": colours}},
        "detail": {"field": "label"},
        "order": {"field": "requests"},
        "tooltip": tip,
    }
    return Panel(
        spec(
            records,
            {"mark": {"type": "line", "point": True}, "encoding": encoding},
            {
                "transform": [{"filter": "datum.requests === 1"}],
                "mark": {"type": "text", "align": "left", "dx": 5, "dy": -6},
                "encoding": {**place, "text": {"field": "short"}},
            },
            height=420,
        ),
        records,
        "Several requests at once",
    )


def _kind(label: str) -> str:
    """A way to decode without its number of devices."""
    return label.partition(" x")[0]


def _short(label: str) -> str:
    """What its colour does not say: the number of devices; for one device the label."""
    return f"x{number}" if (number := label.partition(" x")[2]) else label


def _describe(records: Sequence[Record]) -> str:
    return listing(
        [
            f"{each['label']}: {each['speedup']:.2f}x on {each['devices']} devices"
            for each in records
            if "speedup" in each
        ]
    )


CHART: Chart[Projection] = Chart(
    "projection",
    "Projected speed-up by devices",
    "A dot is a way to decode one request; its bar is the 95 % interval over prompts, a line the same way on more "
    "devices. Below, a line is a way to decode "
    "under 1, 2, 4, ... requests at once: further left is faster for each, further down is cheaper.",
    "There is no pipeline to show.",
    _panels,
    _describe,
)
