"""The GPU benchmark's own ways: parts in processes, what is done stays done, and a report of whatever there is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import SHAPES, random_decoder, random_source, stages_of
from benchmarks.gpu_parts import REAL, REHEARSAL, Found
from benchmarks.sides import Goal

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")


def chosen(out: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "fresh": False, "rehearse": True, **more})


def run_gpu(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shapes_hold_as_many_parameters_as_their_names_say() -> None:
    for name, least, most in (
        ("0.6B", 0.55e9, 0.65e9),
        ("1.7B", 1.6e9, 1.8e9),
        ("4B", 3.8e9, 4.2e9),
        ("8B", 7.9e9, 8.4e9),
    ):
        shape = SHAPES[name]
        queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        layer = shape.hidden_size * (2 * queries + 2 * kv + 3 * shape.intermediate_size)
        total = shape.num_layers * layer + shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
        assert least < total < most


def test_layers_made_for_a_stage_are_those_of_the_whole_model() -> None:
    shape = SHAPES["tiny"]
    whole = random_decoder(shape, torch.float32, CPU)
    stages = stages_of(shape, 3)
    assert [len(layers) for layers in stages] == [3, 3, 2]
    parts = [random_source(shape, "float32").load(layers, "cpu") for layers in stages]
    for part, layers in zip(parts, stages, strict=True):
        for layer in layers:
            assert torch.equal(part.weights[layer].qkv.plain(), whole.weights[layer].qkv.plain())
    assert whole.head is not None
    assert parts[2].head is not None
    assert torch.equal(parts[2].head.plain(), whole.head.plain())
    assert stages_of(shape, 4, head_layers=2) == (range(3), range(3, 5), range(5, 7), range(7, 8))


def test_parts_that_matter_most_come_first_and_none_twice() -> None:
    names = list(gpu.parts(REAL))
    assert names[:5] == ["machine", "vanilla-0.6B", "streams-0.6B", "vanilla-4B", "generate-0.6B"]
    assert len(names) == len(set(names)) == 16
    assert {"streams-8B", "processes-4B", "eagle-4B", "medusa-0.6B", "trace-0.6B"} <= set(names)


def test_what_is_done_is_not_run_again_unless_settings_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    class Process:
        pid, returncode = 0, 1

        def __init__(self, command: list[str], **_: object) -> None:
            ran.append(command[command.index("--part") + 1])

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:  # noqa: ARG002
            return "it broke", ""

    monkeypatch.setattr("subprocess.Popen", Process)
    part = gpu.Part("mine", 10, lambda *_: Found([], []))
    gpu.run_here(part, REHEARSAL, tmp_path)
    gpu.run_part(part, REHEARSAL, chosen(tmp_path))
    assert ran == []
    assert "mine: done before" in capsys.readouterr().out
    gpu.run_part(part, replace(REHEARSAL, tokens=99), chosen(tmp_path))
    gpu.run_part(part, replace(REHEARSAL, tokens=99), chosen(tmp_path))
    assert ran == ["mine", "mine"], "a failed one is run again"
    found = json.loads((tmp_path / "mine.json").read_text())
    assert (found["status"], found["notes"]) == ("failed", ["it broke"])


def test_a_part_that_hangs_is_ended_and_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleep(subprocess.Popen[str]):
        def __init__(self, _: object, **more: Any) -> None:
            super().__init__(["sleep", "60"], **more)

    monkeypatch.setattr("subprocess.Popen", Sleep)
    gpu.run_part(gpu.Part("slow", 0.2, lambda *_: Found([], [])), REHEARSAL, chosen(tmp_path))
    found = gpu.read(tmp_path, "slow")
    assert found is not None
    assert found["status"] == "out of time"
    assert "## slow: out of time" in gpu.markdown([found], REHEARSAL)


def test_the_report_shows_rows_notes_and_goals(tmp_path: Path) -> None:
    found = Found([{"side": "a", "ms": 1.5}, {"side": "b", "P": 0.9}], [Goal("speed", 2.0, at_least=3.0)], ["a note"])
    gpu.run_here(gpu.Part("mine", 10, lambda *_: found), REHEARSAL, tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert gpu.read(tmp_path, "broken") is None
    part = gpu.read(tmp_path, "mine")
    assert part is not None
    text = gpu.markdown([part], REHEARSAL)
    assert "none of these numbers means anything" in text
    assert "| side   | ms   | P   |" in text
    assert "- a note" in text
    assert "speed: 2.00 (target: at least 3; missed)" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no GPU that torch can use; --rehearse runs all parts on the CPU" in done.stderr


def test_a_rehearsed_part_leaves_a_file_that_stands_alone(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--rehearse", "--parts", "streams-tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "streams-tiny.json").read_text())
    assert found["status"] == "done", found["notes"]
    assert {row["side"] for row in found["rows"]} == {"vanilla", "n=2", "n=4", "n=8", "n=4, light end"}
    assert [row["drafts"] for row in found["rows"]].count("head") == 3
    assert "streams-tiny: done" in (tmp_path / "gpu.md").read_text()


@needs_gpu
def test_the_machine_is_measured(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--parts", "machine")
    assert done.returncode == 0, done.stdout + done.stderr
