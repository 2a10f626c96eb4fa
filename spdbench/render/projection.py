"""A projection for people, as tables that fit a terminal, and for programs as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from spdbench.console import counted
from spdbench.judge.metrics.bubble import LaneTime
from spdbench.judge.projection.opponents import BreakEven, Load, Opponent, frontier
from spdbench.judge.projection.project import PipelineRow, Projection
from spdbench.render.columns import EMPTY, bullet, capture, harmless, plain_grid

SCHEMA = "spdbench.projection/1"
MS = 1e3
CHART_WIDTH, LONGEST_LABEL = 80, 32
CAUSES = ("fill", "verify", "draft", "imbalance", "host", "unattributed")


def to_terminal(projection: Projection, console: Console) -> str:
    """The verdict, then speeds as a table and as bars, the pipelines' parts, and under load all ways to decode."""
    parts: list[RenderableType] = [
        Text(verdict(projection), style="bold"),
        "",
        Text(f"one request; a device is {harmless(projection.device)}"),
        _speeds(projection),
        "",
        Text("speed-up by devices"),
        _bars(projection, console),
        "",
        Text("pipelines: what a lane does, and what would change the speed-up"),
        _pipelines(projection),
    ]
    if projection.loads:
        parts += ["", Text("several requests at once; * no other way is better in both columns"), _loads(projection)]
    return capture(console, *parts, "", *map(bullet, map(harmless, sentences(projection))))


def sentences(projection: Projection) -> list[str]:
    """Where speculation stops to pay, and what limits the projection."""
    return [*map(_breakeven, projection.breakevens), *projection.notes]


def _breakeven(found: BreakEven) -> str:
    """Always, never, up to a number of requests, or at those that are named."""
    at, others = found.faster_at, [num for num in found.requests if num not in found.faster_at]
    span = f"{found.requests[0]} to {counted(found.requests[-1], 'request')} at once"
    if not at or not others:
        return f"{found.label}: {'always' if at else 'never'} faster than {found.rival} ({span})"
    if at[-1] == found.up_to:
        where = f"up to {counted(at[-1], 'request')} at once (of {span})"
    else:
        where = f"at {_listed(at)} requests at once, not at {_listed(others)}"
    return f"{found.label}: faster than {found.rival} {where}"


def _listed(numbers: Sequence[int]) -> str:
    """`1`, or `1, 2 and 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def verdict(projection: Projection) -> str:
    """What the projection says, in one or two sentences."""
    best, efficient = projection.best, projection.most_efficient
    rival, doubt = projection.best_opponent, " (disqualified, as all are)" if best.disqualified else ""
    text = f"Fastest pipeline: {best.label}{doubt}, {best.speedup:.2f}x plain decoding on {best.devices} devices"
    other = projection.speedup(rival.tokens_per_s)
    text += f"; best opponent: {rival.label}, {other:.2f}x on {rival.devices}."
    if efficient is not best:
        text += f" Most a device: {efficient.label}, {efficient.speedup_per_device:.2f}x a device."
    return text


SPEED_COLUMNS = ("", "devices", "tok/s", "speed-up [95 %]", "a device")


def speed_rows(projection: Projection) -> list[list[str]]:
    """All ways to decode one request, the fastest first: cells of `SPEED_COLUMNS`."""
    found = []
    rows: list[PipelineRow | Opponent] = [*projection.pipelines, *projection.opponents]
    for row in sorted(rows, key=lambda row: -row.tokens_per_s):
        speedup = projection.speedup(row.tokens_per_s)
        interval = [f"{projection.speedup(each):.2f}" for each in row.interval or ()]
        low_high = f" [{', '.join(interval)}]" if interval else ""
        a_device = f"{speedup / row.devices:.2f}"
        found.append(
            [harmless(row.label), str(row.devices), f"{row.tokens_per_s:.1f}", f"{speedup:.2f}{low_high}", a_device]
        )
    return found


def _speeds(projection: Projection) -> RenderableType:
    grid = plain_grid([(name, bool(name)) for name in SPEED_COLUMNS])
    for label, *cells in speed_rows(projection):
        grid.add_row(Text(label), *cells)
    return grid


def _bars(projection: Projection, console: Console) -> RenderableType:
    """A bar for each way to decode one request, in the order of devices, within `CHART_WIDTH` columns."""
    rows: list[PipelineRow | Opponent] = [*projection.opponents, *projection.pipelines]
    rows.sort(key=lambda row: (row.devices, row.tokens_per_s))
    labels, speedups = [harmless(row.label) for row in rows], [projection.speedup(row.tokens_per_s) for row in rows]
    longest = min(LONGEST_LABEL, max(map(len, labels)))
    room = min(CHART_WIDTH, console.width) - longest - len(f"{rows[-1].devices}") - len(f"{max(speedups):.2f}") - 3
    mark = "#" if console.options.ascii_only else "█"
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_column(max_width=longest)
    grid.add_column(justify="right")
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right")
    for row, label, speedup in zip(rows, labels, speedups, strict=True):
        bar = mark * max(1, round(room * speedup / max(speedups)))
        grid.add_row(Text(label), str(row.devices), bar, f"{speedup:.2f}")
    return grid


PIPELINE_COLUMNS = (
    *("", "cycle\nms", "stage\nms", "draft\nms", "tok/\ncycle", "bubble,\nmostly"),
    *("+5 %\nacc.", "100 us\nlinks", "spare\nlayers"),
)


def pipeline_rows(projection: Projection) -> list[list[str]]:
    """What a pipeline's lanes do, and what would change its speed-up: cells of `PIPELINE_COLUMNS`."""
    found = []
    for row in projection.pipelines:
        shares = bubble_shares(row.lanes)
        cause = max(CAUSES, key=lambda name: shares[name])
        found.append(
            [
                harmless(row.label),
                *(f"{MS * each:.2f}" for each in (row.cycle_s, row.slowest_stage_s, row.draft_s)),
                f"{row.tokens_per_cycle:.2f}",
                f"{sum(shares[name] for name in CAUSES):.0%} {cause}",
                *(_sensitivity(row, what, value) for what, value in (("acceptance", 0.05), ("message_s", 1e-4))),
                f"{row.hidden_layers:.1f}",
            ]
        )
    return found


