"""`run --trace --keep-drafts`, then `trace` and `show`, on a tiny random model."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.cells import cell_len

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import read_results
from spdbench.judge.metrics.bubble import full_cycles, lane_time, read_spans
from spdbench.judge.results.schema import Result, Run, json_schema, read_result
from spdbench.judge.timeline import stage_tokens, step_tokens
from spdbench.pipeline.inline import InlinePipeline
from spdbench.pipeline.schedule import Cycle
from spdbench.render.report.style import LIGHT
from spdbench.render.report.timeline import DISCARDED, TIMELINE
from spdbench.types import Span
from tests.cli.run_helpers import spdbench, write_suite

Slice = dict[str, Any]


@pytest.fixture(autouse=True)
def _cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - it sets the environment
    monkeypatch.setenv("COLUMNS", "80")


def measured(model: Path, folder: Path, *words: str) -> Result:
    """The result of one backend, with spans and drafts."""
    common = ("-m", model, "--dtype", "float32", "--results", folder, "--threads", "1", "--limit", "2")
    said = spdbench("run", write_suite(folder), *common, "--max-new-tokens", "24", *words)
    assert said.code == 0, said.err
    [path] = folder.glob("*.json")
    jsonschema.validate(json.loads(path.read_text()), json_schema())
    return read_result(path)


def result_file(folder: Path) -> Path:
    [path] = folder.glob("*.json")
    return path


class Trace:
    """A strict reader: raises for what a viewer would drop, cut or misplace."""

    def __init__(self, path: Path) -> None:
        self.tracks: dict[str, list[Slice]] = {}
        self.counters: dict[str, list[tuple[int, float]]] = defaultdict(list)
        names: dict[int, str] = {}
        events = json.loads(path.read_text())["traceEvents"]
        for event in events:
            if event["ph"] == "M" and event["name"] == "thread_name":
                assert event["tid"] not in names
                names[event["tid"]] = event["args"]["name"]
        assert len(set(names.values())) == len(names)
        for event in events:
            if event["ph"] == "X":
                start = ns(event["ts"])
                slice_ = {**event, "start": start, "end": start + ns(event["dur"])}
                self.tracks.setdefault(names[event["tid"]], []).append(slice_)
            elif event["ph"] == "C":
                [value] = event["args"].values()
                self.counters[event["name"]].append((ns(event["ts"]), value))
            else:
                assert event["ph"] == "M"
        for slices in self.tracks.values():
            require_nested(slices)
        for samples in self.counters.values():
            assert [at for at, _ in samples] == sorted({at for at, _ in samples})


def ns(microseconds: float) -> int:
    assert abs(round(microseconds * 1000) - microseconds * 1000) < 1e-3
    return round(microseconds * 1000)


def require_nested(slices: list[Slice]) -> None:
    open_ends: list[int] = []
    for each in slices:
        assert 0 <= each["start"] <= each["end"]
        while open_ends and open_ends[-1] <= each["start"]:
            open_ends.pop()
        assert not open_ends or each["end"] <= open_ends[-1]
        open_ends.append(each["end"])
    starts = [each["start"] for each in slices]
    assert starts == sorted(starts)


def requests_of(trace: Trace, result: Result) -> list[tuple[Run, int, list[Slice], list[Span]]]:
    """Each run, its start, its steps, and its spans as the trace has them, on the trace's clock."""
    outer = [each for each in trace.tracks["requests"] if "category" in each["args"]]
    assert [each["name"] for each in outer] == [run.prompt_id for run in result.runs]
    starts = [each["start"] for each in outer]
    assert starts == sorted(starts)
    found = []
    for index, (run, start) in enumerate(zip(result.runs, starts, strict=True)):
        until = [*starts, 1 << 62][index + 1]
        steps = [s for s in trace.tracks["requests"] if start <= s["start"] < until and "step" in s["args"]]
        assert len(steps) == len(run.steps.t_ns)
        spans = []
        for name, slices in trace.tracks.items():
            if name == "requests":
                continue
            lane = lane_of(name, result.backend.lanes)
            for each in whole([each for each in slices if start <= each["start"] < until]):
                facts, kind = each["args"], each["name"].removesuffix(" (discarded)")
                assert each["name"].endswith("(discarded)") is not facts["kept"]
                spans.append(
                    Span(lane, kind, each["start"], each["end"], facts["position"], facts["kept"], facts["cycle"])
                )
        found.append((run, start, steps, spans))
    return found


