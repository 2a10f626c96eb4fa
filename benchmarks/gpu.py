"""Everything that spdbench claims of a GPU, in one command: what graphs, streams and processes give on one device.

Why: most users have a GPU, many have one; there launches rule small models and bandwidth the large ones.
Regimes: batch 1, greedy, one GPU, models of Qwen3's shapes (0.6B, 1.7B, 4B, 8B) with random weights in bfloat16, drafts
whose acceptance is dialled (`forced:P`); sides of a part take turns, after a warm-up each.
Output: `DIR/gpu.json` with all parts; `DIR/gpu.md`, tables of all parts and goals; three traces beside them. Both
reports are written anew after every part. Each part runs in a process of its own within a time limit, what matters most
first, and none begins when too little of the budget is left. The same command goes on where it was stopped: what is
done is not run again with the same settings, card, versions and sources (`--fresh` does); what failed is, last.

    python -m benchmarks.gpu --out DIR [--budget-s 1200] [--parts vanilla-4B trace-0.6B ...] [--fresh]
    python -m benchmarks.gpu --out DIR --rehearse      all of it on the CPU with a tiny model, within minutes

Exit code: 0 if every part is done, 1 if not, 2 for wrong usage, without a GPU or where packages are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import gpu_running
from benchmarks.gpu_running import ROOT, TAIL, run_apart
from spdbench.measure.environment import git_state

if TYPE_CHECKING:
    from benchmarks.gpu_parts import Found, Settings

sys.path.append(str(ROOT / "backends"))  # where nothing is installed, the checkout will do

SCHEMA = "spdbench.gpu/2"
BUDGET_S = 1200.0
LEAST_SHARE = 1 / 3
"""Of its limit that must be left for a part to begin: limits are set for slow days."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement: how long it may take, and what runs it."""

    name: str
    limit_s: float
    run: Callable[[Settings, Path], Found]


def parts(settings: Settings) -> dict[str, Part]:
    """By name, in the order of running: one of each kind by its importance, then the other shapes."""
    from benchmarks.gpu_drafts import eagle, medusa
    from benchmarks.gpu_parts import compiled, generate, machine, streams, vanilla
    from benchmarks.gpu_processes import nccl, processes
    from benchmarks.gpu_trace import trace

    def of(kind: str, limit_s: float, run: Callable[..., Found], shape: str, *, files: bool = False) -> Part:
        if files:
            return Part(f"{kind}-{shape}", limit_s, partial(run, shape))
        return Part(f"{kind}-{shape}", limit_s, lambda settings, _: run(shape, settings))

    small, shapes = settings.shapes[0], settings.shapes
    large = shapes[min(2, len(shapes) - 1)]
    four, eight = (4, 8) if settings.on_gpu else (2, 2)
    found = [
        Part("machine", 90, lambda settings, _: machine(settings)),
        of("vanilla", 120, vanilla, small),
        of("vanilla", 120, vanilla, large),
        of("generate", 150, generate, small),
        of("streams", 240, streams, small),
        of("eagle", 150, eagle, small),
        of("medusa", 150, medusa, small),
        of(f"processes-n{four}", 180, partial(processes, count=four), large),
        Part("nccl", 90, lambda settings, _: nccl(settings)),
        of("trace", 120, trace, small, files=True),
        of("compiled", 240, compiled, large),
        of("compiled", 240, compiled, small),
        *(of("vanilla", 120, vanilla, shape) for shape in shapes),
        of("streams", 240, streams, large),
        *(of("streams", 240, streams, shape) for shape in shapes),
        of(f"processes-n{eight}", 240, partial(processes, count=eight), large),
        of("eagle", 150, eagle, large),
        of("medusa", 150, medusa, large),
    ]
    return {part.name: part for part in found}  # a second mention keeps the first one's place


