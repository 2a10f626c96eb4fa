"""Runs that are killed and resumed: no finished request is lost, and none is measured twice."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from spdbench.judge.results.schema import read_result
from tests.processes.runs import SECONDS, Process


@pytest.fixture
def process(tiny_model: Path, tmp_path: Path) -> Process:
    return Process(tiny_model, tmp_path, "-o", "spd.executor=inline")


def test_killed_and_resumed_every_prompt_is_there_once(process: Process) -> None:
    for num_runs in (5, 30):
        code, _ = process.stop_after(num_runs, signal.SIGKILL, *(["--resume"] if num_runs > 5 else []))
        assert code == -signal.SIGKILL
    kept = process.lines()
    assert 30 <= kept < 160
    assert not list(process.results.glob("*.json"))
    first = [path.read_bytes() for path in process.journals]
    code, err = process.finish("--resume")
    assert code == 0, err
    for label, before in zip(("vanilla", "spd"), first, strict=True):
        result = read_result(process.results / f"mini__{label}__tiny-llama.json")
        assert set(Counter(run.key for run in result.runs).values()) == {1}
        assert len(result.runs) == 80
        finished = [
            json.loads(line)["run"]
            for line in before.splitlines()
            if line.startswith(b'{"run"') and line.endswith(b"}")
        ]
        assert [run.model_dump(mode="json") for run in result.runs][: len(finished)] == finished
    assert not list(process.results.glob("*.jsonl"))


def test_an_interrupted_run_leaves_what_is_finished_as_a_result(process: Process) -> None:
    code, err = process.stop_after(6, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert "--resume goes on from there" in err
    partial = read_result(process.results / "mini__vanilla__tiny-llama.json")
    assert 3 <= len(partial.runs) < 80
    process.stop_after(30, signal.SIGINT, "--resume")
    assert len(partial.runs) < len(read_result(process.results / "mini__vanilla__tiny-llama.json").runs) < 80
    code, err = process.finish("--resume")
    assert code == 0, err
    assert len(read_result(process.results / "mini__vanilla__tiny-llama.json").runs) == 80


def test_an_interrupted_run_never_replaces_a_finished_one(process: Process) -> None:
    assert process.finish("--limit", "2")[0] == 0
    file = process.results / "mini__vanilla__tiny-llama.json"
    before = file.read_bytes()
    process.stop_after(6, signal.SIGINT)
    assert file.read_bytes() == before


def test_resuming_with_other_options_is_refused_and_changes_nothing(process: Process) -> None:
    process.stop_after(4, signal.SIGKILL)
    before = [path.read_bytes() for path in process.journals]
    code, err = process.finish("--resume", "--max-new-tokens", "9")
    assert code == 2
    assert "max_new_tokens 40, now 9" in err
    assert "Traceback" not in err
    assert [path.read_bytes() for path in process.journals] == before


def test_two_runs_on_the_same_files_do_not_mix(process: Process) -> None:
    first = process.start()
    try:
        process.wait_for(1, first)
        first.send_signal(signal.SIGSTOP)  # otherwise it may end before the other starts
        code, err = process.finish()
    finally:
        first.kill()
        first.communicate(timeout=SECONDS)
    assert code == 2
    assert "another run is writing this now" in err


def test_sigterm_ends_a_run_as_ctrl_c_does(process: Process) -> None:
    code, err = process.stop_after(6, signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in err
    assert read_result(process.results / "mini__vanilla__tiny-llama.json").runs


def test_repeated_ctrl_c_does_not_cut_the_result_short(process: Process) -> None:
    running = process.start()
    process.wait_for(6, running)
    for _ in range(5):
        running.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert read_result(process.results / "mini__vanilla__tiny-llama.json").runs


def test_events_are_readable_line_by_line_after_a_kill_and_continued(process: Process) -> None:
    file = process.results.parent / "events.jsonl"
    process.stop_after(6, signal.SIGKILL, "--events", str(file))
    before = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    assert [event["event"] for event in before[:6]] == ["run_started", *["request_finished"] * 5]
    process.stop_after(20, signal.SIGINT, "--resume", "--events", str(file))
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert events[: len(before)] == before
    second = next(event for event in events[1:] if event["event"] == "run_started")
    assert sum(backend["done"] for backend in second["backends"]) >= 6
    assert (events[-1]["event"], events[-1]["reason"]) == ("run_interrupted", "SIGINT")


def test_ctrl_c_leaves_a_terminal_without_bars_and_with_its_cursor(process: Process) -> None:
    process.environment |= {"TERM": "xterm", "CI": "", "COLUMNS": "80"}
    controller, terminal = os.openpty()
    running = process.start(stderr=terminal)
    os.close(terminal)
    with open(controller, "rb", buffering=0) as screen, running:
        shown, interrupted = b"", False
        with suppress(OSError):  # EIO: the other end is closed
            while piece := screen.read(4096):
                shown += piece
                if not interrupted and re.search(
                    rb"(?<!\d)[1-9]\d*/160", shown
                ):  # a count that is drawn; not each one is
                    running.send_signal(signal.SIGINT)
                    interrupted = True
        assert running.wait(SECONDS) == 130
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    after = shown.split(b"\x1b[2K")[-1]
    assert "━".encode() not in after
    assert b"Interrupted." in after