def whole(slices: list[Slice]) -> list[Slice]:
    """The slices of a track with the pieces of each cut span put together."""
    found: dict[object, Slice] = {}
    for place, each in enumerate(slices):
        facts = each["args"]
        number, piece = facts.get("span", f"uncut {place}"), facts.get("piece", 1)
        before = found.get(number)
        if before is not None:
            assert (each["start"], piece) == (before["end"], before["args"]["piece"] + 1)
        else:
            assert piece == 1
        found[number] = each if before is None else {**each, "start": before["start"]}
    return [*found.values()]


def lane_of(name: str, lanes: int) -> int:
    return (
        {"target and drafter": 0, "drafter": lanes, "host": lanes + 1}.get(name, -1)
        if "stage" not in name
        else int(name.removeprefix("stage "))
    )


def require_every_span(run: Run, start: int, spans: list[Span]) -> None:
    assert run.spans is not None
    moved = Counter(
        (s.lane, s.kind, s.start_ns + start, s.end_ns + start, s.position, s.kept) for s in run.spans.spans()
    )
    assert moved == Counter(span[:6] for span in spans)


def require_same_bubble(run: Run, start: int, spans: list[Span], lanes: int) -> None:
    counted = [at for at, emitted in zip(run.steps.t_ns, run.steps.emitted, strict=True) if emitted]
    ends = [start + at for at in run.steps.t_ns if counted[0] <= at <= counted[-1]]
    table = read_spans(spans, lanes)
    assert run.bubble is not None
    assert lane_time(table, ends).shares().model_dump() == pytest.approx(run.bubble.model_dump())
    if run.full_cycles is not None:
        assert full_cycles(table, ends) == run.full_cycles


def require_flushes(steps: list[Slice], lanes: int) -> None:
    """docs/metrics.md: cycles = verdicts + (n - 1)(1 + rejections before the last verdict)."""
    names = [each["name"] for each in steps][1:]
    verdicts = [name for name in names if name != "filling"]
    assert "rejected" in verdicts[:-1]
    assert len(names) == len(verdicts) + (lanes - 1) * (1 + verdicts[:-1].count("rejected"))
    for at, name in enumerate(names[:-1]):
        if name == "rejected":
            assert names[at + 1 : at + lanes] == ["filling"] * (lanes - 1)
            assert names[at + lanes] in ("accepted", "rejected")


def require_drawn_flush(path: Path, lanes: int) -> None:
    """The report's timeline shows the flush after a rejection, the refill, and all work that was thrown away: a stage
    that gets no processor before the verdict has none, so its spans say how much."""
    [loaded] = read_results([path])
    [table] = compare([loaded], by_category=True)
    [panel] = TIMELINE.make(table, LIGHT)
    lanes_shown = {f"stage {lane}" for lane in range(lanes)} | {"drafter", "host", "cycles"}
    assert {row["lane"] for row in panel.rows} == lanes_shown
    verdicts = [row["what"] for row in panel.rows if row["lane"] == "cycles"]
    after = verdicts[verdicts.index("rejected") + 1 :]
    assert after[: lanes - 1] == ["filling"] * (lanes - 1)
    assert after[lanes - 1 :][:1] in (["accepted"], ["rejected"])
    cycles = [row["cycle"] for row in panel.rows if row["lane"] == "cycles"]
    runs = list(loaded.detailed_runs())
    shown, ends = runs[0], runs[0].steps.t_ns
    begin, end = ends[min(cycles)], ends[max(cycles) + 1]
    thrown_away = Counter(row["lane"] for row in panel.rows if row["what"] == DISCARDED)
    for lane in range(lanes):
        found = [s for s in spans_of(shown) if s.lane == lane and not s.kept and s.end_ns > begin and s.start_ns < end]
        assert thrown_away[f"stage {lane}"] == len(found)
    assert any(s.lane < lanes and not s.kept for run in runs for s in spans_of(run))


