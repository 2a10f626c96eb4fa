"""The GPU benchmark's own ways: parts in processes, what is done stays done, and a report of whatever there is."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import gpu, gpu_drafts, gpu_parts, gpu_running
from benchmarks.gpu_models import SHAPES, random_decoder, random_source, stages_of
from benchmarks.gpu_parts import REAL, REHEARSAL, Found, Settings, Turn, guarded_turns
from benchmarks.gpu_processes import nccl
from benchmarks.sides import Goal
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.synthetic import parse_drafter, synthetic_drafts
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.tree_builder import chain_builder
from spdbench_backends.medusa.build import build_medusa, random_medusa
from spdbench_backends.medusa.drafter import MedusaDrafter

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")


IDENTITY = {"gpu": "none", "python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0", "sources": "abc"}
FOUND: dict[str, Any] = {"rows": [{"ms": 1}], "goals": [], "notes": []}
SLEEPER = """
import os, subprocess, sys, time
print("asleep", flush=True)
below = subprocess.Popen(["sleep", "60"])
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {below.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(60)
"""


def never(*_: object, **__: object) -> NoReturn:
    raise AssertionError("must not be called")


def pretend(monkeypatch: pytest.MonkeyPatch, ends: Mapping[str, Sequence[tuple[Any, Any]]]) -> list[str]:
    """Each part's processes end one after the other with an exit code (None: out of time) or an exception, and with
    what they found or nothing. The list is of the parts that ran."""
    ran: list[str] = []

    def run_apart(command: list[str], limit_s: float) -> tuple[int | None, str]:  # noqa: ARG001
        name, file = command[command.index("--part") + 1 :][:2]
        code, found = ends[name][ran.count(name)]
        ran.append(name)
        if isinstance(code, BaseException):
            raise code
        if found:
            Path(file).write_text(json.dumps(found))
        return code, "it broke"

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    return ran


def run(
    out: Path,
    names: Sequence[str],
    *,
    settings: Settings = REHEARSAL,
    identity: Mapping[str, str] = IDENTITY,
    fresh: bool = False,
) -> gpu.Results:
    results = gpu.Results(out, settings, identity, names)
    gpu.run_parts([gpu.Part(name, 10, never) for name in names], results, time.monotonic() + 60, fresh=fresh)
    return results


def gone(file: Path, within_s: float = 0.5) -> bool:
    """The processes that `file` names have ended, or are dead and waiting to be buried."""

    def lives(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    deadline, pids = time.monotonic() + within_s, file.read_text().split()
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(lives, pids))


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
    kinds = list(dict.fromkeys(name.split("-")[0] for name in names))
    assert kinds == [
        "machine", "vanilla", "generate", "streams", "eagle", "medusa", "processes", "nccl", "trace", "compiled",
    ]  # fmt: skip
    assert names[:5] == ["machine", "vanilla-0.6B", "vanilla-4B", "generate-0.6B", "streams-0.6B"]
    assert len(names) == len(set(names)) == 20
    assert {"streams-8B", "processes-n8-4B", "eagle-4B", "medusa-4B", "compiled-4B"} <= set(names)


def test_what_is_done_is_not_run_again_unless_something_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = pretend(monkeypatch, {"mine": [(0, FOUND)] * 9})
    run(tmp_path, ["mine"])
    run(tmp_path, ["mine"])
    assert ran == ["mine"]
    assert "mine: done before" in capsys.readouterr().out
    run(tmp_path, ["mine"], settings=replace(REHEARSAL, tokens=99))
    for changed in ({"gpu": "NVIDIA H200"}, {"torch": "9.9"}, {"sources": "0123"}):
        run(tmp_path, ["mine"], identity={**IDENTITY, **changed})
    assert ran == ["mine"] * 5, "each change counts, and by itself"
    run(tmp_path, ["mine"], fresh=True)
    assert ran == ["mine"] * 6


def test_two_cards_never_stand_in_one_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"mine": [(0, FOUND)] * 2, "other": [(0, FOUND)]})
    settings = replace(REHEARSAL, device="cuda:0")
    run(tmp_path, ["mine", "other"], settings=settings, identity={**IDENTITY, "gpu": "NVIDIA H100"})
    results = run(tmp_path, ["mine"], settings=settings, identity={**IDENTITY, "gpu": "NVIDIA H200"})
    here, there = results.markdown().split("## NVIDIA H100")
    assert "## NVIDIA H200" in here
    assert here.count("### mine: done") == there.count("### mine: done") == there.count("### other: done") == 1
    assert "### other" not in here


def test_what_failed_is_run_again_after_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = pretend(monkeypatch, {"first": [(1, None), (0, FOUND)], "second": [(0, FOUND)]})
    results = run(tmp_path, ["first"])
    found = results.find("first")
    assert found is not None
    assert (found["status"], found["notes"]) == ("failed", ["exit code 1\nit broke"])
    assert "Not run yet: second." not in results.markdown()
    results = run(tmp_path, ["first", "second"])
    assert ran == ["first", "second", "first"]
    assert results.done("first")


def test_both_reports_are_there_after_every_part_and_a_stopped_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = pretend(monkeypatch, {"first": [(0, FOUND)], "second": [(KeyboardInterrupt(), None), (0, FOUND)]})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["first", "second"])
    assert [each["part"] for each in json.loads((tmp_path / "gpu.json").read_text())["records"]] == ["first"]
    text = (tmp_path / "gpu.md").read_text()
    assert "### first: done" in text
    assert "Not run yet: second." in text
    run(tmp_path, ["first", "second"])
    assert ran == ["first", "second", "second"]
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_no_part_begins_when_too_little_of_the_budget_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run_apart(_: list[str], limit_s: float) -> tuple[int | None, str]:
        limits.append(limit_s)
        return None, ""

    monkeypatch.setattr(gpu, "run_apart", run_apart)
    results = gpu.Results(tmp_path, REHEARSAL, IDENTITY, ["long", "short", "brief"])
    long, short, brief = (gpu.Part(name, s, never) for name, s in (("long", 300), ("short", 80), ("brief", 10)))
    assert gpu.run_parts([long, short, brief], results, time.monotonic() + 60) == ["long"]
    assert 50 < limits[0] <= 60, "of a part that may begin no more than what is left"
    assert limits[1:] == [10]
    assert [results.failed(name) for name in ("long", "short", "brief")] == [False, False, True]
    assert "### short: out of budget" in results.markdown()


def test_what_was_measured_stays_when_its_process_or_a_later_one_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {"mine": [(-11, FOUND), (1, None), (None, None), (0, {**FOUND, "rows": [{"ms": 2}]})]})
    results = run(tmp_path, ["mine"])
    found = results.find("mine")
    assert found is not None
    assert (found["status"], found["rows"]) == ("done", FOUND["rows"])
    assert found["notes"] == ["exit code -11, after all was measured\nit broke"]
    results = run(tmp_path, ["mine"], fresh=True)
    results = run(tmp_path, ["mine"], fresh=True)
    found = results.find("mine")
    assert found is not None
    assert (found["status"], found["rows"]) == ("done", FOUND["rows"])
    assert found["notes"][1:4] == ["run again: failed", "exit code 1\nit broke", "run again: out of time"]
    results = run(tmp_path, ["mine"], fresh=True)
    found = results.find("mine")
    assert found is not None
    assert (found["rows"], found["notes"]) == ([{"ms": 2}], [])


def test_a_command_out_of_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code, said = gpu_running.run_apart([sys.executable, "-c", SLEEPER, str(tmp_path / "pid")], 2)
    assert (code, said) == (None, "asleep\n")
    assert gone(tmp_path / "pid")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_when_the_benchmark_is_stopped(tmp_path: Path, number: int) -> None:
    benchmark = """
import os, sys
from benchmarks import gpu_running
gpu_running.raise_when_told_to_stop()
gpu_running.run_apart([sys.executable, "-c", *sys.argv[1:], str(os.getpid())], 60)
"""
    child = f"import sys; from benchmarks import gpu_running; gpu_running.end_with(int(sys.argv[2]))\n{SLEEPER}"
    process = subprocess.Popen([sys.executable, "-c", benchmark, child, str(tmp_path / "pid")])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == (128 + number if number == signal.SIGTERM else process.returncode)
    assert gone(tmp_path / "pid", within_s=10 if number == signal.SIGKILL else 0.5)


def test_one_side_that_fails_leaves_the_others() -> None:
    calls = Counter[str]()

    def side(name: str, breaks_at: int = 0) -> Turn:
        calls[name] += 1
        if calls[name] == breaks_at:
            raise RuntimeError(f"no {name} any more")
        return Turn(1.0)

    sides = {name: partial(side, name, at) for name, at in (("good", 0), ("bad", 1), ("late", 3))}
    turns, notes = guarded_turns(sides, 4, needed=["good"])
    assert {name: len(found) for name, found in turns.items()} == {"good": 4}
    assert calls == {"good": 5, "bad": 1, "late": 3}
    assert [note.splitlines()[0] for note in notes] == ["bad: dropped, it failed", "late: dropped, it failed"]
    assert all("Traceback" in note for note in notes)
    assert notes[1].endswith("RuntimeError: no late any more")
    with pytest.raises(RuntimeError, match="no good any more"):
        guarded_turns({"good": partial(side, "good", 6), "fine": partial(side, "fine")}, 1, needed=["good"])


def test_a_side_that_cannot_be_made_leaves_the_others_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> NoReturn:
        raise ValueError("no memory for it")

    monkeypatch.setattr(gpu_parts, "transformers_side", break_down)
    found = gpu_parts.generate("tiny", REHEARSAL)
    assert [row["side"] for row in found.rows] == ["vanilla with graphs"]
    assert found.goals == []
    assert "Traceback" in found.notes[0]
    assert found.notes[0].endswith("ValueError: no memory for it")


@pytest.mark.parametrize("forced", [0.0, 0.9, 1.0])
def test_only_rounds_of_whole_trees_are_counted(forced: float) -> None:
    decoder, tokens = random_decoder(SHAPES["tiny"], torch.float32, CPU), 7
    tree = chain_builder(gpu_drafts.MOST_LEVELS, CPU)
    weights = build_medusa(random_medusa(decoder, gpu_drafts.MOST_LEVELS, 0), decoder)
    rooms = []

    class Watched(MedusaDrafter):
        def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
            rooms.append(max_levels)
            return super().propose(max_levels, sampler)

    request = replace(REHEARSAL.request(SHAPES["tiny"]), max_new_tokens=tokens)
    drafts = synthetic_drafts(parse_drafter(f"forced:{forced}"), 0, decoder, request)
    new = partial(Watched, weights, decoder, tree)
    turn = gpu_drafts.turn(decoder, new, drafts, gpu_drafts.longer(request), tokens)
    assert sum(len(step.token_ids) for step in turn.steps) >= tokens
    assert len(rooms) == 1 + len(turn.steps), "the first round is not counted"
    assert min(rooms) >= gpu_drafts.MOST_LEVELS


def test_nccl_is_skipped_without_a_gpu_and_says_why() -> None:
    found = nccl(REHEARSAL)
    assert [(row["transport"], row["call"]) for row in found.rows] == [("gloo", "all-reduce")]
    assert "nccl: skipped, there is no GPU" in found.notes[0]


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    without = """
import sys
class Without:
    def find_spec(self, name, *_):
        if name in ("pydantic", "tabulate", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util, runpy
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in ("pydantic", "tabulate", "torch") else found(name, *more)
sys.meta_path.insert(0, Without())
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
    command = [sys.executable, "-c", without, "--out", str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    pattern = r"not installed: torch>=[\d.]+, pydantic>=[\d.]+, tabulate>=[\d.]+\. Try: \S+ -m pip install 'torch>="
    assert re.search(pattern, done.stderr)
    assert not (tmp_path / "out").exists()


def test_what_parts_import_is_what_is_looked_for() -> None:
    """Of the packages that the project declares."""
    gpu.parts(REHEARSAL)
    declared = {"accelerate", "click", "gguf", "numba", "numpy", "pydantic", "safetensors", "tabulate", "torch"}
    imported = "import benchmarks.gpu as gpu, benchmarks.gpu_parts as p, sys; gpu.parts(p.REAL); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert declared & set(done.stdout.split()) <= set(gpu_running.NEEDED)


def test_the_card_is_asked_for_elsewhere_and_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", never)
    monkeypatch.setattr(torch.cuda, "is_available", never)
    monkeypatch.setattr(gpu_running, "GPU", "print('NVIDIA H100')")
    assert gpu_running.identity(gpu_running.gpu_name())["gpu"] == "NVIDIA H100"
    for broken in ("raise RuntimeError", "import time; time.sleep(60)"):
        monkeypatch.setattr(gpu_running, "GPU", broken)
        assert gpu_running.gpu_name(limit_s=1) == ""


def test_sources_differ_with_what_is_measured_alone(tmp_path: Path) -> None:
    for path in ("spdbench/a.py", "backends/b/c.py", "benchmarks/gpu_parts.py", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    before = gpu_running.sources(tmp_path)
    (tmp_path / "README.md").write_text("2")
    assert gpu_running.sources(tmp_path) == before
    (tmp_path / "backends/b/c.py").write_text("2")
    assert gpu_running.sources(tmp_path) != before


def test_the_report_shows_rows_notes_and_goals(tmp_path: Path) -> None:
    found = Found([{"side": "a", "ms": 1.5}, {"side": "b", "P": 0.9}], [Goal("speed", 2.0, at_least=3.0)], ["a note"])
    gpu.run_here(gpu.Part("mine", 10, lambda *_: found), REHEARSAL, tmp_path, tmp_path / "found.json")
    results = gpu.Results(tmp_path, REHEARSAL, IDENTITY, ["mine"])
    results.keep("mine", "done", 1.0, json.loads((tmp_path / "found.json").read_text()))
    text = (tmp_path / "gpu.md").read_text()
    assert "none of these numbers means anything" in text
    assert "| side   | ms   | P   |" in text
    assert "- a note" in text
    assert "speed: 2.00 (target: at least 3; missed)" in text


def test_results_that_cannot_be_read_are_put_aside(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("{")
    gpu.Results(tmp_path, REHEARSAL, IDENTITY, []).write()
    assert (tmp_path / "gpu.old").read_text() == "{"
    assert json.loads((tmp_path / "gpu.json").read_text())["records"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no GPU that torch can use; --rehearse runs all parts on the CPU" in done.stderr


def test_streams_are_rehearsed_with_every_cut_and_with_a_head() -> None:
    found = gpu_parts.streams("tiny", replace(REHEARSAL, tokens=8))
    assert found.notes == []
    assert {row["side"] for row in found.rows} == {"vanilla", "n=2", "n=4", "n=8", "n=4, light end"}
    assert [row["drafts"] for row in found.rows].count("head") == 3


def test_a_rehearsed_part_is_in_both_reports(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--rehearse", "--parts", "nccl")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert (found["status"], len(found["rows"])) == ("done", 1)
    assert "### nccl: done" in (tmp_path / "gpu.md").read_text()


@needs_gpu
def test_the_machine_is_measured(tmp_path: Path) -> None:
    done = run_gpu("--out", str(tmp_path), "--parts", "machine", "nccl")
    assert done.returncode == 0, done.stdout + done.stderr
