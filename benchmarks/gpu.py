"""Vanilla, SPD on streams, EAGLE and Medusa on one GPU, with CUDA graphs and without.

Why: on a GPU launches rule small models and memory bandwidth large ones; graphs remove the first, drafts the second.
Regimes: batch 1, greedy, one GPU, Qwen3's shapes with random weights in bfloat16, untrained heads, whose drafting takes
as long as a trained one's, and forced verdicts (`forced:P`). The sides of a part take turns, after a warm-up each.
Output: `DIR/gpu.md`, one table: ms a token (median of the rounds, least, most), how many times as fast as vanilla with
graphs, tokens a round, and the share of the measured read bandwidth that the target's weights take. `DIR/PART.json` has
the numbers of one part. Both are written after every part; the same command goes on with the parts that are missing.

    python -m benchmarks.gpu --out DIR [--budget-s 1200] [--parts vanilla-4B ...]
    python -m benchmarks.gpu --out DIR --rehearse      everything on the CPU with a tiny model, in under a minute

A side that fails is dropped and its traceback noted; each part has a process of its own, which the budget bounds.
Nothing needs to be installed but the packages: it runs from the checkout.
Exit code: 0 if every part is done, 1 if not, 2 for wrong usage, without a GPU or where packages are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdbench.output_files import replaced_file

if TYPE_CHECKING:
    from benchmarks.shared.gpu_sides import Settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "backends"))  # where nothing is installed

NEEDED = ("torch", "transformers", "numpy", "numba", "pydantic", "safetensors")
"""Of the project's dependencies, those that the parts import."""

BUDGET_S = 1200.0
MIN_S = 30.0
"""A part does not begin with less time left."""

TAIL = 1500
"""Characters of a failed part's output that are shown."""


def markdown(records: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    """One table a machine, with the notes of its parts."""
    lines = ["# One GPU", ""]
    for machine in dict.fromkeys(record["machine"] for record in records):
        here = [record for record in records if record["machine"] == machine]
        lines += [f"## {machine}", ""]
        rows = [row for record in here for row in record["rows"]]
        if rows:
            lines += [table_line(rows[0]), table_line("---" for _ in rows[0])]
            lines += [*(table_line(row.values()) for row in rows), ""]
        for note in (note for record in here for note in record["notes"]):
            lines += ["```", *note.splitlines(), "```", ""]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def table_line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def read_records(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is known of the parts `names`, by name. Unreadable files count as missing."""
    found = {}
    for name in names:
        with suppress(OSError, ValueError):
            found[name] = json.loads((out / f"{name}.json").read_text("utf-8"))
    return found


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    with replaced_file(path) as file:
        file.write(text.encode())


def run_apart(name: str, out: Path, limit_s: float, *, rehearse: bool) -> str:
    """Runs a part in a process of its own, which writes its record. Returns what went wrong, empty if nothing did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--part", name, *["--rehearse"] * rehearse]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"out of time after {limit_s:.0f} s"
    return "" if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout[-TAIL:]}"


def run_here(name: str, settings: Settings, out: Path) -> None:
    """Measures a part in this process and writes its record. Ends with its parent, however that one ends."""
    import torch
    import transformers

    from benchmarks.shared.gpu_sides import run_part
    from spdbench.measure.environment import git_state
    from spdbench.processors import die_with

    die_with(os.getppid())
    if not settings.on_gpu:
        torch.set_num_threads(1)  # tiny tensors gain nothing from a second thread
    found = run_part(name, settings)
    card = (
        torch.cuda.get_device_name() if settings.on_gpu else "Rehearsal on a CPU: none of these numbers means anything"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    machine = f"{card}; {versions}; spdbench {git_state() or 'outside of a checkout'}"
    write(out / f"{name}.json", json.dumps({"part": name, "machine": machine, **found}, indent=1) + "\n")


def missing_packages() -> str:
    """What cannot be imported and how to install it, in one message; empty if nothing is missing."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    wanted = {re.split(r"[<>=!~ ]", each)[0]: each for each in declared}
    absent = [wanted[name] for name in NEEDED if find_spec(name) is None]
    if not absent:
        return ""
    names = ", ".join(absent)
    return f"not installed: {names}. Try: {sys.executable} -m pip install {' '.join(repr(each) for each in absent)}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    arguments.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"for this call (default {BUDGET_S:.0f})")
    arguments.add_argument("--parts", nargs="+", metavar="PART", help="only these, also if they are done")
    arguments.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    arguments.add_argument("--part", help=argparse.SUPPRESS)  # in its own process
    chosen = arguments.parse_args()
    deadline = time.monotonic() + chosen.budget_s
    if why := missing_packages():
        arguments.error(why)
    from benchmarks.shared.gpu_sides import REAL, REHEARSAL

    settings, out = REHEARSAL if chosen.rehearse else REAL, chosen.out.resolve()
    if chosen.part:
        return run_here(chosen.part, settings, out)
    known = settings.parts()
    for name in chosen.parts or []:
        if name not in known:
            arguments.error(f"no part {name}. Allowed: {', '.join(known)}")
    # Asked in a process of its own: this one must not hold a piece of the card while others measure it.
    asked = [sys.executable, "-W", "ignore", "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
    if settings.on_gpu and subprocess.run(asked, check=False).returncode != 0:
        arguments.error("no GPU that torch can use; --rehearse runs all parts on the CPU, and measures nothing")
    out.mkdir(parents=True, exist_ok=True)
    sys.exit(run_parts(chosen.parts or [], settings, out, deadline))


def run_parts(asked: Sequence[str], settings: Settings, out: Path, deadline: float) -> int:
    """Runs the parts `asked`, by default those without a record, and writes the table after each. Returns the exit
    code of the command."""
    known, failed = settings.parts(), []
    for name in asked or [name for name in known if name not in read_records(out, known)]:
        left_s = deadline - time.monotonic()
        why = f"not begun, {max(left_s, 0.0):.0f} s are left"
        if left_s >= MIN_S:
            why = run_apart(name, out, left_s, rehearse=not settings.on_gpu)
        failed += [name] if why else []
        print(f"{name}: {why or 'done'}", flush=True)
        records = read_records(out, known)
        write(out / "gpu.md", markdown(list(records.values()), [name for name in known if name not in records]))
    return int(bool(failed))


if __name__ == "__main__":
    main()
