"""`run --events`: every line is an event, whatever names and errors hold and however the run ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from spdbench.cli.run.events import EventFile, Events, open_events
from spdbench.cli.run.live_view import Tally
from spdbench.cli.terminal import Terminated
from spdbench.errors import BackendLostError, InputError
from spdbench.judge.results.schema import Drafts, read_result
from spdbench.types import GenerationRequest, Step
from tests.builders import chunk_steps, make_backend, make_run, vanilla_steps
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.mock_backend import MockPipelineSpans, MockSpans

SECRET = "hf_abcdefghijklmnop"
HOSTILE = 'p\x1b[2J\u202e"\n'


pytestmark = pytest.mark.usefixtures("own_cache")


class Failing(MockSpans):
    """Fails on the request whose prompt says so."""

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        if "fail" in request.messages[-1]["content"]:
            raise RuntimeError(f"cannot open https://user:{SECRET}@host with {SECRET}")
        return super().generate(request)


@pytest.fixture(autouse=True)
def _mocks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        name: EntryPoint(name, f"{cls.__module__}:{cls.__name__}", "spdbench.backends")
        for name, cls in (("drafting", MockSpans), ("piped", MockPipelineSpans), ("failing", Failing))
    }
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: points)
    monkeypatch.setattr("spdbench.measure.clock.time", MockSpans.time)


class Runs:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.results, self.file = folder / "results", folder / "events.jsonl"

    def __call__(self, *words: str, suite: Path | None = None, events: str | Path | None = None) -> Said:
        suite = suite or write_suite(self.folder)
        common = ("-m", self.model, "--dtype", "float32", "--results", self.results, "--drafter", "random")
        return spdbench("run", suite, *common, "--events", events or self.file, *words)

    def events(self) -> list[dict[str, Any]]:
        return parsed(self.file.read_text())


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_model, tmp_path)


def test_a_run_is_its_start_each_request_and_its_end(run: Runs) -> None:
    said = run("-b", "drafting", "-b", "piped")
    assert said.code == 0, said.err
    first, *requests, last = run.events()
    assert first["event"] == "run_started"
    assert (first["schema"], first["suite"], first["model"]) == ("spdbench.events/1", "mini", run.model.name)
    assert first["backends"] == [
        {"label": "drafting", "backend": "drafting", "kind": "draft_verify", "requests": 4, "done": 0},
        {"label": "piped", "backend": "piped", "kind": "pipeline", "requests": 4, "done": 0},
    ]
    assert {event["event"] for event in requests} == {"request_finished"}
    names = [f"mini__{label}__{run.model.name}.json" for label in ("drafting", "piped")]
    assert (last["event"], last["exit_code"], last["results"]) == ("run_ended", 0, names)
    for label, name in zip(("drafting", "piped"), names, strict=True):
        by_id = {event["prompt_id"]: event for event in requests if event["backend"] == label}
        runs = read_result(run.results / name).runs
        assert len(runs) == len(by_id) == 4
        for found in runs:
            event = by_id[found.prompt_id]
            assert (event["turn"], event["repeat"], event["error"]) == (0, 0, None)
            assert event["tokens"] == found.num_new_tokens
            assert (event["ttft_s"], event["decode_s"]) == (found.ttft_s, found.decode_s)
            for column in ("drafted", "judged", "accepted"):
                assert event[column] == sum(getattr(found.steps, column)) > 0


def test_events_on_stdout_are_alone_there(run: Runs) -> None:
    said = run("-b", "drafting", "-b", "piped", events="-")
    assert said.code == 0
    assert [event["event"] for event in parsed(said.out)] == ["run_started", *["request_finished"] * 8, "run_ended"]
    assert "speed-up" in said.err
    assert "8/8 requests" in said.err
    quiet = run("-b", "drafting", "--quiet", events="-")
    assert len(parsed(quiet.out)) == 6
    assert "tok/s" in quiet.err
    assert "Wrote" not in quiet.err


def test_names_and_errors_are_escaped_and_without_secrets(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    prompts = [
        {"id": HOSTILE, "category": "a", "turns": ["Say this."]},
        {"id": f"of {SECRET}", "category": "a", "turns": ["fail"]},
    ]
    suite = write_suite(run.folder, prompts={"source": [{"inline": prompts}]})
    assert run("-b", "failing", suite=suite).code == 1
    raw = run.file.read_bytes()
    assert SECRET.encode() not in raw
    assert all(32 <= byte < 127 or byte == 10 for byte in raw)
    _, fine, failed, last = run.events()
    assert fine["prompt_id"] == HOSTILE
    assert failed["error"] == "RuntimeError: cannot open https://***@host with ***"
    assert (failed["tokens"], failed["decode_s"]) == (0, None)
    assert last["exit_code"] == 1


def test_an_engines_own_counts_stand_where_steps_cannot_tell() -> None:
    lines: list[bytes] = []
    record = make_backend("draft_verify", unknown=["drafts"])
    events = Events(lines.append, [Tally(record, 3)])
    run = make_run(chunk_steps([1, 3, 2]))
    events.finished("eagle", run)
    events.finished("eagle", run.model_copy(update={"drafts": Drafts(rounds=2, judged=7, accepted=3)}))
    found = [{name: json.loads(line)[name] for name in ("drafted", "judged", "accepted")} for line in lines]
    assert found == [
        {"drafted": None, "judged": None, "accepted": None},
        {"drafted": None, "judged": 7, "accepted": 3},
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "SIGINT"),
        (Terminated(), "SIGTERM"),
        (BackendLostError("stage 1 has died\nits log"), "stage 1 has died"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: str(value),
)
def test_what_ends_a_run_early_is_its_last_event(error: BaseException, reason: str) -> None:
    lines: list[bytes] = []
    events = Events(lines.append, [Tally(make_backend(), 3)])
    events.finished("vanilla", make_run(vanilla_steps(3)))
    with pytest.raises(type(error)), events:
        raise error
    assert [json.loads(line)["event"] for line in lines] == ["request_finished", "run_interrupted"]
    assert json.loads(lines[-1])["reason"] == reason


def test_an_error_is_not_hidden_by_events_that_cannot_be_written() -> None:
    def full(_: bytes) -> None:
        raise InputError("the disk is full")

    with pytest.raises(BackendLostError), Events(full, []):
        raise BackendLostError("gone")


def test_a_file_of_events_is_continued_behind_its_last_whole_line(run: Runs) -> None:
    run("-b", "drafting", "--limit", "1")
    before = run.file.read_bytes()
    run.file.write_bytes(before + b'{"event": "request_fin')
    assert run("-b", "drafting").code == 0
    assert run.file.read_bytes().startswith(before)
    assert [event["event"] for event in run.events()].count("run_started") == 2


@pytest.mark.parametrize("content", ["# My notes\n", '{"event": 1}\n', "[]\n", '{"journal": "x"}\n', "no line break"])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(content: str, run: Runs) -> None:
    run.file.write_text(content)
    said = run("-b", "drafting")
    assert said.code == 2
    assert f"{run.file}: line 1 is not the header of a file of events" in said.err
    assert "Traceback" not in said.err
    assert run.file.read_text() == content


def test_a_place_that_takes_no_file_is_refused_before_anything_is_loaded(run: Runs) -> None:
    for place, why in ((run.folder, "is not a regular file"), (run.folder / "none" / "e.jsonl", "cannot be written")):
        said = run("-b", "drafting", events=place)
        assert said.code == 2
        assert why in said.err
    assert list(run.results.iterdir()) == []


def test_a_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with (
        EventFile(path),
        pytest.raises(InputError, match="another run is writing this now; give --events another file"),
        open_events(path),
    ):
        pass
