"""The GPU benchmark, rehearsed: what it measures, what it drops, and what it writes after every part."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.shared import gpu_sides
from benchmarks.shared.gpu_sides import (
    BASE,
    REAL,
    REHEARSAL,
    LoadedSide,
    RandomTarget,
    Sample,
    Side,
    config_of,
    run_part,
)

FOUND: dict[str, Any] = {"machine": "one", "rows": [{"method": "vanilla", "ms": 1}], "notes": []}


def run_gpu(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def target() -> RandomTarget:
    return RandomTarget("tiny", REHEARSAL)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that ran; `spd-tiny` fails."""
    names: list[str] = []

    def run_apart(name: str, out: Path, limit_s: float, *, rehearse: bool) -> str:
        assert rehearse
        assert limit_s > 0
        names.append(name)
        if name == "spd-tiny":
            return "exit code 1"
        (out / f"{name}.json").write_text(json.dumps(FOUND))
        return ""

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    return names


@pytest.mark.parametrize(
    ("shape", "least", "most"), [("0.6B", 0.55, 0.65), ("1.7B", 1.6, 1.8), ("4B", 3.8, 4.2), ("8B", 7.9, 8.4)]
)
def test_shapes_hold_as_many_parameters_as_their_names_say(shape: str, least: float, most: float) -> None:
    config = config_of(shape)
    queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * kv + 3 * config.intermediate_size)
    total = config.num_layers * layer + config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    assert least < total / 1e9 < most


def test_the_methods_that_matter_most_come_first() -> None:
    names = REAL.parts()
    assert names[:4] == ["vanilla-0.6B", "spd-0.6B", "eagle-0.6B", "vanilla-4B"]
    assert len(names) == len(set(names)) == 12


@torch.inference_mode()
def test_a_random_model_has_the_same_numbers_at_every_reading(target: RandomTarget) -> None:
    again = RandomTarget("tiny", REHEARSAL).decoder
    for layer in again.layers:
        assert torch.equal(again.weights[layer].qkv.plain(), target.decoder.weights[layer].qkv.plain())
        assert bool((again.weights[layer].post_norm.weight_M == 1).all())
    assert not torch.equal(again.weights[0].qkv.plain(), again.weights[1].qkv.plain())


@pytest.mark.parametrize("method", ["spd", "eagle", "medusa"])
def test_acceptance_is_forced_on_drafters_at_work_and_only_whole_trees_count(target: RandomTarget, method: str) -> None:
    for side in gpu_sides.sides_of(method, REHEARSAL):
        loaded = LoadedSide(side, target, REHEARSAL)
        wrong, right = loaded.measure(0.0), loaded.measure(1.0)
        assert wrong.num_tokens >= REHEARSAL.tokens <= right.num_tokens
        assert sum(step.accepted for step in wrong.steps) == 0
        assert all(step.accepted == step.judged for step in right.steps)
        if method != "spd":
            assert len({step.drafted for step in (*wrong.steps, *right.steps)}) == 1
            assert {len(step.token_ids) for step in wrong.steps} == {1}


def test_one_side_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = LoadedSide.measure, 0
    unknown = Side("vanilla", "unknown", "off", {"graphs": "never"})

    def breaks(self: LoadedSide, acceptance: float | None) -> Sample:
        nonlocal calls
        calls += self.side is not BASE
        if calls == 2:
            raise RuntimeError("no more of it")
        return measure(self, acceptance)

    monkeypatch.setattr(LoadedSide, "measure", breaks)
    monkeypatch.setattr(
        gpu_sides, "sides_of", lambda *_: [unknown, Side("vanilla", "breaks", "off", {"graphs": "off"})]
    )
    found = run_part("vanilla-tiny", REHEARSAL)
    assert [(row["method"], row["graphs"]) for row in found["rows"]] == [("vanilla", "on")]
    assert [note.splitlines()[0] for note in found["notes"]] == [
        "vanilla unknown graphs=off: dropped",
        "vanilla breaks graphs=off: dropped",
    ]
    assert "Traceback" in found["notes"][1]
    assert found["notes"][1].endswith("RuntimeError: no more of it")