class Results:
    """All records in `out`, and both reports of them. A record belongs to one part, settings and identity."""

    def __init__(self, out: Path, settings: Settings, identity: Mapping[str, str], names: Iterable[str]) -> None:
        self.out, self.rehearsal, self._names = out, not settings.on_gpu, list(names)
        self._group = {"settings": json.loads(json.dumps(asdict(settings))), "identity": dict(identity)}
        out.mkdir(parents=True, exist_ok=True)
        self._records = _read(out / "gpu.json")

    def find(self, name: str) -> Record | None:
        """What is known of a part from the same settings, card, versions and sources."""
        wanted = {"part": name, **self._group}
        return next((each for each in self._records if wanted.items() <= each.items()), None)

    def done(self, name: str) -> bool:
        return self._status(name) == "done"

    def failed(self, name: str) -> bool:
        """Where the part itself is to blame."""
        return self._status(name) in ("failed", "out of time")

    def keep(self, name: str, status: str, took_s: float, found: Mapping[str, Any]) -> None:
        """In both reports. What was done is not given up for a later run that failed: that one is a note."""
        before = self.find(name)
        if status != "done" and before and before["status"] == "done":
            before["notes"] += [f"run again: {status}", *found["notes"]]
        else:
            self._records = [each for each in self._records if each is not before]
            taken = {"taken": time.strftime("%Y-%m-%d %H:%M:%S"), "git": git_state()}
            record = {"part": name, **self._group, **taken, "status": status, "seconds": round(took_s, 1)}
            self._records.append({**record, **found})
        self.write()

    def write(self) -> None:
        _write(self.out / "gpu.json", json.dumps({"schema": SCHEMA, "records": self._records}, indent=1) + "\n")
        _write(self.out / "gpu.md", self.markdown())

    def markdown(self) -> str:
        """A section for each card, versions, sources and settings, this call's first."""
        groups = [self._group]
        for each in reversed(self._records):
            if (group := {key: each[key] for key in self._group}) not in groups:
                groups.append(group)
        lines = ["# spdbench on one GPU", ""]
        for group in groups:
            records = [each for each in self._records if group.items() <= each.items()]
            missing = [name for name in self._names if not self.find(name)] if group == self._group else []
            lines += _section(group, sorted(records, key=self._place), missing)
        return "\n".join(lines)

    def _place(self, record: Record) -> int:
        return self._names.index(record["part"]) if record["part"] in self._names else len(self._names)

    def _status(self, name: str) -> str:
        record = self.find(name)
        return str(record["status"]) if record else ""


def _section(group: Mapping[str, Any], records: Iterable[Record], missing: Iterable[str]) -> Iterator[str]:
    """A table a part, its notes, and all goals at the end."""
    from tabulate import tabulate

    identity, records = group["identity"], list(records)
    on_cpu = group["settings"]["device"] == "cpu"
    versions = ", ".join(f"{name} {identity[name]}" for name in ("python", "torch", "transformers", "sources"))
    yield from (f"## {'Rehearsal on a CPU' if on_cpu else identity['gpu']}, {versions}", "")
    if on_cpu:
        yield from ("With a tiny model: none of these numbers means anything.", "")
    for each in records:
        about = [f"{each['seconds']:.0f} s", each["taken"], *([f"commit {each['git']}"] if each["git"] else [])]
        yield from (f"### {each['part']}: {each['status']} ({', '.join(about)})", "")
        if each["rows"]:
            headers = list(dict.fromkeys(key for row in each["rows"] for key in row))
            cells = [[row.get(key, "") for key in headers] for row in each["rows"]]
            yield from (tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True), "")
        for note in each["notes"]:
            yield from ("```", *note.splitlines(), "```", "") if "\n" in note else (f"- {note}", "")
    goals = [goal["text"] for each in records for goal in each["goals"]]
    yield from ("### Goals", "", *(f"- {goal}" for goal in goals or ["none was measured"]), "")
    if names := list(missing):
        yield from (f"Not run yet: {', '.join(names)}.", "")


