"""A whole run on a system from which is taken away what only Linux has, or what containers and networks lack."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spdbench import processors
from tests.cli.run_helpers import write_suite

TAKE_AWAY = '''
import builtins, ctypes, errno, fcntl, io, os, pwd, resource

def absent(function):
    """`function` without /proc and /sys."""
    def call(path, *args, **more):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path)[:5] in ("/proc", "/sys/"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
        return function(path, *args, **more)
    return call

for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
    setattr(os, name, absent(getattr(os, name)))
io.open = builtins.open = absent(io.open)
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)

def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = no_locks

def nobody(*_):
    raise KeyError("this user is in no list")
pwd.getpwuid = pwd.getpwnam = nobody

class NoPrctl(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "syscall"):
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = NoPrctl
'''
WITHOUT = ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "SPDBENCH_CACHE", "SPDBENCH_PROFILES", "USER", "LOGNAME")


def bare(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`spdbench WORDS` on such a system, its stage processes included; this user has no home."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(TAKE_AWAY, "utf-8")
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: value for name, value in os.environ.items() if name not in WITHOUT}
    return subprocess.run(
        [sys.executable, "-m", "spdbench", *map(str, words)],
        cwd=folder,
        env={**kept, "PYTHONPATH": os.pathsep.join([str(folder / "site"), root, os.path.join(root, "backends")])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_needs_neither_proc_nor_affinity_nor_locks_nor_a_home(tiny_model: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    backends = ("-b", "vanilla", "-b", "spd", "-b", "eagle", "-o", "spd.stages=2", "-o", "spd.executor=process")
    done = bare(tmp_path, "run", suite, *backends, "-m", tiny_model, "--dtype", "float32", "--drafter", "oracle:0.8")
    assert done.returncode == 0, done.stderr
    assert "has no locks; take care" in done.stderr
    results = [json.loads(path.read_text("utf-8")) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert [result["backend"]["label"] for result in results] == ["eagle", "spd", "vanilla"]
    outputs = [[run["output_ids"] for run in result["runs"]] for result in results]
    assert outputs[0] == outputs[1] == outputs[2]
    assert results[0]["environment"]["cpu"]  # the architecture, where no file names the processor
    again = bare(tmp_path, "compare", "results")
    assert again.returncode == 0, again.stderr


def test_a_check_of_such_a_system_says_what_it_lacks(tiny_model: Path, tmp_path: Path) -> None:
    done = bare(tmp_path, "env", "--check", "--json", "-m", tiny_model)
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 1, done.stderr
    assert {name for name, each in found.items() if each["state"] == "fail"} == {"cache"}
    assert "set SPDBENCH_CACHE" in found["cache"]["text"]
    assert found["locks"]["state"] == "warn"
    assert "not shown" in found["machine"]["text"]


def test_what_needs_a_home_says_what_to_set(tmp_path: Path) -> None:
    done = bare(tmp_path, "run", "quick", "-b", "vanilla")
    assert done.returncode == 2
    assert "set SPDBENCH_CACHE" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_goes_on_where_there_are_no_locks(tiny_model: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    fixed = {"suite": str(suite), "backends": "vanilla", "model": str(tiny_model), "dtype": "float32"}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"name": "s", "fixed": fixed, "grid": {"limit": [1]}}), "utf-8")
    done = bare(tmp_path, "sweep", "sweep.yaml")
    assert done.returncode == 0, done.stderr
    assert "take care that no other sweep works there" in done.stderr


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_process_without_prctl_lives_on_with_its_parent(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __init__(self, _name: object) -> None:
            pass

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", Nothing)
    monkeypatch.setattr(os, "_exit", lambda _: pytest.fail("left"))
    processors.die_with(os.getppid(), signal.SIGKILL)
