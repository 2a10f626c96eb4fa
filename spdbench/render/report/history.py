"""Charts of a history: speed-up, tokens/s and acceptance run by run, with the band of noise and each run's verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from math import floor, log10
from pathlib import Path
from typing import Any, NamedTuple

from spdbench.judge.gate.history import Band, History, HistoryRun, Point
from spdbench.judge.results.schema import Result
from spdbench.render.check import because
from spdbench.render.columns import harmless
from spdbench.render.report.chart import NUM_TICKS, Chart, Panel, Record, Spec, listing, quantity, spec
from spdbench.render.report.style import Palette

SHORT_HASH = 8
SHARES = frozenset({"acceptance_rate"})


class Sign(NamedTuple):
    """How a verdict looks: Vega's shape, a colour of the palette (None: the label's), and its sign in text."""

    shape: str
    colour: str | None
    filled: bool
    size: int
    text: str


SIGNS = {
    "pass": Sign("circle", None, filled=True, size=45, text="\N{BLACK CIRCLE}"),
    "first": Sign("circle", None, filled=False, size=55, text="\N{WHITE CIRCLE}"),
    "inconclusive": Sign("diamond", "neutral", filled=False, size=110, text="\N{WHITE DIAMOND}"),
    "not comparable": Sign("cross", "neutral", filled=True, size=110, text="\N{HEAVY GREEK CROSS}"),
    "improved": Sign("triangle-up", "good", filled=True, size=150, text="\N{BLACK UP-POINTING TRIANGLE}"),
    "regression": Sign("triangle-down", "bad", filled=True, size=220, text="\N{BLACK DOWN-POINTING TRIANGLE}"),
}
"""By verdict. What needs a look is drawn last, on top."""
READ_SIGNS = ", ".join(f"{sign.text} {name}" for name, sign in SIGNS.items())


def run_names(history: History) -> dict[HistoryRun, str]:
    """By run its date, with the time where dates repeat and the commit where every run has one; unique."""
    forms = ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S")
    starts = {run.started for run in history.runs}
    form = next((each for each in forms if _num_different(starts, each) == len(starts)), forms[-1])
    with_commit = all(run.commit for run in history.runs)
    seen = Counter[str]()
    names = {}
    for run in history.runs:
        name = f"{run.started:{form}}" + (f" {_commit(run)}" if with_commit else "")
        seen[name] += 1
        names[run] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def _num_different(starts: set[datetime], form: str) -> int:
    return len({f"{each:{form}}" for each in starts})


def _commit(run: HistoryRun) -> str:
    """The commit's first digits, `+` behind them if the sources differed from it."""
    commit, dirty, _ = (run.commit or "").partition("+")
    return harmless(commit[:SHORT_HASH] + dirty)


def machine_name(head: Result) -> str:
    return harmless(str(head.environment.get("fingerprint") or "unknown")[:SHORT_HASH])


def records_of(history: History, label: str) -> list[Record]:
    """A record of each run of `label`. A `stretch` is what no change of machine interrupts."""
    names = run_names(history)
    found: list[Record] = []
    stretch, machine = 0, None
    for run, point in history.of(label):
        fingerprint = run.head.environment.get("fingerprint")
        stretch += found != [] and fingerprint != machine
        machine = fingerprint
        low, high = point.interval or (None, None)
        rate_low, rate_high = point.result.metrics["decode_tokens_per_s_ci"] or (None, None)
        found.append(
            {
                "label": harmless(label),
                "run": names[run],
                "started": f"{run.started:%Y-%m-%d %H:%M:%S} UTC",
                "commit": _commit(run),
                "machine": machine_name(run.head),
                "stretch": stretch,
                "verdict": point.verdict,
                "because": harmless(because(point.judgement)),
                "speedup": point.speedup,
                "speedup_low": low,
                "speedup_high": high,
                **_band("speedup", point.speedup_band),
                "tokens_per_s": point.result.metrics["decode_tokens_per_s"],
                "tokens_per_s_low": rate_low,
                "tokens_per_s_high": rate_high,
                **_band("tokens_per_s", point.speed_band if _calibrated(point.speed_band) else None),
                "acceptance_rate": point.result.metrics["acceptance_rate"],
                "words": _words(point),
                "file": harmless(Path(point.result.file).name),
            }
        )
    return found


def _calibrated(band: Band | None) -> bool:
    return band is not None and band.is_calibrated


def _band(metric: str, band: Band | None) -> Record:
    baseline, floor, ceiling = (None, None, None) if band is None else band[:3]
    return {f"{metric}_baseline": baseline, f"{metric}_floor": floor, f"{metric}_ceiling": ceiling}


def _words(point: Point) -> str:
    """`-12.3 %` at a regression or an improvement of speed; empty otherwise."""
    verdicts = {each.verdict for each in point.judgement.findings if each.gate == "timing" and each.decides}
    return change_of(point) if verdicts & {"regression", "improved"} else ""


