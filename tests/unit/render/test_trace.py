"""Traces and shown answers of hand-made runs: overlapping spans, and text that a terminal would obey."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.schema import Run
from spdbench.render.answer import show_answer
from spdbench.render.trace import to_json, trace_events
from spdbench.types import Drafted, Span
from tests.builders import make_backend, make_result, make_run, make_steps, pipeline_steps

HOSTILE = "\x1b[2J\u202e\r\n[red]x[/red] 漢字"


def hostile(ids: Sequence[int]) -> str:
    return "".join(HOSTILE for _ in ids)


def pipeline_run(**more: Any) -> Run:
    steps = pipeline_steps([True, False, True], 3)
    by_step = [None, None, None, Drafted((11,), (-1,)), Drafted((90, 91), (-1, 0)), None, None, Drafted((13,), (-1,))]
    return make_run(steps, output_ids=[10, 11, 12, 13], drafted_tokens=DraftColumns.of(by_step), **more)


def events(run: Run) -> list[dict[str, Any]]:
    result = make_result([run], make_backend("pipeline"))
    return list(trace_events(result, [run], hostile))


def test_a_lane_has_one_track_and_what_overlaps_on_it_is_cut() -> None:
    """The second span begins within the first and ends after it, and the third lies within the first; the fourth ends
    after two others in which it begins."""
    spans = [
        *(Span(4, "host", 0, 50, 7, True), Span(4, "host", 30, 80, 8, True), Span(4, "verify", 10, 20, 7, True)),
        *(Span(4, "host", 60, 90, 9, True), Span(0, "target", 0, 90, 7, True)),
    ]
    found = events(pipeline_run(spans=SpanColumns.of(spans, 0)))
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["host", "requests", "stage 0"]
    slices = [event for event in found if event["ph"] == "X" and names[event["tid"]] == "host"]
    placed = [(e["name"], e["ts"], e["dur"], e["args"].get("span"), e["args"].get("piece")) for e in slices]
    times = [(name, round(ts * 1000), round((ts + dur) * 1000), *which) for name, ts, dur, *which in placed]
    assert times == [
        ("host", 0, 50, None, None),
        ("verify", 10, 20, None, None),
        ("host", 30, 50, 1, 1),
        ("host", 50, 80, 1, 2),
        ("host", 60, 80, 3, 1),
        ("host", 80, 90, 3, 2),
    ]


def test_idle_time_shorter_than_a_sign_is_seen() -> None:
    """A stage that is idle for the last quarter of every ms, in signs of about 1.8 ms; another one never is."""
    ms = 1_000_000
    gaps = [Span(0, "target", start, start + 750_000, 7, True, 1) for start in range(0, 130 * ms, ms)]
    run = pipeline_run(spans=SpanColumns.of([*gaps, Span(1, "target", 0, 130 * ms, 7, True, 1)], 0))
    shown = show_answer(run, make_backend("pipeline"), None, Console(width=48, no_color=True)).splitlines()
    [idle, busy] = [line.split() for line in shown if line.startswith("stage") and line.endswith("%")]
    assert set(idle[2]) == {"t"}
    assert idle[3] == "25%"
    assert set(busy[2]) == {"T"}
    assert busy[3] == "0%"
    [heading] = [line for line in shown if line.startswith("What the lanes did")]
    window, sign = re.findall("([0-9.]+) ms", " ".join(shown[shown.index(heading) :]))[:2]
    assert float(window) / float(sign) == pytest.approx(len(idle[2]), rel=0.01)


def test_work_before_the_request_moves_its_start() -> None:
    """Clocks of two machines may differ a little."""
    found = events(pipeline_run(spans=SpanColumns.of([Span(0, "target", -5000, 10, 7, True)], 0)))
    assert min(event["ts"] for event in found if event["ph"] == "X") == 0.0
    assert next(event["ts"] for event in found if event["name"] == "p0") == 5.0


def test_a_trace_holds_no_text_that_is_obeyed() -> None:
    content = to_json(events(pipeline_run())).decode()
    assert "\\u001b" not in content
    assert "\\u202e" not in content.replace("\\\\u202e", "")
    assert "\\\\x1b" in content


def test_an_answer_shows_hostile_text_as_text() -> None:
    run = pipeline_run(spans=SpanColumns.of([Span(0, "target", 60_000_000, 70_000_000, 7, True, 1)], 0))
    for width in (80, 40):
        shown = show_answer(run, make_backend("pipeline"), hostile, Console(width=width, no_color=True))
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[red]x[/red]" in shown.replace("\n", "").replace(" ", "")
        assert max(map(cell_len, shown.splitlines())) <= width


def test_a_wide_tree_shows_how_many_drafts_were_dropped() -> None:
    steps = make_steps([1, 1], drafted=[0, 1], judged=[0, 1], accepted=[0, 0], forwards=[1, 61])
    drafts = DraftColumns.of([None, Drafted(tuple(range(100, 160)), (-1,) * 60)])
    run = make_run(steps, output_ids=[5, 6], drafted_tokens=drafts)
    shown = show_answer(run, make_backend("draft_verify"), None, Console(width=80))
    assert "~<100>~~<101>~~<102>~~57 more~<6>" in shown
