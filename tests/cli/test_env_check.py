"""`spdbench env --check`: what would fail in a long run, found by taking it away."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.cli import readiness
from spdbench.judge.results.machine_load import MachineLoad
from spdbench.measure.machine_watch import MachineWatch
from spdbench.models.checkpoints import embedded
from spdbench.models.target import load_target
from spdbench.output_files import write_obstacle
from tests.builders import make_load
from tests.cli.run_helpers import Said, spdbench

NAMES = [
    *("results", "cache", "locks", "model", "kernels", "threads", "machine", "gpu", "backends", "sandbox", "extras"),
]


@pytest.fixture(autouse=True)
def _quiet_machine(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all is well, and a watch that does not wait."""
    own_cache.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readiness, "WATCHED_S", 0.0)
    monkeypatch.setattr(MachineWatch, "load", lambda *_: make_load(0.0))
    monkeypatch.setattr(readiness, "available_bytes", lambda _: 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))


@pytest.fixture
def check(tiny_model: Path) -> Callable[..., tuple[int, dict[str, dict[str, str]]]]:
    """The exit code, and each check's finding by its name."""

    def run(*words: str | Path) -> tuple[int, dict[str, dict[str, str]]]:
        said = spdbench("env", "--check", "--json", *(words or ("-m", tiny_model)))
        return said.code, {each["name"]: each for each in json.loads(said.out)}

    return run


Check = Callable[..., tuple[int, dict[str, dict[str, str]]]]


def test_all_is_well_and_nothing_is_made(check: Check, tmp_path: Path) -> None:
    code, found = check()
    assert [*found] == NAMES
    assert {name: each["text"] for name, each in found.items() if each["state"] == "fail"} == {}
    assert code == 0
    assert found["model"]["state"] == found["results"]["state"] == "ok"
    assert not (tmp_path / "results").exists()


def test_for_people_each_check_is_a_line_that_fits(tiny_model: Path) -> None:
    said: Said = spdbench("env", "--check", "-m", tiny_model)
    lines = said.out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines if not line.startswith(" ")] == NAMES
    assert max(map(len, lines)) <= 80 + len(str(tiny_model))  # a path is not broken


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def no_memory(free: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(readiness, "available_bytes", lambda _: free)


def no_disk(free: float) -> Callable[[pytest.MonkeyPatch], None]:
    usage = shutil._ntuple_diskusage(10**12, 0, int(free))
    return lambda patch: patch.setattr(shutil, "disk_usage", lambda _: usage)


def busy(**parts: Any) -> Callable[[pytest.MonkeyPatch], None]:
    load: MachineLoad = make_load(0.0).model_copy(update=parts)
    return lambda patch: patch.setattr(MachineWatch, "load", lambda *_: load)


def no_obstacle_but(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """`name` cannot be written."""
    real = write_obstacle
    refused = PermissionError(13, "Permission denied")
    return lambda patch: patch.setattr(
        readiness, "write_obstacle", lambda folder: refused if folder.name == name else real(folder)
    )


def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "has_cpu_kernels", lambda *_: False)


def little_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "cpu_quota", lambda: 0.5)


def driver_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda path: str(path).startswith("/proc/driver/nvidia") or real(path))


def broken_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("never thought of")

    monkeypatch.setattr(readiness, "usable_cores", crash)


@pytest.mark.parametrize(
    ("name", "take_away", "state", "words"),
    [
        ("results", no_obstacle_but("work"), "fail", "cannot be written (Permission denied)"),
        ("cache", no_obstacle_but("cache"), "warn", "other models cannot be fetched or converted"),
        ("cache", no_obstacle_but("models"), "warn", "models cannot be written (Permission denied)"),
        ("results", no_disk(5e8), "warn", "0.5 GB are free"),
        ("cache", no_disk(1e6), "fail", "make room"),
        ("locks", no_locks, "warn", "has no locks"),
        ("model", no_memory(1000), "fail", "smaller model"),
        ("kernels", no_kernels, "warn", "numba"),
        ("threads", little_quota, "warn", "a quota of 0.5"),
        ("machine", busy(others=0.5, who=["make"]), "warn", "other programs, above all make, use 50%"),
        ("machine", busy(steal=0.2), "warn", "other virtual machines use 20%"),
        ("machine", busy(others=None), "ok", "not shown"),
        ("gpu", driver_without_cuda, "warn", "built without CUDA"),
        ("threads", broken_check, "fail", "RuntimeError: never thought of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_taken_away_is_found(
    name: str,
    take_away: Callable[[pytest.MonkeyPatch], None],
    state: str,
    words: str,
    check: Check,
    own_cache: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "work").mkdir()
    (own_cache / "models").mkdir()
    take_away(monkeypatch)
    code, found = check("-m", tiny_model, "--results", tmp_path / "work" / "results")
    assert (found[name]["state"], code) == (state, int(state == "fail"))
    assert words in found[name]["text"] + found[name]["remedy"]
    assert state == "ok" or found[name]["remedy"]


def test_memory_just_above_the_weights_is_a_warning(check: Check, tiny_model: Path, monkeypatch: Any) -> None:
    need = load_target(str(tiny_model), "bfloat16", "cpu").num_bytes
    monkeypatch.setattr(readiness, "available_bytes", lambda _: need * 1.2)
    code, found = check()
    assert (found["model"]["state"], code) == ("warn", 0)


def test_a_model_that_has_to_be_fetched_is_not_fetched_by_a_check(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "is_at_hand", lambda: False)
    monkeypatch.setattr(embedded, "_fetch", lambda _: pytest.fail("fetched"))
    for name in ("smollm2", "someone/a-model-that-no-hub-has"):
        _, found = check("-m", name)
        assert found["model"]["state"] == "warn"
        assert f"{name} is not on this machine yet" in found["model"]["text"]


def test_a_folder_that_is_no_model_fails(check: Check, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, found = check("-m", tmp_path / "empty")
    assert (found["model"]["state"], code) == ("fail", 1)


def test_missing_extras_come_with_their_command(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ray", "pandas") else real(name))
    extras = check()[1]["extras"]
    assert extras["state"] == "ok"
    assert "ray (sweeps on Ray)" in extras["text"]
    assert "pandas" in extras["remedy"]


def test_without_check_there_is_nothing_to_check_for(tmp_path: Path) -> None:
    assert spdbench("env", "--results", tmp_path).code == 2


def test_a_cache_that_cannot_be_written_fails_a_run_whose_model_is_not_in_it(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_obstacle_but("cache")(monkeypatch)
    monkeypatch.setattr(embedded, "is_at_hand", lambda: False)
    code, found = check("-m", "smollm2")
    assert (found["cache"]["state"], code) == ("fail", 1)
    assert "so smollm2 cannot be fetched" in found["cache"]["text"]
    assert "SPDBENCH_CACHE" in found["cache"]["remedy"]


@pytest.mark.parametrize(
    "place", ["/proc/results", "/dev/null/results", "{}/gone/results", "{}/gone", "{}/new/results"]
)
def test_folders_that_cannot_be_made_are_told_from_those_that_can(place: str, check: Check, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    code, found = check("--results", place.format(tmp_path))
    can_be_made = "new" in place
    assert (found["results"]["state"], found["locks"]["state"]) == (("ok", "ok") if can_be_made else ("fail", "warn"))
    assert "bug" not in found["locks"]["remedy"]
    assert code == int(not can_be_made)
