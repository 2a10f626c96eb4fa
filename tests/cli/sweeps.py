"""A sweep of the tiny model, written and run by tests of sweeps here and on other engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from spdbench.cli.sweep.points import read_sweep
from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.processes.runs import react_to_ctrl_c

SECONDS = 800.0  # a limit against hanging, not an expectation
EXAMPLE = Path(__file__).parents[2] / "examples" / "spd-stages.yaml"


def tiny_sweep(model: Path, folder: Path) -> dict[str, Any]:
    """A sweep of four points on the tiny model."""
    suite = write_suite(folder, num_prompts=2, decoding={"max_new_tokens": 8})
    return {
        "name": "tiny",
        "fixed": {
            "suite": str(suite),
            "model": str(model),
            "dtype": "float32",
            "threads": 1,
            "backends": ["vanilla", "spd"],
            "options": {"spd.executor": "inline"},
        },
        "grid": {"options.spd.stages": [2, 3], "drafters": ["oracle:0.5", "oracle:0.9"]},
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, content: object, *words: str | Path) -> Said:
    return spdbench("sweep", write(folder, content), "--results", folder / "out", *words)


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("mini__*.json"))


def example_on_the_tiny_model(sweep: dict[str, Any]) -> dict[str, Any]:
    """The twelve points of the example, with all that makes them fast; six layers have no five stages."""
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    example["fixed"] = {**example["fixed"], **sweep["fixed"]}
    example["grid"]["options.spd.stages"] = [1, 2, 3, 6]
    return {**example, "name": "tiny"}


def require_every_point_once(folder: Path, file: Path) -> None:
    _, points = read_sweep(file)
    assert len(points) == 12
    names = results(folder)
    for point in points:
        for label in point.labels:
            (name,) = [name for name in names if name.startswith(f"mini__{label}__") and point.name in name]
            assert len(read_result(folder / "out" / name).runs) == 2
    assert len(names) == 24
    ended = [json.loads(line) for line in (folder / "out" / "points.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["name"] for line in ended) == sorted(point.name for point in points)
    assert {line["exit_code"] for line in ended} == {0}


def in_a_process(words: Sequence[str | Path], **environment: str) -> Said:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


def started(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """`spdbench WORDS` in a process of its own, which is interrupted later."""
    return subprocess.Popen(
        [sys.executable, "-m", "spdbench", *map(str, words)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=react_to_ctrl_c,
    )


def runs_of(suite: str) -> list[int]:
    """The processes that are `spdbench run SUITE`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().partition(b"\0run\0")[2].startswith(f"{suite}\0".encode()):
                found.append(int(path.parent.name))
    return found