def spans_of(run: Run) -> list[Span]:
    assert run.spans is not None
    return list(run.spans.spans())


def test_stages_in_processes_give_a_trace_without_a_lost_slice(tiny_model: Path, tmp_path: Path) -> None:
    spd = ("-b", "spd", "-o", "spd.stages=3", "-o", "spd.executor=process", "--drafter", "forced:0.7")
    result = measured(tiny_model, tmp_path, *spd, "--trace", "--keep-drafts")
    out = tmp_path / "trace" / "out.json"
    out.parent.mkdir()
    said = spdbench("trace", result_file(tmp_path), "-o", out)
    assert said.code == 0, said.err
    assert "ui.perfetto.dev" in said.err
    trace = Trace(out)
    assert trace.tracks.keys() == {"requests", "stage 0", "stage 1", "stage 2", "drafter", "host"}
    for run, start, steps, spans in requests_of(trace, result):
        require_every_span(run, start, spans)
        require_same_bubble(run, start, spans, 3)
        require_flushes(steps, 3)
        known = [each for name in trace.tracks if name != "requests" for each in trace.tracks[name]]
        for each in known:  # drafts are kept, so that discarded work has a token, too
            assert "token" in each["args"] or each["args"]["position"] >= run.num_prompt_tokens + run.num_new_tokens
    assert set(trace.counters) == {"pipe fill", "acceptance"}
    assert {value for _, value in trace.counters["pipe fill"]} <= {0, 1, 2, 3}
    require_drawn_flush(result_file(tmp_path), 3)


