"""What goes wrong around a run: full disks, folders that vanish, a wall clock that is set back. Nothing is lost in
silence."""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

import spdbench_backends
from spdbench.backend import BackendContext, BackendOptions
from spdbench.judge.results.schema import read_result
from spdbench.types import EngineReport, GenerationRequest, Step
from tests.cli.run_helpers import Said, small_files, spdbench, write_suite
from tests.mock_backend import MockBackend

WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime", "time.gmtime"}
NAMING = {
    "cli/run/events.py": "when an event happened, for readers; durations in it are of the other clock",
    "cli/evaluate/session.py": "created",
    "cli/distill/command.py": "created",
    "cli/run/session.py": "created",
    "cli/project/profile.py": "created",
    "decoding/stored_costs.py": "created",
    "judge/gate/calibration.py": "created",
    "models/checkpoints/facts_cache.py": "files that were not used for so long are removed",
    "models/checkpoints/fast_tokenizer.py": "a chat template may ask for the date",
    "openai/transport/client.py": "a server's Retry-After may be a date",
}
"""Where the wall clock may be read: for what is called by it, and for dates from outside."""


class Server(MockBackend):
    """Answers by itself; `at_request` runs in the middle of the request of that number."""

    text_only = True
    at_request: ClassVar[dict[int, object]] = {}
    count: ClassVar[int] = 0
    suite: ClassVar[Path]

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:  # noqa: ARG002
        super().__init__()

    def account(self) -> EngineReport:
        return EngineReport(text="an answer")

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        Server.count += 1
        for number, step in enumerate(super().generate(request)):
            yield step
            if number == 2 and callable(act := Server.at_request.get(Server.count)):
                act()


