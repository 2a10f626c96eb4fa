"""Charts of a sweep, and its page: a map of speed-ups over two settings, the points that no other beats, and where each
method begins or stops to pay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise

from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.results.embedded import EmbeddedFile, embed
from spdbench.judge.sweeps import (
    SweepRow,
    axes_of,
    best_of,
    break_evens,
    costs_of,
    frontier_of,
    name_of,
    numeric_axis,
    series_of,
)
from spdbench.render.columns import EMPTY, harmless
from spdbench.render.report.chart import Chart, Panel, Record, Spec, listing, names, quantity, spec
from spdbench.render.report.page import Numbers, figure, fill
from spdbench.render.report.style import SERIES_SHAPES, Palette

MS = 1e3
STEPS = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
"""Speed-ups between which the map has one colour."""
LEGEND = (
    f"below {STEPS[0]}",
    *(f"{low} to {high}" for low, high in pairwise(STEPS)),
    "2.0 and more",
)
LABEL = "label"
Rows = Sequence[SweepRow]


def to_html(rows: Rows, name: str, folder: str, sources: Sequence[EmbeddedFile] | None, command: str) -> str:
    """The page of the sweep `name`, whose results lie in `folder`; `command` makes it again."""
    best, axis = best_of(rows), numeric_axis(rows)
    verdicts = [_verdict(best) if best else "No point has a speed-up."]
    verdicts += [f"{each.words}." for each in (break_evens(rows, axis) if axis else [])]
    return fill(
        "plain.html",
        [figure(chart, rows, f"{command} --chart {chart.name} {chart.name}.svg") for chart in CHARTS.values()],
        embed(sources) if sources is not None else "",
        question="What is the best setting?",
        title=f"sweep {name} | {len({row.row.file for row in rows})} results",
        verdicts=verdicts,
        tables=[_numbers(rows)],
        notes=_notes(rows),
        environment=[("results", folder), ("settings that differ", ", ".join(map(name_of, axes_of(rows))) or EMPTY)],
    )


def _verdict(best: SweepRow) -> str:
    doubt = ", though disqualified, as all are" if best.row.disqualified else ""
    return f"Fastest: {_words(best)}, {best.speedup:.2f}x its baseline{doubt}."


def _numbers(rows: Rows) -> Numbers:
    axes, front = axes_of(rows), frontier_of(rows)
    columns = ["label", *map(name_of, axes), "speed-up [95 %]", "tok/s", "ms a token", "device ms a token", "no better"]
    lines = []
    for row in rows:
        low_high = row.row.metrics["speedup_ci"]
        interval = f" [{low_high[0]:.2f}, {low_high[1]:.2f}]" if low_high else ""
        speedup = EMPTY if row.speedup is None else f"{row.speedup:.2f}{interval}"
        numbers = [row.row.metrics["decode_tokens_per_s"], *(MS * each if each else each for each in costs_of(row))]
        cells = [EMPTY if each is None else f"{each:.2f}" for each in numbers]
        lines.append([row.row.label, *map(row.text, axes), speedup, *cells, "*" if row in front else ""])
    return Numbers("All points", columns, lines)


def _notes(rows: Rows) -> list[str]:
    """Every flag once, those that disqualify first."""
    flags = {flag.name: flag for row in rows for flag in row.row.flags}
    found = sorted(flags.values(), key=lambda flag: flag.name not in DISQUALIFYING)
    kind = {True: "disqualifies", False: "warning"}
    return [f"{flag.name} ({kind[flag.name in DISQUALIFYING]}): {flag.reason}. {flag.remedy}." for flag in found]


def _words(row: SweepRow) -> str:
    return ", ".join([row.row.label, *(f"{name_of(name)}={row.text(name)}" for name in row.settings)])


def _heat_map(rows: Rows, palette: Palette) -> list[Panel]:
    """A panel a label; with one axis, a row a label."""
    axes = axes_of(rows)
    if not axes or best_of(rows) is None:
        return []
    x, y = axes[0], axes[1] if len(axes) > 1 else LABEL
    labels = list(dict.fromkeys(row.row.label for row in rows))
    groups = [(label, [row for row in rows if row.row.label == label]) for label in labels]
    if y == LABEL:
        groups = [("", list(rows))]
    return [_map(own, x, y, palette, label if len(groups) > 1 else None) for label, own in groups if best_of(own)]


def _map(rows: Rows, x: str, y: str, palette: Palette, heading: str | None) -> Panel:
    cells: dict[tuple[str, str], list[SweepRow]] = {}
    for row in rows:
        cells.setdefault((row.text(x), row.row.label if y == LABEL else row.text(y)), []).append(row)
    records: list[Record] = []
    for (column, line), own in cells.items():
        best = best_of(own)
        if best is not None and best.speedup is not None:
            step = sum(best.speedup >= each for each in STEPS)
            shown = {"speedup": best.speedup, "words": f"{best.speedup:.2f}x", "step": LEGEND[step]}
            records.append({"x": harmless(column), "y": harmless(line), **shown, "point": harmless(_words(best))})
    place = {
        "x": names("x", _sorted(records, "x"), title=name_of(x), labelAngle=0) | {"title": name_of(x)},
        "y": names("y", _sorted(records, "y")) | {"title": None if y == LABEL else name_of(y)},
    }
    colour = {
        "field": "step",
        "type": "nominal",
        "scale": {"domain": list(LEGEND), "range": list(palette.lengths)},
        "sort": list(LEGEND),
    }
    tip = [{"field": name} for name in ("point", "words")]
    return Panel(
        spec(
            records,
            {"mark": {"type": "rect", "opacity": 0.55}, "encoding": {**place, "color": colour, "tooltip": tip}},
            {"mark": {"type": "text", "fontWeight": "bold"}, "encoding": {**place, "text": {"field": "words"}}},
            height=44 * len({each["y"] for each in records}) + 10,
        ),
        records,
        heading,
    )


def _sorted(records: Sequence[Record], field: str) -> list[Record]:
    """By the value of `field`: numbers by size, and `oracle:0.6` before `oracle:0.8`."""

    def key(record: Record) -> tuple[str, float, str]:
        name, _, number = str(record[field]).rpartition(":")
        return (name, float(number), "") if number.replace(".", "", 1).isdigit() else (name, 0.0, number)

    return sorted(records, key=key)


def _describe_map(records: Sequence[Record]) -> str:
    return listing([f"{each['point']}: {each['words']}" for each in sorted(records, key=lambda each: -each["speedup"])])


def _pareto(rows: Rows, palette: Palette) -> list[Panel]:
    front = frontier_of(rows)
    if not front:
        return []
    records: list[Record] = [
        {
            "point": harmless(_words(row)),
            "token_ms": MS * token_s,
            "device_ms": MS * device_s,
            "kind": "no other is better in both" if row in front else "another is better",
        }
        for row in rows
        for token_s, device_s in [costs_of(row)]
        if token_s is not None and device_s is not None
    ]
    kinds = ["no other is better in both", "another is better"]
    look = {"field": "kind", "type": "nominal", "scale": {"domain": kinds, "range": [palette.good, palette.neutral]}}
    x = quantity("token_ms", "ms between two tokens", scale={"zero": False})
    y = quantity("device_ms", "device ms a token", scale={"zero": False})
    of_front = {"transform": [{"filter": f"datum.kind === '{kinds[0]}'"}]}
    tip = [{"field": "point"}, *({"field": name, "format": ".2f"} for name in ("token_ms", "device_ms"))]
    shape = {"field": "kind", "type": "nominal", "scale": {"domain": kinds, "range": list(SERIES_SHAPES[:2])}}
    return [
        Panel(
            spec(
                records,
                {
                    **of_front,
                    "mark": {"type": "line", "interpolate": "step-after", "color": palette.good},
                    "encoding": {"x": x, "y": y, "order": {"field": "token_ms"}},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                    "encoding": {"x": x, "y": y, "color": look, "shape": shape, "tooltip": tip},
                },
                {
                    **of_front,
                    "mark": {"type": "text", "align": "left", "dx": 7, "dy": -7},
                    "encoding": {"x": x, "y": y, "text": {"field": "point"}},
                },
                height=320,
            ),
            records,
        )
    ]


def _describe_pareto(records: Sequence[Record]) -> str:
    best = [each for each in records if each["kind"] != "another is better"]
    return listing([f"{each['point']}: {each['token_ms']:.1f} ms, {each['device_ms']:.1f} device ms" for each in best])


def _break_even(rows: Rows, palette: Palette) -> list[Panel]:
    axis = numeric_axis(rows)
    if axis is None:
        return []
    records: list[Record] = [
        {"series": harmless(series_of(row, rows, axis)), "at": row.number(axis), "speedup": row.speedup}
        for row in rows
        if row.speedup is not None
    ]
    if not records:
        return []
    found = break_evens(rows, axis)
    crossings: list[Record] = [
        {"series": harmless(each.series), "at": at, "speedup": 1.0, "words": harmless(each.words)}
        for each in found
        for at in each.crossings
    ]
    without: list[Record] = [
        {"series": harmless(each.series), "at": None, "speedup": None, "words": harmless(each.words)}
        for each in found
        if not each.crossings
    ]
    domain = list(dict.fromkeys(record["series"] for record in records))
    ranges = {"color": palette.series, "shape": SERIES_SHAPES}
    look = {
        name: {
            "field": "series",
            "type": "nominal",
            "scale": {"domain": domain, "range": [each for each, _ in zip(cycle(values), domain, strict=False)]},
        }
        for name, values in ranges.items()
    }
    x = quantity("at", name_of(axis), scale={"zero": False, "nice": False, "padding": 12})
    y = quantity("speedup", "speed-up", scale={"zero": False})
    tip = [{"field": "series"}, {"field": "at"}, {"field": "speedup", "format": ".2f"}]
    layers: list[Spec] = [
        {"mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": {"y": {"datum": 1}}},
        {"mark": "line", "encoding": {"x": x, "y": y, "color": look["color"]}},
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {"x": x, "y": y, **look, "tooltip": tip},
        },
    ]
    if crossings:
        layers.append(
            {
                "data": {"values": crossings},
                "mark": {"type": "point", "size": 170, "strokeWidth": 2, "shape": "circle"},
                "encoding": {"x": x, "y": y, "color": look["color"], "tooltip": [{"field": "words"}]},
            }
        )
    return [Panel(spec(records, *layers, height=320), records + crossings + without)]


def _describe_break_even(records: Sequence[Record]) -> str:
    return listing(list(dict.fromkeys(each["words"] for each in records if "words" in each)))


CHARTS: dict[str, Chart[Rows]] = {
    chart.name: chart
    for chart in (
        Chart(
            "heat-map",
            "Speed-up over two settings",
            "A cell is the speed-up of the best point with these two settings, whatever the others are. Where one "
            "setting differs, a row is a label.",
            "No setting differs between the points, or no point has a speed-up.",
            _heat_map,
            _describe_map,
        ),
        Chart(
            "pareto",
            "Time against device time",
            "A dot is a label of a point: further left is faster for a request, further down is cheaper. On the line "
            "are those that no other beats in both.",
            "No point has both times.",
            _pareto,
            _describe_pareto,
        ),
        Chart(
            "break-even",
            "Where it pays",
            "A line is a method with its other settings. Above the dashed line it is faster than its baseline; a ring "
            "is where it crosses, on the line between two points. It may cross more than once.",
            "No setting is a number in all points, or no point has a speed-up.",
            _break_even,
            _describe_break_even,
        ),
    )
}
