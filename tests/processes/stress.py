"""Kills a run again and again, at random moments and places, and resumes it: no finished request may ever be lost.

Why: a test kills a run only where its author expects a fault. Victims are the run itself or one of its stages, while
they load, process the prompt or decode.
Regimes: the tests' tiny model, `spd` with two stages and vanilla, 160 requests; after a complete run a new one starts.
Output: a line a kill (victim, moment, seconds to the end, requests finished so far), then the sum. Exit code 1 as soon
as a finished request is lost or changed, a run takes over 10 s to end, or a process outlives it.

    python -m tests.processes.stress [--kills 100] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests import tiny
from tests.processes.test_stage_faults import SOON, Marked

Finished = dict[tuple[str, str, int, int], str]
"""Label, prompt, turn and repeat of each finished request -> its output."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    chosen = arguments.parse_args()
    draw = random.Random(chosen.seed)
    victims: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="spdbench-stress-") as scratch:
        model = tiny.make_model(Path(scratch) / "tiny-llama")
        run = new_run(model, Path(scratch) / "0")
        for kill in range(chosen.kills):
            if complete(run):
                run = new_run(model, Path(scratch) / str(kill))
            victims[one_kill(run, draw, kill)] += 1
        while not complete(run):
            require(run.finish("--resume")[0] in (0, 1), "the last run does not end by itself")
    print(f"{chosen.kills} kills, none lost a finished request: {dict(victims)}")


def new_run(model: Path, folder: Path) -> Marked:
    folder.mkdir()
    return Marked(model, folder)


def one_kill(run: Marked, draw: random.Random, number: int) -> str:
    """Starts or resumes the run, kills one of its processes, and returns which."""
    before = finished(run)
    running = run.start(*(["--resume"] if any(run.results.glob("*")) else []))
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0, 6))  # a random moment, often while it loads
    else:
        wanted = len(before) + draw.randint(1, 12)
        deadline = time.monotonic() + 60
        while len(finished(run)) < wanted and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
    stages = run.workers()
    victim = draw.choice([("run", running.pid), *((f"stage {index}", pid) for index, pid in enumerate(stages))])
    began = time.monotonic()
    try:
        os.kill(victim[1], signal.SIGKILL)
    except ProcessLookupError:
        victim = ("none: it had just ended", 0)
    running.communicate(timeout=60)
    took = time.monotonic() - began
    after = finished(run)
    print(
        f"{number}: {victim[0]} killed, over after {took:.1f} s with code {running.returncode}, {len(after)} finished"
    )
    sys.stdout.flush()
    require(took < SOON, f"the run took {took:.1f} s to end")
    require(run.is_gone(), "a process outlived the run")
    changed = [key for key, value in before.items() if after.get(key) != value]
    require(not changed, f"finished requests were lost or changed: {changed}")
    return victim[0]


def finished(run: Marked) -> Finished:
    """Every request in the journals, or in the results that replaced them."""
    found: Finished = {}
    for label, journal in zip(("vanilla", "spd"), run.journals, strict=True):
        result = run.results / f"mini__{label}__tiny-llama.json"
        for file in (result, journal):
            found |= {(label, *key): value for key, value in requests(file)}
    return found


def requests(file: Path) -> list[tuple[tuple[str, int, int], str]]:
    """The runs in a journal or a result; an incomplete last line does not count."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    if file.suffix == ".json":
        runs: list[dict[str, Any]] = json.loads(text)["runs"]
    else:
        lines = [line for line in text.splitlines(keepends=True) if line.startswith('{"run"') and line.endswith("}\n")]
        runs = [json.loads(line)["run"] for line in lines]
    return [
        ((run["prompt_id"], run["turn"], run["repeat"]), json.dumps([run["output_ids"], run["error"]])) for run in runs
    ]


def complete(run: Marked) -> bool:
    """No journal is left, and both labels have a result."""
    return len(list(run.results.glob("*.json"))) == 2 and not any(journal.exists() for journal in run.journals)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        print(f"FAILED: {otherwise}")
        sys.exit(1)


if __name__ == "__main__":
    main()
