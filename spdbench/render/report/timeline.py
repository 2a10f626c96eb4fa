"""The chart of the steps around a rejection: what each lane did, by recorded spans; else the verdict of each cycle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.metrics.steps import cycles_around_rejection
from spdbench.judge.results.schema import BackendRecord, Run, RunKey
from spdbench.judge.timeline import LaneSpan, lane_spans, rejection_to_show, verdict
from spdbench.render.answer import Words, lane_name, lane_order
from spdbench.render.columns import harmless
from spdbench.render.report.chart import Chart, Panel, Record, Spec, height, listing, names, overall, quantity, spec
from spdbench.render.report.style import Palette

VERDICTS = ("accepted", "rejected", "filling", "decoded")
DISCARDED = "work thrown away"
WORK = {"target": "useful work", "head": "useful work", "draft": "draft", "verify": "verify", "host": "host"}
CYCLES_BEFORE = 3
ROUNDS_AFTER = 2
MS_IN_NS = 1e6
MS_IN_S = 1e3


def _timeline(table: Table, palette: Palette) -> list[Panel]:
    panels = []
    for row in overall(table):
        if row.head.backend.kind == "autoregressive":
            continue
        found = _lanes(row, table.decode) or _cycles(row)
        if found is not None:
            (prompt, turn, repeat), records = found
            heading = f"{harmless(row.label)}: prompt {harmless(prompt)}, turn {turn}, repeat {repeat}"
            panels.append(Panel(_picture(records, palette), records, heading))
    return panels


def _lanes(row: Row, decode: Callable[[Sequence[int]], str] | None) -> tuple[RunKey, list[Record]] | None:
    """The spans around the first rejection of the first request that has both; None without one."""
    backend = row.head.backend
    for run in row.result.detailed_runs():
        at = rejection_to_show(run, backend) if run.spans is not None and run.spans.lane else None
        if at is not None:
            return run.key, [*_spans(run, backend, at, Words(run.output_ids, decode), harmless(row.label))]
    return None


def _spans(run: Run, backend: BackendRecord, at: int, words: Words, label: str) -> Iterator[Record]:
    """A record a step, then a record a span, lane by lane; cut off at the ends of the picture."""
    ends, is_pipeline = run.steps.t_ns, backend.kind == "pipeline"
    first = max(at - CYCLES_BEFORE, 1)
    last = min(at + (backend.num_stages + 1 if is_pipeline else ROUNDS_AFTER), len(ends) - 1)
    begin, end = ends[first - 1], ends[last]

    def record(lane: str, what: str, cycle: int, start_ns: int, end_ns: int, **more: Any) -> Record:
        shown = {"start": (max(start_ns, begin) - begin) / MS_IN_NS, "end": (min(end_ns, end) - begin) / MS_IN_NS}
        return {
            "label": label,
            "lane": lane,
            "what": what,
            "cycle": cycle,
            **shown,
            "position": None,
            "token": "",
        } | more

    for step in range(first, last + 1):
        name = "cycles" if is_pipeline else "rounds"
        yield record(name, verdict(run.steps, step, backend), step - 1, ends[step - 1], ends[step])
    lanes: dict[str, list[LaneSpan]] = {}
    for each in lane_spans(run):
        if each.span.end_ns > begin and each.span.start_ns < end:
            lanes.setdefault(lane_name(each, backend), []).append(each)
    for lane in (name for name in lane_order(backend) if name in lanes):
        for each in lanes[lane]:
            span = each.span
            token = "" if each.token_id is None else words.at(span.position - run.num_prompt_tokens, [each.token_id])
            what = WORK[span.kind] if span.kept else DISCARDED
            yield record(lane, what, each.cycle, span.start_ns, span.end_ns, position=span.position, token=token)


def _cycles(row: Row) -> tuple[RunKey, list[Record]] | None:
    """The cycles of a pipeline without spans; None for other methods, and without a rejection."""
    backend, runs = row.head.backend, row.result.runs
    if backend.kind != "pipeline":
        return None
    found = cycles_around_rejection(runs, ~runs.failed, CYCLES_BEFORE, 2 * backend.num_stages + 1)
    if found is None:
        return None
    key, cycles = found
    begin = cycles[0].start_s
    return key, [
        {
            "label": harmless(row.label),
            "lane": cycle.verdict,
            "what": cycle.verdict,
            "cycle": number,
            "start": (cycle.start_s - begin) * MS_IN_S,
            "end": (cycle.end_s - begin) * MS_IN_S,
            "position": None,
            "token": "",
        }
        for number, cycle in enumerate(cycles, start=1)
    ]


def _picture(records: Sequence[Record], palette: Palette) -> Spec:
    """A bar a record, and behind them a line where each step ends."""
    useful, wasted, _, verify, draft, _, host, _ = palette.parts
    colours = {
        **dict(zip(VERDICTS, (palette.good, palette.bad, palette.neutral, palette.neutral), strict=True)),
        "useful work": useful,
        DISCARDED: wasted,
        "draft": draft,
        "verify": verify,
        "host": host,
    }
    shown = [what for what in colours if any(record["what"] == what for record in records)]
    scale = {"domain": shown, "range": [colours[what] for what in shown]}
    tip = [{"field": name} for name in ("lane", "what", "token", "position", "cycle")]
    tip += [{"field": name, "format": ".2f", "title": f"{name}, ms"} for name in ("start", "end")]
    last = max(record["end"] for record in records)
    bars = {
        "x": quantity("start", "ms", scale={"domain": [0, last], "nice": False}),
        "x2": {"field": "end"},
        "y": names("lane", records),
        "color": {"field": "what", "type": "nominal", "scale": scale},
        "tooltip": tip,
    }
    steps = {"filter": {"field": "what", "oneOf": list(VERDICTS)}}
    lines = {"x": {"field": "end", "type": "quantitative"}}
    return spec(
        records,
        {"transform": [steps], "mark": {"type": "rule", "strokeWidth": 1, "opacity": 0.4}, "encoding": lines},
        {"mark": {"type": "bar"}, "encoding": bars},
        height=height(records, "lane", 26),
    )


def _describe(records: Sequence[Record]) -> str:
    """The verdicts in their order."""
    parts = []
    for label in dict.fromkeys(record["label"] for record in records):
        own = (record["what"] for record in records if record["label"] == label and record["what"] in VERDICTS)
        parts.append(f"{label}: {', '.join(own)}")
    return listing(parts)


TIMELINE = Chart(
    "timeline",
    "Around a rejection",
    "What each lane did from step to step, as run --trace records it; of a pipeline without that, each cycle's "
    "verdict. After a rejection a pipeline is flushed: it throws work away, and fills again before the next verdict.",
    "None of these results has a rejection with recorded spans (run --trace), or is a pipeline with a rejection.",
    _timeline,
    _describe,
)
