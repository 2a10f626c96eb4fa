"""A result's runs as a trace for ui.perfetto.dev and chrome://tracing, in Chrome's JSON format.

Each request follows the one before it on the time axis. Tracks: the requests with their steps, then one for each lane.
A slice lies within another one of its track or next to it, since a viewer would drop or misplace others. A span that
begins in another one of its lane and ends after it (the host may send a token until after the next verdict) is cut
where the other one ends: its slices have the same `span`, and `piece` numbers them.

Format: "Trace Event Format" (Google), complete events (`X`), counters (`C`) and metadata (`M`); times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from spdbench.console import printable
from spdbench.judge.results.schema import BackendRecord, Result, Run
from spdbench.judge.timeline import LaneSpan, acceptance, lane_spans, pipe_fill, step_tokens, verdict

Text = Callable[[Sequence[int]], str]
Event = dict[str, Any]

PROCESS = 1
REQUESTS = PROCESS
"""The track of requests. Tracks are numbered from 1 on: Perfetto takes a thread 0 for the process' own one."""
GAP_NS = 1_000_000
"""Between two requests, so that they can be told apart."""


def trace_events(head: Result, runs: Iterable[Run], text: Text) -> Iterator[Event]:
    """All events of the trace; `text` turns ids into text.

    Raises:
        ValueError: drafts that are not those of their run's steps.
    """
    backend = head.backend
    process = printable(f"{backend.label} ({head.model.id})", one_line=True)
    yield _metadata("process_name", REQUESTS, {"name": process})
    yield from _named_track(REQUESTS, "requests")
    named: set[int] = set()
    origin = 0
    for run in runs:
        if not run.steps.t_ns:
            continue
        found = lane_spans(run)
        origin -= min([0, *(each.span.start_ns for each in found)])
        yield from _request_events(run, backend, text, origin)
        for lane in sorted({each.span.lane for each in found}):
            if lane not in named:
                named.add(lane)
                yield from _named_track(_track(lane), _track_name(lane, backend))
            for piece in _nested([each for each in found if each.span.lane == lane]):
                facts = _span_facts(piece, text)
                yield _slice(_span_name(piece.of), _track(lane), origin, piece.start_ns, piece.end_ns, facts)
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
            yield _counter("pipe fill", "stages", origin + begin, fill[number - 1])
        if (share := accepted_so_far[number]) is not None:
            yield _counter("acceptance", "share", origin + end, round(share, 4))
    if fill:
        yield _counter("pipe fill", "stages", origin + steps.t_ns[-1], 0)


class _Piece(NamedTuple):
    """A slice of a track: the span number `span` of its lane, or a piece of it, from 1 on."""

    start_ns: int
    end_ns: int
    of: LaneSpan
    span: int
    number: int


def _nested(spans: Sequence[LaneSpan]) -> list[_Piece]:
    """The spans of one lane as slices of one track: outer ones before those within them, cut where they would overlap
    otherwise."""
    waiting = [(each.span.start_ns, -each.span.end_ns, place, 1, each) for place, each in enumerate(spans)]
    heapify(waiting)
    open_ends: list[int] = []
    found = []
    while waiting:
        start, minus_end, place, number, each = heappop(waiting)
        end = -minus_end
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        if open_ends and open_ends[-1] < end:
            heappush(waiting, (open_ends[-1], -end, place, number + 1, each))
            end = open_ends[-1]
        open_ends.append(end)
        found.append(_Piece(start, end, each, place, number))
    return found


def _track(lane: int) -> int:
    return REQUESTS + 1 + lane


def _track_name(lane: int, backend: BackendRecord) -> str:
    if backend.kind != "pipeline":
        return "target and drafter" if lane == 0 else f"lane {lane}"
    if lane < backend.num_stages:
        return f"stage {lane}"
    return {backend.num_stages: "drafter", backend.num_stages + 1: "host"}.get(lane, f"lane {lane}")


def _span_name(each: LaneSpan) -> str:
    return each.span.kind if each.span.kept else f"{each.span.kind} (discarded)"


def _span_facts(piece: _Piece, text: Text) -> dict[str, Any]:
    each, span = piece.of, piece.of.span
    facts: dict[str, Any] = {"cycle": each.cycle, "position": span.position, "kept": span.kept}
    if each.token_id is not None:
        facts |= {"token": text([each.token_id]), "token_id": each.token_id}
    is_whole = (piece.start_ns, piece.end_ns) == (span.start_ns, span.end_ns)
    return facts if is_whole else facts | {"span": piece.span, "piece": piece.number}


def _slice(name: str, track: int, origin: int, start_ns: int, end_ns: int, facts: dict[str, Any]) -> Event:
    shown = {key: printable(value, one_line=True) if isinstance(value, str) else value for key, value in facts.items()}
    times = {"ts": (origin + start_ns) / 1000, "dur": (end_ns - start_ns) / 1000}
    return {"ph": "X", "name": printable(name, one_line=True), "pid": PROCESS, "tid": track, **times, "args": shown}


def _counter(name: str, unit: str, at_ns: int, value: float) -> Event:
    return {"ph": "C", "name": name, "pid": PROCESS, "tid": REQUESTS, "ts": at_ns / 1000, "args": {unit: value}}


def _named_track(track: int, name: str) -> Iterator[Event]:
    yield _metadata("thread_name", track, {"name": name})
    yield _metadata("thread_sort_index", track, {"sort_index": track})


def _metadata(name: str, track: int, facts: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": PROCESS, "tid": track, "args": facts}