def change_of(point: Point) -> str:
    """By how much its speed, as far as that decides, differs from its baseline's; empty without one."""
    found = (each.change for each in point.judgement.findings if each.gate == "timing" and each.decides and each.change)
    change = next(found, None)
    return "" if change is None else f"{change - 1:+.1%}".replace("-", "\N{MINUS SIGN}")


def _speedups(history: History, palette: Palette) -> list[Panel]:
    panels = []
    for label in history.labels:
        records = [each for each in records_of(history, label) if each["speedup"] is not None]
        if records:
            colours = {harmless(label): _colours(history, palette)[harmless(label)]}
            drawn = _picture(history, records, "speedup", "speed-up", colours, palette, height=190)
            panels.append(Panel(drawn, records, harmless(label)))
    return panels


def _speeds(history: History, palette: Palette) -> list[Panel]:
    return _together(history, palette, "tokens_per_s", "tokens/s")


def _acceptance(history: History, palette: Palette) -> list[Panel]:
    return _together(history, palette, "acceptance_rate", "acceptance rate")


def _together(history: History, palette: Palette, metric: str, title: str) -> list[Panel]:
    """All labels in one picture."""
    records = [each for label in history.labels for each in records_of(history, label) if each[metric] is not None]
    if not records:
        return []
    return [Panel(_picture(history, records, metric, title, _colours(history, palette), palette, height=260), records)]


def _colours(history: History, palette: Palette) -> dict[str, str]:
    """By label. Plain decoding has the baseline's colour, as in comparisons."""
    found: dict[str, str] = {}
    drafting = 0
    for label in history.labels:
        if history.of(label)[0][1].result.head.backend.kind == "autoregressive":
            found[harmless(label)] = palette.baseline
        else:
            found[harmless(label)] = palette.series[drafting % len(palette.series)]
            drafting += 1
    return found


def _picture(
    history: History,
    records: Sequence[Record],
    metric: str,
    title: str,
    colours: dict[str, str],
    palette: Palette,
    *,
    height: int,
) -> Spec:
    """Bands, intervals, lines, breaks between machines, and a sign a run, from the back to the front."""
    shown = [each for each in colours if any(record["label"] == each for record in records)]
    scale = {"domain": shown, "range": [colours[each] for each in shown]}
    legend = {"symbolType": "stroke", "symbolStrokeWidth": 3} if len(shown) > 1 else None
    colour = {"field": "label", "type": "nominal", "scale": scale, "legend": legend}
    runs = {"domain": list(run_names(history).values()), "type": "band", "padding": 0}
    axis = {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 10, "labelExpr": "split(datum.label, ' ')"}
    axis |= {"labelPadding": 10, "ticks": False}
    x = {"field": "run", "type": "ordinal", "scale": runs, "title": None, "axis": axis}
    domain = _domain(records, metric)
    form = {"axis": {"format": f".{_decimals(domain)}%"}} if metric in SHARES else {}
    y = quantity(metric, title, scale={"domain": domain, "nice": False, "zero": False}, **form)
    layers: list[Spec] = []
    if any(record.get(f"{metric}_floor") is not None for record in records):
        layers += _bands(metric, x, y, colour)
    if any(record.get(f"{metric}_low") is not None for record in records):
        ends = {"y": y | {"field": f"{metric}_low"}, "y2": {"field": f"{metric}_high"}}
        held = [{"filter": f"isValid(datum.{metric}_low)"}]
        mark = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.55}
        layers.append({"transform": held, "mark": mark, "encoding": {"x": x, **ends, "color": colour}})
    layers.append(
        {
            "mark": {"type": "line", "strokeWidth": 1.5},
            "encoding": {"x": x, "y": y, "color": colour, "detail": {"field": "stretch"}},
        }
    )
    layers += _breaks(history, x, palette)
    layers += _signs(records, {"x": x, "y": y}, metric, colour, palette)
    # The last run's name is wider than its step, and would be cut off at the right.
    return spec(records, *layers, height=height, padding={"left": 4, "top": 4, "right": 30, "bottom": 4})


def _domain(records: Sequence[Record], metric: str) -> list[float]:
    names = (metric, *(f"{metric}_{end}" for end in ("low", "high", "floor", "ceiling")))
    values = [record[name] for record in records for name in names if record.get(name) is not None]
    room = 0.12 * (max(values) - min(values)) or 0.1 * max(values) or 0.1
    return [max(0.0, min(values) - room), max(values) + room]


def _decimals(domain: Sequence[float]) -> int:
    """Of the percents at an axis: as many as tell its ticks apart. Vega's are 1, 2 or 5 times a power of ten apart, and
    about `NUM_TICKS`."""
    apart = 100 * (domain[1] - domain[0]) / NUM_TICKS
    return max(0, -floor(log10(apart / 0.5**0.5)))


