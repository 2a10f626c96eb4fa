"""Vanilla's peak memory compared with the model's bytes, each measurement in a new process.

Why: a baseline that holds its weights twice leaves less room for the model, the cache and the drafter, and may be fast
only for that reason.
Regimes: batch 1, greedy, one short prompt, both dtypes, a new process each time.
Output: three rows a dtype, medians over the rounds in MB. `anonymous` is the process's own memory (RssAnon, sampled
every 2 ms); `checkpoint` the resident pages of the mapped weight files, which the system may drop; `resident` all
resident memory of the process (VmRSS and VmHWM), which also grows by the pages of torch's libraries that the first
matrix multiplications touch. Each before the weights are loaded, which is the runtime's own (modules imported,
tokenizer, threads, compiled code), after loading, after decoding, and at the peak. The target is for anonymous and
checkpoint together, peak less runtime, over the model's bytes.

    python -m benchmarks.memory [--rounds 3] [--tokens 64] [--threads 2] [--dtypes float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, Row, show, spread, take_turns
from benchmarks.shared.workload import MODEL, prompt_ids, vanilla_side
from spdbench.models.cpu.linear import can_pack
from spdbench.models.target import DTYPES, load_target

SAMPLE_EVERY_S = 0.002
MAX_RATIO = 1.2
KINDS = ("anonymous", "checkpoint", "resident")
STAGES = ("runtime", "loaded", "decoded", "peak")


def main() -> None:
    arguments = sides.parser(__doc__, rounds=3, tokens=64)
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    is_child = chosen.child
    del chosen.child
    if is_child:
        torch.set_num_threads(chosen.threads)
        print(json.dumps(memory_by_stage(chosen.dtypes[0], chosen.tokens)))
    else:
        sides.run("memory", chosen, measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    load_target(MODEL, "float32", "cpu")  # converts the model if necessary, which is not to be measured
    children = {dtype: partial(child, dtype, chosen) for dtype in chosen.dtypes}
    rows = [row(dtype, found) for dtype, found in take_turns(children, chosen.rounds).items()]
    report.tables["memory"] = rows
    for each in rows:
        what = f"peak memory less the runtime's, over the model's bytes, {each['dtype']}"
        report.goals.append(Goal(what, each["ratio"].median, at_most=MAX_RATIO))
    show(
        ["dtype", "model, MB", "memory, MB", *STAGES],
        [
            [
                each["dtype"],
                megabytes(each["model_bytes"]),
                kind,
                *(megabytes(each[kind][name].median) for name in STAGES),
            ]
            for each in rows
            for kind in KINDS
        ],
    )


def row(dtype: str, found: list[dict[str, Any]]) -> Row:
    """One dtype's row, from what its processes measured."""
    sizes = {kind: {stage: spread(each[kind][stage] for each in found) for stage in STAGES} for kind in KINDS}
    return {"dtype": dtype, "model_bytes": found[0]["model_bytes"], **sizes, "ratio": spread(map(over_model, found))}


def over_model(found: dict[str, Any]) -> float:
    """Memory for the model at the peak, in units of its bytes: anonymous memory and resident pages of its files."""
    grown: int = sum(found[kind]["peak"] - found[kind]["runtime"] for kind in ("anonymous", "checkpoint"))
    return grown / int(found["model_bytes"])


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f}"


def child(dtype: str, chosen: argparse.Namespace) -> dict[str, Any]:
    options = [f"--tokens={chosen.tokens}", f"--threads={chosen.threads}", f"--dtypes={dtype}"]
    command = [sys.executable, "-m", "benchmarks.memory", "--child", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def memory_by_stage(dtype: str, tokens: int) -> dict[str, Any]:
    """Loads and decodes in this process; its memory at each stage, in bytes by kind."""
    target = load_target(MODEL, dtype, "cpu")
    ids = prompt_ids(target)["prose"]
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts the thread pool
    can_pack(DTYPES[dtype], torch.device("cpu"))  # loads the compiled code and starts its threads
    found: dict[str, Any] = {"model_bytes": target.num_bytes, **{kind: {} for kind in KINDS}}

    def record(stage: str) -> None:
        found["anonymous"][stage], found["resident"][stage] = status_bytes("RssAnon"), status_bytes("VmRSS")
        found["checkpoint"][stage] = mapped_bytes(target.files.directory)

    record("runtime")
    with Peak() as peak:
        side = vanilla_side(target, ids, tokens)
        _ = target.decoder
        record("loaded")
        side()
        record("decoded")
    found["anonymous"]["peak"] = max(peak.most, *found["anonymous"].values())
    found["checkpoint"]["peak"] = max(found["checkpoint"].values())
    found["resident"]["peak"] = status_bytes("VmHWM")
    return found


class Peak:
    """Samples this process's anonymous memory in a thread; Linux itself keeps the peak of resident memory only."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self.most = max(self.most, status_bytes("RssAnon"))


def mapped_bytes(folder: Path, process: int | str = "self") -> int:
    """Resident bytes of the files in `folder` that a process has mapped."""
    text = Path(f"/proc/{process}/smaps").read_text(encoding="utf-8")
    areas = re.findall(rf"{re.escape(str(folder))}/.*\n(?:.+:.*\n)*?Rss:\s+(\d+) kB", text)
    return sum(int(size) for size in areas) * 1024


def status_bytes(name: str, process: int | str = "self") -> int:
    """A size in bytes from Linux's status of a process."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