def run_parts(wanted: Iterable[Part], results: Results, deadline: float, *, fresh: bool = False) -> list[str]:
    """Those that are not done, failed ones last; returns the names of those for which no time was left."""
    results.write()
    todo, left_out = [], []
    for part in wanted:
        if fresh or not results.done(part.name):
            todo.append(part)
        else:
            print(f"{part.name}: done before", flush=True)
    for part in sorted(todo, key=lambda part: results.failed(part.name)):
        left_s = deadline - time.monotonic()
        if left_s < part.limit_s * LEAST_SHARE:
            print(f"{part.name}: not begun, {max(left_s, 0):.0f} s are left", flush=True)
            left_out.append(part.name)
        else:
            run_part(part, results, left_s)
    return left_out


def run_part(part: Part, results: Results, left_s: float) -> None:
    """In a process of its own. What it has written counts, however the process ended."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(results.out)]
        command += ["--part", part.name, str(file), str(os.getpid())]
        command += ["--rehearse"] if results.rehearsal else []
        code, said = run_apart(command, min(part.limit_s, left_s))
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    took = time.monotonic() - began
    late = "out of time" if left_s > part.limit_s else "out of budget"
    ended = f"{late} after {took:.0f} s" if code is None else f"exit code {code}"
    status = "done" if found else late if code is None else "failed"
    if found and code != 0:
        found["notes"].append(f"{ended}, after all was measured\n{said[-TAIL:]}")
    results.keep(part.name, status, took, found or {"rows": [], "goals": [], "notes": [f"{ended}\n{said[-TAIL:]}"]})
    print(f"{part.name}: {status}, {took:.0f} s", flush=True)


def run_here(part: Part, settings: Settings, out: Path, file: Path) -> None:
    """The part itself; what it finds goes into `file`."""
    import torch

    if not settings.on_gpu:
        torch.set_num_threads(1)  # tiny tensors gain nothing from a second one, which may have to wait for a processor
    try:
        found = part.run(settings, out)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    _write(file, json.dumps(found.as_json()))


def _read(path: Path) -> list[Record]:
    """The records there. A file that says something else is put aside."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] == SCHEMA:
            return list(content["records"])
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        pass
    path.replace(path.with_suffix(".old"))
    return []


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    arguments.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"for this call (default {BUDGET_S:.0f})")
    arguments.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    arguments.add_argument("--fresh", action="store_true", help="also run what is done")
    arguments.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    arguments.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # for its own process: name, file, parent
    chosen = arguments.parse_args()
    began = time.monotonic()
    if why := gpu_running.missing():
        arguments.error(why)
    try:
        from benchmarks.gpu_parts import REAL, REHEARSAL

        settings = REHEARSAL if chosen.rehearse else REAL
        known = parts(settings)
    except ImportError as error:
        arguments.error(f"cannot be imported: {error}")
    if chosen.part:
        name, file, parent = chosen.part
        gpu_running.end_with(int(parent))
        run_here(known[name], settings, chosen.out, Path(file))
        return
    for name in chosen.parts or []:
        if name not in known:
            arguments.error(f"no part {name}. Allowed: {', '.join(known)}")
    gpu = "" if chosen.rehearse else gpu_running.gpu_name()
    if not chosen.rehearse and not gpu:
        arguments.error("no GPU that torch can use; --rehearse runs all parts on the CPU, and measures nothing")
    gpu_running.raise_when_told_to_stop()
    wanted = [part for name, part in known.items() if not chosen.parts or name in chosen.parts]
    results = Results(chosen.out.resolve(), settings, gpu_running.identity(gpu), known)
    left_out = run_parts(wanted, results, began + chosen.budget_s, fresh=chosen.fresh)
    undone = [part.name for part in wanted if part.name in left_out or not results.done(part.name)]
    print(f"{results.out / 'gpu.md'}: {len(wanted) - len(undone)} of {len(wanted)} parts done")
    if undone:
        print(f"The same command goes on with: {' '.join(undone)}")
    sys.exit(1 if undone else 0)


if __name__ == "__main__":
    main()