def _bands(metric: str, x: Spec, y: Spec, colour: Spec) -> list[Spec]:
    """A step a run: what it was allowed, about its baseline."""
    held = [{"filter": f"isValid(datum.{metric}_floor)"}]
    ends = {"y": y | {"field": f"{metric}_floor"}, "y2": {"field": f"{metric}_ceiling"}}
    middle = {"y": y | {"field": f"{metric}_baseline"}}
    plain = {"type": "rect", "opacity": 0.16, "strokeWidth": 0}
    line = {"type": "tick", "thickness": 1, "opacity": 0.7, "bandSize": {"band": 1}, "orient": "horizontal"}
    return [
        {"transform": held, "mark": plain, "encoding": {"x": x, **ends, "color": colour}},
        {"transform": held, "mark": line, "encoding": {"x": x, **middle, "color": colour}},
    ]


def _breaks(history: History, x: Spec, palette: Palette) -> Iterator[Spec]:
    """A dashed line where another machine begins, with its name on the side that has more room."""
    names = run_names(history)
    found = [
        (number / len(history.runs) > 0.5, {"run": names[run], "machine": f"machine {machine_name(run.head)}"})
        for number, run in enumerate(history.runs)
        if run.is_new_machine
    ]
    place = {"x": x | {"bandPosition": 0}}
    for is_late in (False, True):
        rows = [row for late, row in found if late is is_late]
        if rows:
            data = {"data": {"values": rows}}
            rule = {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.5, "color": palette.ink}
            yield {**data, "mark": rule, "encoding": place}
            text = {"type": "text", "baseline": "top", "align": "right" if is_late else "left", "dy": 3}
            text |= {"dx": -4 if is_late else 4, "color": palette.muted}
            yield {**data, "mark": text, "encoding": {**place, "y": {"value": 0}, "text": {"field": "machine"}}}


def _signs(records: Sequence[Record], place: Spec, metric: str, colour: Spec, palette: Palette) -> Iterator[Spec]:
    tip = [{"field": name} for name in ("label", "run", "started", "commit", "machine", "verdict", "because")]
    form = ".1%" if metric in SHARES else ".3f"
    tip += [{"field": metric, "format": form}]
    tip += [{"field": f"{metric}_{end}", "format": form} for end in ("low", "high") if f"{metric}_{end}" in records[0]]
    for verdict, sign in SIGNS.items():
        if any(record["verdict"] == verdict for record in records):
            own = None if sign.colour is None else getattr(palette, sign.colour)
            mark: dict[str, Any] = {"type": "point", "shape": sign.shape, "size": sign.size, "opacity": 1}
            mark |= {"filled": sign.filled, "strokeWidth": 2} | ({} if sign.filled else {"fill": palette.surface})
            mark |= {} if own is None else {"color": own}
            encoding = {**place, "tooltip": tip} | ({"color": colour} if own is None else {})
            yield {"transform": [{"filter": f"datum.verdict === '{verdict}'"}], "mark": mark, "encoding": encoding}
    if metric == "speedup":
        for verdict, below in (("regression", 19), ("improved", -19)):
            if any(record["verdict"] == verdict and record["words"] for record in records):
                own = getattr(palette, SIGNS[verdict].colour or "ink")
                mark = {"type": "text", "dy": below, "fontWeight": "bold", "color": own}
                held = [{"filter": f"datum.verdict === '{verdict}'"}]
                yield {"transform": held, "mark": mark, "encoding": {**place, "text": {"field": "words"}}}


def _describe(records: Sequence[Record], metric: str) -> str:
    """By label its first and last value, and what was found in between."""
    form = ".0%" if metric in SHARES else ".2f"
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        own = [record for record in records if record["label"] == label]
        found = [f"{each['verdict']} at {each['run']}" for each in own if each["verdict"] not in ("pass", "first")]
        ends = f"{own[0][metric]:{form}} at first, {own[-1][metric]:{form}} now, in {len(own)} runs"
        parts.append(f"{label}: {ends}; {listing(found, 6) or 'no regression'}")
    return listing(parts)


_SHOWN = "None of these runs has plain decoding of its own, so there are no speed-ups."
CHARTS: dict[str, Chart[History]] = {
    chart.name: chart
    for chart in (
        Chart(
            "history-speedup",
            "Speed-up over plain decoding, run by run",
            f"A step a run, in order of time, with its 95 % interval. {READ_SIGNS}. The shaded band is what the run "
            "was allowed without being a regression or an improvement, about the mean of the runs that it was judged "
            "against. A dashed line is a change of machine or software: speeds on both sides of it do not compare.",
            _SHOWN,
            _speedups,
            lambda records: _describe(records, "speedup"),
        ),
        Chart(
            "history-speed",
            "Tokens/s, run by run",
            "Decode tokens/s, which drift with the machine; a band is drawn where it is calibrated. The signs are the "
            "verdicts on all of the run, as above.",
            "No tokens were decoded after the first.",
            _speeds,
            lambda records: _describe(records, "tokens_per_s"),
        ),
        Chart(
            "history-acceptance",
            "Acceptance, run by run",
            "The share of judged drafts that were accepted. Of the same drafter and the same prompts it does not "
            "depend on the machine's speed.",
            "None of these runs drafts.",
            _acceptance,
            lambda records: _describe(records, "acceptance_rate"),
        ),
    )
}
"""In the order of the page."""