def _pipelines(projection: Projection) -> RenderableType:
    grid = plain_grid([(name, bool(name)) for name in PIPELINE_COLUMNS])
    for label, *cells in pipeline_rows(projection):
        grid.add_row(Text(label), *cells)
    return grid


def _sensitivity(row: PipelineRow, what: str, value: float) -> str:
    found = next((each.speedup for each in row.sensitivities if (each.what, each.value) == (what, value)), None)
    return EMPTY if found is None else f"{found:.2f}"


def _loads(projection: Projection) -> RenderableType:
    best = set(map(astuple, frontier(projection.loads)))
    grid = plain_grid(
        (("requests", True), ("", False), ("devices", True), ("ms/token", True), ("device ms/token", True))
    )
    before = 0
    for load in projection.loads:
        if before not in (0, load.requests):
            grid.add_section()
        star = " *" if astuple(load) in best else ""
        cells = f"{MS * load.token_s:.2f}", f"{MS * load.device_s_per_token:.2f}"
        grid.add_row(
            str(load.requests) if before != load.requests else "",
            f"{harmless(load.label)}{star}",
            str(load.devices),
            *cells,
        )
        before = load.requests
    return grid


def bubble_shares(lanes: LaneTime) -> dict[str, float]:
    """The parts of lanes x decode time, by name."""
    return {field.name: getattr(lanes, field.name) / lanes.total for field in fields(lanes)}


def to_json(projection: Projection) -> str:
    """Everything, for programs."""
    document = {
        "schema": SCHEMA,
        "device": projection.device,
        "vanilla_token_s": projection.token_s,
        "verdict": verdict(projection),
        "best": projection.best.label,
        "most_efficient": projection.most_efficient.label,
        "pipelines": [_pipeline_record(row) for row in projection.pipelines],
        "opponents": [_opponent_record(row, projection) for row in projection.opponents],
        "faster_up_to": [
            {"label": each.label, "than": each.rival, "requests": each.up_to, "faster_at": each.faster_at}
            for each in projection.breakevens
        ],
        "loads": _load_records(projection.loads),
        "notes": list(projection.notes),
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _pipeline_record(row: PipelineRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "stage_layers": row.layers,
        "devices": row.devices,
        "source": row.source,
        "recorded_stages": row.recorded_stages,
        "disqualified": row.disqualified,
        "acceptance_rate": row.acceptance,
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_s_ci": row.interval,
        "speedup": row.speedup,
        "speedup_ci": row.speedup_interval,
        "speedup_per_device": row.speedup_per_device,
        "device_s_per_token": row.devices / row.tokens_per_s,
        "cycle_s": row.cycle_s,
        "slowest_stage_s": row.slowest_stage_s,
        "draft_s": row.draft_s,
        "tokens_per_cycle": row.tokens_per_cycle,
        "lane_shares": bubble_shares(row.lanes),
        "spare_layers": row.hidden_layers,
        "sensitivity": [{each.what: each.value, "speedup": each.speedup} for each in row.sensitivities],
    }


def _opponent_record(row: Opponent, projection: Projection) -> dict[str, Any]:
    speedup = projection.speedup(row.tokens_per_s)
    return {
        "label": row.label,
        "method": row.method,
        "disqualified": row.disqualified,
        "devices": row.devices,
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_s_ci": row.interval,
        "speedup": speedup,
        "speedup_per_device": speedup / row.devices,
        "device_s_per_token": row.devices / row.tokens_per_s,
    }


def _load_records(loads: Sequence[Load]) -> list[dict[str, Any]]:
    best = set(map(astuple, frontier(loads)))
    return [
        {
            "label": each.label,
            "requests": each.requests,
            "devices": each.devices,
            "token_s": each.token_s,
            "device_s_per_token": each.device_s_per_token,
            "tokens_per_s": each.tokens_per_s,
            "on_frontier": astuple(each) in best,
        }
        for each in loads
    ]