@pytest.fixture(autouse=True)
def _server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("server", "tests.cli.test_faults:Server", "spdbench.backends")
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: {"server": point})
    Server.suite = write_suite(tmp_path, num_prompts=12)
    monkeypatch.setattr(Server, "count", 0)
    monkeypatch.setattr(Server, "at_request", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


def run(folder: Path, *words: str) -> Said:
    labels = ("-b", "one=server", "-b", "two=server")
    return spdbench("run", Server.suite, *labels, "--warmup", "0", "--threads", "1", "--results", folder, *words)


def finished(folder: Path) -> dict[str, list[str]]:
    """The prompts in the journals or the results, by label; a line that was cut does not count."""
    found = {}
    for label in ("one", "two"):
        path = folder / f"mini__{label}__served"
        if (journal := path.with_name(f"{path.name}.journal.jsonl")).exists():
            lines = journal.read_bytes().split(b"\n")[1:-1]
            found[label] = [json.loads(line)["run"]["prompt_id"] for line in lines if b'"run"' in line[:8]]
        elif path.with_name(f"{path.name}.json").exists():
            found[label] = [one.prompt_id for one in read_result(path.with_name(f"{path.name}.json")).runs]
    return found


@pytest.mark.parametrize("room", [0, 100, 1500, 4000, 7000, 9000])
def test_a_full_disk_keeps_what_was_finished_and_is_resumed(folder: Path, room: int) -> None:
    folder.mkdir()
    with small_files(room):
        said = run(folder)
    assert said.code == 2, said.err
    assert "the disk is full. What was finished is kept; make room, then run again with --resume" in said.err
    assert "Traceback" not in said.err
    assert not list(folder.glob("*.part"))
    before = finished(folder)
    said = run(folder, "--resume")
    assert said.code == 0, said.err
    after = finished(folder)
    assert {label: sorted(prompts) for label, prompts in after.items()} == dict.fromkeys(
        ("one", "two"), sorted(f"p{i}" for i in range(12))
    )
    for label, prompts in before.items():
        assert after[label][: len(prompts)] == prompts
    assert sorted(path.name for path in folder.iterdir()) == ["mini__one__served.json", "mini__two__served.json"]


def test_no_secret_is_in_results_journals_or_messages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash and a message that repeat a key, in a finished run and in one that was interrupted."""
    monkeypatch.setenv("SOME_API_KEY", "planted-key-1234567")

    def crash() -> None:
        raise OSError("refused: planted-key-1234567 at https://me:planted-word@host/x")

    def interrupt() -> None:
        raise KeyboardInterrupt

    Server.at_request = {5: crash, 30: interrupt}
    crashed = run(folder)
    assert crashed.code == 1
    assert "refused: *** at https://***@host/x" in crashed.err
    interrupted = run(folder, "--name", "again")
    assert interrupted.code == 130
    assert list(folder.glob("*.journal.jsonl"))
    for text in (crashed.out, crashed.err, interrupted.err, *(path.read_text() for path in folder.iterdir())):
        assert "planted" not in text


def test_what_a_backend_says_is_no_command_to_the_terminal(folder: Path) -> None:
    def crash() -> None:
        raise RuntimeError("\x1b[2J\x1b]0;owned\x07\u202e[bold]not bold[/bold]")

    Server.at_request = {5: crash}
    said = run(folder)
    assert said.code == 1
    assert r"RuntimeError: \x1b[2J\x1b]0;owned\x07\u202e[bold]not bold[/bold]" in said.err
    for text in (said.out, said.err):
        assert not set("\x1b\x07\u202e") & set(text)


def test_a_folder_that_is_removed_ends_the_run_at_the_next_request(folder: Path) -> None:
    Server.at_request = {7: lambda: shutil.rmtree(folder)}
    said = run(folder)
    assert said.code == 2
    assert "was deleted while the run was writing it" in said.err
    assert "Traceback" not in said.err
    assert Server.count == 7
    assert run(folder).code == 0


def test_a_folder_that_is_renamed_keeps_the_journals_to_resume_from(folder: Path) -> None:
    moved = folder.with_name("moved")
    Server.at_request = {7: lambda: folder.rename(moved)}
    said = run(folder)
    assert said.code == 2
    assert "cannot be written (No such file or directory)" in said.err
    assert "Traceback" not in said.err
    assert {label: len(prompts) for label, prompts in finished(moved).items()} == {"one": 12, "two": 12}
    Server.count, measured = 0, finished(moved)
    assert run(moved, "--resume").code == 0
    assert Server.count == 0
    assert finished(moved) == measured


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_measured(folder: Path) -> None:
    folder.mkdir(mode=0o555)
    places = [Path("/proc/results")] if os.access(folder, os.W_OK) else [folder, folder / "below"]
    for place in places:  # root may write anywhere but where the system lets nobody
        said = run(place)
        assert said.code == 2
        assert f"{place}: cannot be written" in said.err
        assert "Traceback" not in said.err
    assert Server.count == 0


class SetBack(datetime):
    """A wall clock that is set back by an hour whenever it is read."""

    readings: ClassVar[int] = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> SetBack:  # noqa: ARG003
        cls.readings += 1
        return cls(2026, 3, 29, 12, tzinfo=UTC) - timedelta(hours=cls.readings)


def test_a_wall_clock_that_is_set_back_changes_names_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdbench.cli.run.session.datetime", SetBack)
    readings = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(readings)))
    monkeypatch.setattr(time, "time_ns", lambda: next(readings) * 10**9)
    said = run(folder)
    assert said.code == 0, said.err
    for label, hour in (("one", 11), ("two", 10)):
        result = read_result(folder / f"mini__{label}__served.json")
        assert result.created == f"2026-03-29T{hour}:00:00+00:00"
        for one in result.runs:
            assert one.steps.t_ns == sorted(one.steps.t_ns)
            assert one.ttft_s is not None
            assert one.decode_s is not None
            assert 0 < one.ttft_s < 60
            assert 0 < one.decode_s < 60


def test_the_wall_clock_is_read_for_names_only() -> None:
    """Every duration and deadline is taken from a clock that cannot be set."""
    roots = [Path(spdbench_backends.__file__).parent, Path(spdbench_backends.__file__).parents[2] / "spdbench"]
    found = set()
    for root in roots:
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK:
                    found.add(path.relative_to(root).as_posix())
                elif isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert {name.name for name in node.names} <= {"perf_counter", "perf_counter_ns", "monotonic"}
    assert found == NAMING.keys()