def test_a_pipeline_in_one_process_shows_flush_and_refill(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycles: list[Cycle] = []
    begin = InlinePipeline.begin

    def recorded(self: InlinePipeline, cycle: Cycle) -> None:
        cycles.append(cycle)
        begin(self, cycle)

    monkeypatch.setattr(InlinePipeline, "begin", recorded)
    spd = ("-b", "spd", "-o", "spd.stages=3", "-o", "spd.executor=inline", "--drafter", "forced:0.7", "--warmup", "0")
    result = measured(tiny_model, tmp_path, *spd, "--trace", "--keep-drafts")
    held = [
        tuple(None if token is None else token.token_id for token in stages)
        for run in result.runs
        for stages in stage_tokens(run, result.backend)
    ]
    assert held == [tuple(batch[0].token_id if batch else None for batch in cycle.stages) for cycle in cycles]
    out = tmp_path / "trace.txt"
    assert spdbench("trace", result_file(tmp_path), "-o", out).code == 0
    trace = Trace(out)
    assert trace.tracks.keys() == {"requests"}  # its stages share a thread and have no times of their own
    for _, _, steps, _ in requests_of(trace, result):
        require_flushes(steps, 3)
    fill = [value for _, value in trace.counters["pipe fill"]]
    assert [value for value in fill if value] == [sum(map(bool, cycle.stages)) for cycle in cycles]


def test_rounds_give_a_trace_and_an_answer(tiny_model: Path, tmp_path: Path) -> None:
    eagle = ("-b", "eagle", "--drafter", "oracle:0.6", "--trace", "--keep-drafts")
    result = measured(tiny_model, tmp_path, *eagle)
    for run in result.runs:
        for step, accepted in zip(step_tokens(run), run.steps.accepted, strict=True):
            assert len(step.accepted) == min(accepted, len(step.accepted) + len(step.own))
    out = tmp_path / "trace.txt"
    assert spdbench("trace", result_file(tmp_path), "-o", out).code == 0
    trace = Trace(out)
    for run, start, _, spans in requests_of(trace, result):
        require_every_span(run, start, spans)
        require_same_bubble(run, start, spans, 1)
    said = spdbench("show", result_file(tmp_path), "p1")
    assert said.code == 0, said.err
    assert "prompt p1, turn 0, repeat 0" in said.out
    assert "What the lanes did" in said.out


def test_show_reads_without_colour_at_80_columns(tiny_model: Path, tmp_path: Path) -> None:
    spd = ("-b", "spd", "-o", "spd.stages=3", "-o", "spd.executor=inline", "--drafter", "forced:0.6")
    result = measured(tiny_model, tmp_path, *spd, "--keep-drafts")
    said = spdbench("show", result_file(tmp_path))
    assert said.code == 0, said.err
    assert "\x1b" not in said.out
    assert max(map(cell_len, said.out.splitlines())) <= 80
    assert "[accepted]  ~rejected~  -dropped-  the target's own" in said.out
    for line in ("stage 0", "stage 1", "stage 2", "REJECTED", "fills"):
        assert line in said.out
    run = next(run for run in result.runs if f"prompt {run.prompt_id}," in said.out)
    shown = said.out.partition("Tokens in the stages")[0].partition("the target's own\n")[2]
    assert shown.count("[") == sum(run.steps.accepted)
    for step in step_tokens(run):
        assert all(f"~<{token}>~" in shown for token in step.rejected)


def test_a_usual_run_keeps_neither_spans_nor_drafts(tiny_model: Path, tmp_path: Path) -> None:
    result = measured(tiny_model, tmp_path, "-b", "eagle", "--drafter", "oracle:0.6")
    assert all(run.spans is None and run.drafted_tokens is None for run in result.runs)
    said = spdbench("trace", result_file(tmp_path), "-o", tmp_path / "trace.txt")
    assert (said.code, "run --trace" in said.err, said.err.count("\n")) == (2, True, 1)
    said = spdbench("show", result_file(tmp_path))
    assert (said.code, "run --keep-drafts" in said.err, said.err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "trace.txt").exists()


def test_plain_decoding_has_nothing_to_show(tiny_model: Path, tmp_path: Path) -> None:
    measured(tiny_model, tmp_path, "-b", "vanilla", "--trace", "--keep-drafts")
    said = spdbench("trace", result_file(tmp_path), "-o", tmp_path / "trace.txt")
    assert (said.code, "vanilla records no spans" in said.err) == (2, True)
    said = spdbench("show", result_file(tmp_path))
    assert (said.code, "vanilla drafts nothing" in said.err) == (2, True)


def test_bad_words_are_one_message(tiny_model: Path, tmp_path: Path) -> None:
    measured(tiny_model, tmp_path, "-b", "eagle", "--drafter", "oracle:0.6", "--trace", "--keep-drafts")
    path, out = result_file(tmp_path), tmp_path / "trace.txt"
    out.write_text("mine")
    for words, why in (
        (("trace", path, "-o", out), "exists already"),
        (("trace", path, "-o", path, "--force"), "is one of the results"),
        (("trace", path, "-o", tmp_path / "none" / "trace.json"), "does not exist"),
        (("trace", tmp_path / "none.json", "-o", tmp_path / "new.txt"), "none.json"),
        (("trace", tmp_path / "mini.yaml", "-o", tmp_path / "new.txt"), "is not JSON"),
        (("show", path, "p9"), "no prompt p9. Known: p0, p1."),
        (("show", path, "p1", "--turn", "3"), "prompt p1 has no turn 3"),
        (("show", tmp_path / "none.json"), "none.json"),
    ):
        said = spdbench(*words)
        assert said.code == 2, words
        assert why in said.err
        assert said.err.startswith("Error: ")
        assert said.err.count("\n") == 1
    assert out.read_text() == "mine"
    assert spdbench("trace", path, "-o", out, "--force").code == 0
    Trace(out)


def test_resuming_needs_the_same_words(tiny_model: Path, tmp_path: Path) -> None:
    measured(tiny_model, tmp_path, "-b", "eagle", "--drafter", "oracle:0.6", "--trace")
    common = ("-m", tiny_model, "--dtype", "float32", "--results", tmp_path, "--threads", "1", "--limit", "2")
    words = (*common, "--max-new-tokens", "24", "-b", "eagle", "--drafter", "oracle:0.6", "--resume")
    assert spdbench("run", tmp_path / "mini.yaml", *words).code == 2
    assert spdbench("run", tmp_path / "mini.yaml", *words, "--trace").code == 0
