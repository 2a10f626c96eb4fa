"""A result's runs as a trace for ui.perfetto.dev and chrome://tracing, in Chrome's JSON format.

Each request follows the one before it on the time axis. Tracks: the requests with their steps, then one for each lane.
A slice lies within another one of its track or next to it; spans of a lane that overlap otherwise go to a further track
of that lane, since a viewer would drop or cut them.

Format: "Trace Event Format" (Google), complete events (`X`), counters (`C`) and metadata (`M`); times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from spdbench.console import printable
from spdbench.judge.results.schema import BackendRecord, Result, Run
from spdbench.judge.timeline import LaneSpan, acceptance, lane_spans, pipe_fill, step_tokens, verdict

Text = Callable[[Sequence[int]], str]
Event = dict[str, Any]

PROCESS = 1
REQUESTS = 0
GAP_NS = 1_000_000
"""Between two requests, so that they can be told apart."""
TRACKS_A_LANE = 16


def trace_events(head: Result, runs: Iterable[Run], text: Text) -> Iterator[Event]:
    """All events of the trace; `text` turns ids into text.

    Raises:
        ValueError: drafts that are not those of their run's steps.
    """
    backend = head.backend
    process = printable(f"{backend.label} ({head.model.id})", one_line=True)
    yield _metadata("process_name", REQUESTS, {"name": process})
    yield from _named_track(REQUESTS, "requests")
    tracks: set[int] = set()
    origin = 0
    for run in runs:
        if not run.steps.t_ns:
            continue
        found = lane_spans(run)
        origin -= min([0, *(each.span.start_ns for each in found)])
        yield from _request_events(run, backend, text, origin)
        for each, track in zip(*_placed(found), strict=True):
            if track not in tracks:
                tracks.add(track)
                yield from _named_track(track, _track_name(track, backend))
            yield _slice(_span_name(each), track, origin, each.span.start_ns, each.span.end_ns, _span_facts(each, text))
        origin += max([run.steps.t_ns[-1], *(each.span.end_ns for each in found)]) + GAP_NS


def to_json(events: Iterable[Event]) -> bytes:
    """An event a line."""
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'.encode()


def _request_events(run: Run, backend: BackendRecord, text: Text, origin: int) -> Iterator[Event]:
    """The request, its steps within it, and the counters."""
    steps = run.steps
    facts = {"category": run.category, "turn": run.turn, "repeat": run.repeat, "tokens": run.num_new_tokens}
    yield _slice(run.prompt_id, REQUESTS, origin, 0, steps.t_ns[-1], facts)
    accepted_so_far = acceptance(steps)
    fill = pipe_fill(run, backend) if backend.kind == "pipeline" else []
    for number, (tokens, end) in enumerate(zip(step_tokens(run), steps.t_ns, strict=True)):
        begin = steps.t_ns[number - 1] if number else 0
        parts = {
            name: text(ids) for name in ("accepted", "rejected", "dropped", "own") if (ids := getattr(tokens, name))
        }
        facts = {"step": number, "cycle": number - 1, "position": run.num_prompt_tokens + tokens.position, **parts}
        yield _slice(verdict(steps, number, backend), REQUESTS, origin, begin, end, facts)
        if fill and number:
            yield _counter("pipe fill", origin + begin, fill[number - 1])
        if (share := accepted_so_far[number]) is not None:
            yield _counter("acceptance", origin + end, round(share, 4))
    if fill:
        yield _counter("pipe fill", origin + steps.t_ns[-1], 0)


def _placed(spans: Sequence[LaneSpan]) -> tuple[list[LaneSpan], list[int]]:
    """The spans by lane, outer ones before those within them, and the track of each: slices are nested on it."""
    ordered = sorted(spans, key=lambda each: (each.span.lane, each.span.start_ns, -each.span.end_ns))
    stacks: dict[int, list[int]] = {}  # by track: the ends of the slices that are open
    tracks = []
    for each in ordered:
        track = 1 + each.span.lane * TRACKS_A_LANE
        while not _fits(stacks.setdefault(track, []), each.span.start_ns, each.span.end_ns):
            track += 1
        stacks[track].append(each.span.end_ns)
        tracks.append(track)
    return ordered, tracks


def _fits(open_ends: list[int], start: int, end: int) -> bool:
    while open_ends and open_ends[-1] <= start:
        open_ends.pop()
    return not open_ends or end <= open_ends[-1]


def _track_name(track: int, backend: BackendRecord) -> str:
    lane, further = divmod(track - 1, TRACKS_A_LANE)
    if backend.kind != "pipeline":
        name = "target and drafter" if lane == 0 else f"lane {lane}"
    elif lane < backend.num_stages:
        name = f"stage {lane}"
    else:
        name = {backend.num_stages: "drafter", backend.num_stages + 1: "host"}.get(lane, f"lane {lane}")
    return f"{name}, overlapping {further}" if further else name


def _span_name(each: LaneSpan) -> str:
    return each.span.kind if each.span.kept else f"{each.span.kind} (discarded)"


def _span_facts(each: LaneSpan, text: Text) -> dict[str, Any]:
    span = each.span
    facts = {"cycle": each.cycle, "position": span.position, "kept": span.kept}
    return facts if each.token_id is None else {**facts, "token": text([each.token_id]), "token_id": each.token_id}


def _slice(name: str, track: int, origin: int, start_ns: int, end_ns: int, facts: dict[str, Any]) -> Event:
    shown = {key: printable(value, one_line=True) if isinstance(value, str) else value for key, value in facts.items()}
    times = {"ts": (origin + start_ns) / 1000, "dur": (end_ns - start_ns) / 1000}
    return {"ph": "X", "name": printable(name, one_line=True), "pid": PROCESS, "tid": track, **times, "args": shown}


def _counter(name: str, at_ns: int, value: float) -> Event:
    return {"ph": "C", "name": name, "pid": PROCESS, "tid": REQUESTS, "ts": at_ns / 1000, "args": {name: value}}


def _named_track(track: int, name: str) -> Iterator[Event]:
    yield _metadata("thread_name", track, {"name": name})
    yield _metadata("thread_sort_index", track, {"sort_index": track})


def _metadata(name: str, track: int, facts: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": PROCESS, "tid": track, "args": facts}
