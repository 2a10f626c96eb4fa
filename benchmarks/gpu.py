"""Everything that spdbench claims of a GPU, in one command: what graphs, streams and processes give on one device.

Why: most users have a GPU, many have one; there launches rule small models and bandwidth the large ones.
Regimes: batch 1, greedy, one GPU, models of Qwen3's shapes (0.6B, 1.7B, 4B, 8B) with random weights in bfloat16, drafts
whose acceptance is dialled (`forced:P`); sides of a part take turns, after a warm-up each.
Output: `DIR/PART.json` for each part, which stands alone; `DIR/gpu.json` with all of them; `DIR/gpu.md`, a table for
each part, and goals; traces beside them. Each part runs in a process of its own within a time limit. One that is done
is not run again with the same settings (`--fresh` does); one that failed or ran out of time is.

    python -m benchmarks.gpu --out DIR [--parts vanilla-4B trace-0.6B ...] [--fresh]
    python -m benchmarks.gpu --out DIR --rehearse      all of it on the CPU with a tiny model, within two minutes

Exit code: 0 if every part is done, 1 if not, 2 for wrong usage or without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.gpu_parts import REAL, REHEARSAL, Found, Settings, generate, machine, streams, vanilla

SCHEMA = "spdbench.gpu/1"
TAIL = 2000
"""Characters of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One measurement: how long it may take, and what runs it."""

    name: str
    limit_s: float
    run: Callable[[Settings, Path], Found]


def parts(settings: Settings) -> dict[str, Part]:
    """By name, in the order of running: what matters most comes first, should time run out."""
    from benchmarks.gpu_drafts import eagle, medusa
    from benchmarks.gpu_processes import processes
    from benchmarks.gpu_trace import trace

    def of(kind: str, limit_s: float, run: Callable[..., Found], shape: str, *, files: bool = False) -> Part:
        if files:
            return Part(f"{kind}-{shape}", limit_s, partial(run, shape))
        return Part(f"{kind}-{shape}", limit_s, lambda settings, _: run(shape, settings))

    small, shapes = settings.shapes[0], settings.shapes
    large = shapes[min(2, len(shapes) - 1)]
    found = [
        Part("machine", 60, lambda settings, _: machine(settings)),
        of("vanilla", 150, vanilla, small),
        of("streams", 300, streams, small),
        of("vanilla", 150, vanilla, large),
        of("generate", 180, generate, small),
        of("trace", 120, trace, small, files=True),
        *(of("vanilla", 150, vanilla, shape) for shape in shapes),
        *(of("streams", 300, streams, shape) for shape in shapes),
        of("eagle", 180, eagle, small),
        of("medusa", 180, medusa, small),
        of("processes", 300, processes, large),
        of("eagle", 180, eagle, large),
        of("medusa", 180, medusa, large),
    ]
    return {part.name: part for part in found}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    arguments.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    arguments.add_argument("--fresh", action="store_true", help="also run what is done")
    arguments.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    arguments.add_argument("--part", help=argparse.SUPPRESS)  # what a part's own process is told
    chosen = arguments.parse_args()
    settings = REHEARSAL if chosen.rehearse else REAL
    known = parts(settings)
    for name in [*(chosen.parts or []), *([chosen.part] if chosen.part else [])]:
        if name not in known:
            arguments.error(f"no part {name}. Allowed: {', '.join(known)}")
    if not chosen.rehearse and not torch.cuda.is_available():
        arguments.error("no GPU that torch can use; --rehearse runs all parts on the CPU, and measures nothing")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.part:
        run_here(known[chosen.part], settings, chosen.out)
        return
    wanted = [part for name, part in known.items() if not chosen.parts or name in chosen.parts]
    for part in wanted:
        run_part(part, settings, chosen)
    found = [read(chosen.out, name) for name in known]
    report = [each for each in found if each is not None]
    write(chosen.out / "gpu.json", {"schema": SCHEMA, "settings": asdict(settings), "parts": report})
    (chosen.out / "gpu.md").write_text(markdown(report, settings), encoding="utf-8")
    print(f"{chosen.out / 'gpu.md'}: {sum(each['status'] == 'done' for each in report)} of {len(known)} parts done")
    names = {each["part"] for each in report if each["status"] == "done"}
    sys.exit(0 if all(part.name in names for part in wanted) else 1)


def run_part(part: Part, settings: Settings, chosen: argparse.Namespace) -> None:
    """In a process of its own, unless it is done."""
    before = read(chosen.out, part.name)
    if not chosen.fresh and before and before["status"] == "done" and before["settings"] == as_read(settings):
        print(f"{part.name}: done before", flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(chosen.out), "--part", part.name]
    command += ["--rehearse"] if chosen.rehearse else []
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=part.limit_s)
        status = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its stages with it
        said, _ = process.communicate()
        status = "out of time"
    took = time.monotonic() - began
    if status != "done":
        record(part.name, settings, chosen.out, status, took, {"rows": [], "goals": [], "notes": [said[-TAIL:]]})
    print(f"{part.name}: {status}, {took:.0f} s", flush=True)


def run_here(part: Part, settings: Settings, out: Path) -> None:
    """The part itself; writes its file."""
    if not settings.on_gpu:
        torch.set_num_threads(1)  # tiny tensors gain nothing from a second one, which may have to wait for a processor
    began = time.monotonic()
    try:
        found = part.run(settings, out)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    record(part.name, settings, out, "done", time.monotonic() - began, found.as_json())


def record(name: str, settings: Settings, out: Path, status: str, took_s: float, found: Mapping[str, Any]) -> None:
    content = {"schema": SCHEMA, "part": name, "settings": asdict(settings), "status": status}
    write(out / f"{name}.json", {**content, "seconds": round(took_s, 1), "versions": versions(), **found})


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "python": sys.version.split()[0], "gpu": device}


def read(out: Path, name: str) -> dict[str, Any] | None:
    """A part's file; None if there is none that can be read."""
    try:
        found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def as_read(settings: Settings) -> Any:
    return json.loads(json.dumps(asdict(settings)))


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def markdown(report: Iterable[Mapping[str, Any]], settings: Settings) -> str:
    """A table a part, its notes, and all goals at the end."""
    report = list(report)
    lines = ["# spdbench on one GPU", ""]
    if settings.device == "cpu":
        lines += ["A rehearsal on a CPU with a tiny model: none of these numbers means anything.", ""]
    for each in report:
        lines += [f"## {each['part']}: {each['status']} ({each['seconds']:.0f} s, {each['versions']['gpu']})", ""]
        if each["rows"]:
            headers = list(dict.fromkeys(key for row in each["rows"] for key in row))
            cells = [[row.get(key, "") for key in headers] for row in each["rows"]]
            lines += [tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True), ""]
        for note in each["notes"]:
            lines += ["```", *note.splitlines(), "```", ""] if "\n" in note else [f"- {note}", ""]
    goals = [goal["text"] for each in report for goal in each["goals"]]
    return "\n".join([*lines, "## Goals", "", *(f"- {goal}" for goal in goals or ["none was measured"]), ""])


if __name__ == "__main__":
    main()