def test_a_side_that_fails_later_keeps_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all sides do after an error that leaves the device unusable."""
    measure, calls = LoadedSide.measure, 0

    def breaks(self: LoadedSide, acceptance: float | None) -> Sample:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("the device is gone")
        return measure(self, acceptance)

    monkeypatch.setattr(LoadedSide, "measure", breaks)
    found = run_part("vanilla-tiny", replace(REHEARSAL, rounds=3))
    assert [row["graphs"] for row in found["rows"]] == ["on", "off"]
    assert len(found["notes"]) == 2
    assert calls == 7, "none is tried again"


def test_a_part_without_its_baseline_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sides, "BASE", replace(BASE, options={"graphs": "never"}))
    with pytest.raises(RuntimeError, match=r"vanilla graphs=on: dropped\n"):
        run_part("vanilla-tiny", REHEARSAL)


def test_the_table_is_there_after_every_part_and_the_same_command_goes_on(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    deadline = time.monotonic() + 3600
    assert gpu.run_parts(["vanilla-tiny"], REHEARSAL, tmp_path, deadline) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "## one\n\n| method | ms |\n| --- | --- |\n| vanilla | 1 |" in text
    assert "Not measured yet: spd-tiny, eagle-tiny, medusa-tiny." in text
    assert gpu.run_parts([], REHEARSAL, tmp_path, deadline) == 1
    assert ran == ["vanilla-tiny", "spd-tiny", "eagle-tiny", "medusa-tiny"]
    assert "spd-tiny: exit code 1" in capsys.readouterr().out
    assert "Not measured yet: spd-tiny." in (tmp_path / "gpu.md").read_text()
    assert gpu.run_parts([], REHEARSAL, tmp_path, deadline) == 1
    assert ran[4:] == ["spd-tiny"]
    gpu.run_parts(["eagle-tiny"], REHEARSAL, tmp_path, deadline)
    assert ran[5:] == ["eagle-tiny"], "asked for by name, also if it is done"


def test_no_part_begins_when_too_little_of_the_budget_is_left(tmp_path: Path, ran: list[str]) -> None:
    assert gpu.run_parts([], REHEARSAL, tmp_path, time.monotonic() + gpu.MIN_S - 1) == 1
    assert ran == []
    assert "Not measured yet: vanilla-tiny" in (tmp_path / "gpu.md").read_text()


def test_two_machines_never_share_a_table_and_notes_are_shown() -> None:
    other = {**FOUND, "machine": "two", "notes": ["spd: dropped\nTraceback"]}
    here, there = gpu.markdown([FOUND, other], []).split("## two")
    assert here.count("| vanilla | 1 |") == there.count("| vanilla | 1 |") == 1
    assert "```\nspd: dropped\nTraceback\n```" in there


def test_a_part_that_breaks_or_takes_too_long_says_so(tmp_path: Path) -> None:
    why = gpu.run_apart("vanilla-unknown", tmp_path, 60, rehearse=True)
    assert why.startswith("exit code 1\n")
    assert "KeyError: 'unknown'" in why
    assert gpu.run_apart("vanilla-tiny", tmp_path, 0.1, rehearse=True) == "out of time after 0 s"
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsed_part_is_in_both_files(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--rehearse", "--parts", "vanilla-tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["graphs"] for row in json.loads((tmp_path / "vanilla-tiny.json").read_text())["rows"]] == ["on", "off"]
    assert "none of these numbers means anything" in (tmp_path / "gpu.md").read_text()


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    without = """
import sys
class Without:
    def find_spec(self, name, *_):
        if name in ("pydantic", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util, runpy
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in ("pydantic", "torch") else found(name, *more)
sys.meta_path.insert(0, Without())
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
    command = [sys.executable, "-c", without, "--out", str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(r"not installed: torch>=[\d.]+, pydantic>=[\d.]+\. Try: \S+ -m pip install 'torch>=", done.stderr)
    assert not (tmp_path / "out").exists()


def test_what_parts_import_is_what_is_looked_for() -> None:
    """Of the packages that the project declares; and the backends come from the checkout."""
    declared = {"accelerate", "click", "gguf", "numba", "numpy", "pydantic", "safetensors", "tabulate", "torch"}
    script = """
import sys
import benchmarks.gpu
from benchmarks.shared import gpu_sides as s
for name in s.REHEARSAL.parts():
    s.run_part(name, s.REHEARSAL)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert declared & set(done.stdout.split()) <= set(gpu.NEEDED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no GPU that torch can use; --rehearse runs all parts on the CPU" in done.stderr
