"""Kills, full disks and a day of requests: what a run loses, and how its memory grows.

Why: a test kills a run where its author expects a fault; runs of many hours end at any place, and all of them have to
resume to the result of a run that was not disturbed.
Regimes: the whole command, from its options to its table, in a process forked after the imports, so that 200 kills take
a minute; two backends whose steps cost nothing, 40 conversations of two turns. `kills`: SIGKILL at random moments, then
--resume. `disk`: files may have up to a random size, then --resume. `day`: one backend, one token every 10 ms, ten
tokens a request, for 24 hours, without the waiting.
Output: one row a part, with what has to hold. Exit code 1 as soon as a finished request is lost, changed or measured
twice, a result file is no result, a traceback is shown, or memory grows by more than half a kilobyte a request.

    python -m benchmarks.stress [kills] [disk] [day] [--kills 200] [--disks 50] [--requests 864000] [--seed 0]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar, NamedTuple

import yaml

from benchmarks.free_backends import NothingToLoad
from benchmarks.harness import row
from spdbench.backend import BackendContext, BackendOptions
from spdbench.cli.main import run as run_command
from spdbench.judge.results.schema import read_result
from spdbench.measure import environment
from spdbench.types import BackendKind, EngineReport, GenerationRequest, Step

CONVERSATIONS, TURNS = 40, 2
LABELS = ("plain", "drafts")
TOKENS_A_REQUEST = 10
REPORTS = "SPDBENCH_STRESS_REPORT_EVERY"
"""A variable: the backend reports its process's memory every so many requests."""
BYTES_A_REQUEST = 512
"""Memory that a request may take until the run ends: the place of its line in the journal."""

Finished = dict[tuple[str, str, int, int], str]
"""Label, prompt, turn and repeat of each finished request -> its output and its times."""


class Plain(NothingToLoad):
    """A backend that answers at once, with ids that follow from the prompt."""

    kind: ClassVar[BackendKind] = "autoregressive"
    text_only, lossless = True, True
    num_requests: ClassVar[int] = 0

    def __init__(self, options: BackendOptions, context: BackendContext) -> None: ...
    def account(self) -> EngineReport:
        return EngineReport(text="an answer")

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        Plain.num_requests += 1
        if REPORTS in os.environ and Plain.num_requests % int(os.environ[REPORTS]) == 1:
            print(f"MEMORY {Plain.num_requests} {memory_mb():.1f}", file=sys.stderr)
        first = sum(request.prompt_ids) % 1000
        for token in range(first, first + request.max_new_tokens):
            yield Step((token,), 0, 0, 0, 1.0)


class Drafts(Plain):
    """The same ids, two in a step."""

    kind: ClassVar[BackendKind] = "draft_verify"

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        ids = [token for step in super().generate(request) for token in step.token_ids]
        yield Step(tuple(ids[:1]), 0, 0, 0, 1.0)
        for start in range(1, len(ids), 2):
            new = tuple(ids[start : start + 2])
            yield Step(new, len(new), len(new), len(new) - 1, 2.0)


class Ended(NamedTuple):
    """How a command ended: its exit code, or minus the signal that killed it, and what it said."""

    code: int
    said: str


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[argparse.Namespace, Path], str]] = {"kills": kills, "disk": disk, "day": day}
    arguments.add_argument("parts", nargs="*", choices=[[], *parts], metavar="PART", default=[])
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--disks", type=int, default=50)
    arguments.add_argument("--requests", type=int, default=24 * 3600 * 100 // TOKENS_A_REQUEST)
    arguments.add_argument("--seed", type=int, default=0)
    chosen = arguments.parse_args()
    environment.PROBE_NS = 1_000_000  # the machine's bandwidth is of no interest here
    print(row("part", "measured", "holds"))
    for name, part in parts.items():
        if not chosen.parts or name in chosen.parts:
            with tempfile.TemporaryDirectory(prefix="spdbench-stress-") as scratch, installed(Path(scratch)):
                print(part(chosen, Path(scratch)), flush=True)


class installed:  # noqa: N801 - a context
    """The two backends as an installed package: metadata in `folder`, which is put on the path."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder)
        metadata = folder / "stress-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stress\nVersion: 1.0\n")
        points = "\n".join(f"{label} = benchmarks.stress:{label.capitalize()}" for label in LABELS)
        (metadata / "entry_points.txt").write_text(f"[spdbench.backends]\n{points}\n")

    def __enter__(self) -> None:
        sys.path.insert(0, self._path)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self._path)


# Kills and full disks


def kills(chosen: argparse.Namespace, scratch: Path) -> str:
    draw, began = random.Random(chosen.seed), time.monotonic()
    whole_s, _ = undisturbed(scratch)
    work, killed, moments, number = Work(scratch, "0"), 0, Counter[str](), 0
    while killed < chosen.kills:
        before, number = work.finished(), number + 1
        ended = work.run(limit_s=draw.uniform(0, 1.1 * whole_s))
        if ended.code == -signal.SIGKILL:
            killed += 1
            moments["loading" if not before and not work.finished() else work.moment()] += 1
        else:
            require(ended.code == 0, f"the command ended with {ended.code}: {ended.said}")
        work.require_kept(before)
        if ended.code == 0:
            work.require_complete()
            work = Work(scratch, str(number))
    if any(work.results.glob("*")):
        require(work.run().code == 0, "the last run does not end by itself")
        work.require_complete()
    shares = ", ".join(f"{count} {name}" for name, count in moments.most_common())
    took = f"{time.monotonic() - began:.0f} s"
    return row(f"{killed} kills of a command of {whole_s:.2f} s, {took}", shares, "every request once")


def disk(chosen: argparse.Namespace, scratch: Path) -> str:
    draw, (_, work) = random.Random(chosen.seed), undisturbed(scratch)
    largest = max(path.stat().st_size for path in work.results.iterdir())
    codes = Counter[int]()
    for number in range(chosen.disks):
        work = Work(scratch, f"disk{number}")
        room = draw.randint(0, largest)
        ended = work.run(room=room)
        codes[ended.code] += 1
        full = "the disk is full" in ended.said or "File too large" in ended.said
        require(ended.code == 2 and full, f"with {room} bytes a file it ended with {ended.code}: {ended.said}")
        require("Traceback" not in ended.said, ended.said)
        before = work.finished()
        ended = work.run()
        require(ended.code == 0, f"it does not resume: {ended.said}")
        work.require_kept(before)
        work.require_complete()
    return row(f"{chosen.disks} full disks, at 0 to {largest:,} bytes a file", f"exit codes {dict(codes)}", "resumed")


def undisturbed(scratch: Path) -> tuple[float, Work]:
    """Seconds of the command without a fault, and its work, which is then complete."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_command(Work(scratch, "here").words())  # imports in this process all that the forked ones need
    work, began = Work(scratch, "whole"), time.monotonic()
    ended = work.run()
    took = time.monotonic() - began
    require(ended.code == 0, f"the command ended with {ended.code}: {ended.said}")
    work.require_complete()
    return took, work


class Work:
    """One run of all conversations, in as many commands as it takes."""

    def __init__(self, scratch: Path, name: str) -> None:
        self.results = scratch / name
        turns = [{"id": f"p{n}", "category": "ab"[n % 2], "turns": [f"Say {n}."] * TURNS} for n in range(CONVERSATIONS)]
        self._suite = write_suite(scratch, turns, TOKENS_A_REQUEST)
        self._files = {label: self.results / f"stress__{label}__served" for label in LABELS}

    def words(self) -> list[str]:
        """The command; it resumes where there is something to resume."""
        backends = [word for label in LABELS for word in ("-b", label)]
        words = ["run", str(self._suite), *backends, "--threads", "1", "--results", str(self.results)]
        return [*words, *(["--resume"] if self.results.exists() else [])]

    def run(self, limit_s: float | None = None, room: int | None = None) -> Ended:
        return forked(self.words(), limit_s, room)

    def finished(self) -> Finished:
        """Every request in the journals, or in the results that replace them; a line that was cut does not count."""
        found: Finished = {}
        for label, path in self._files.items():
            runs = []
            if (journal := path.with_name(f"{path.name}.journal.jsonl")).exists():
                lines = journal.read_bytes().split(b"\n")[:-1]
                runs = [json.loads(line)["run"] for line in lines if line.startswith(b'{"run"')]
            elif (result := path.with_name(f"{path.name}.json")).exists():
                runs = json.loads(result.read_bytes())["runs"]
            keys = [(label, run["prompt_id"], run["turn"], run["repeat"]) for run in runs]
            require(len(set(keys)) == len(keys), f"{path}: a request was measured twice")
            require(not any(run["error"] for run in runs), f"{path}: a request failed")
            found |= {key: json.dumps([run["output_ids"], run["steps"]]) for key, run in zip(keys, runs, strict=True)}
        return found

    def moment(self) -> str:
        """Where in the command it was killed, by the files that are there."""
        results, journals = (len([*self.results.glob(f"*{end}")]) for end in (".json", ".jsonl"))
        if results == 0:
            return "measuring" if journals == len(LABELS) else "beginning"
        return "ending" if results < len(LABELS) or journals else "showing the table"

    def require_kept(self, before: Finished) -> None:
        after = self.finished()
        lost = [key for key, output in before.items() if after.get(key) != output]
        require(not lost, f"finished requests were lost or changed: {lost[:3]}")

    def require_complete(self) -> None:
        require(len(self.finished()) == len(LABELS) * CONVERSATIONS * TURNS, "requests are missing")
        names = sorted(path.name for path in self.results.iterdir())
        require(names == sorted(f"{path.name}.json" for path in self._files.values()), f"files are left: {names}")
        for path in self._files.values():
            result = read_result(path.with_name(f"{path.name}.json"))
            require(len(result.runs) == CONVERSATIONS * TURNS, f"{path}: {len(result.runs)} requests")


def write_suite(folder: Path, prompts: Sequence[object], max_new_tokens: int) -> Path:
    suite = {
        "name": "stress",
        "version": 1,
        "description": "Made up.",
        "prompts": {"source": [{"inline": prompts}]},
        "decoding": {"max_new_tokens": max_new_tokens, "temperature": 0},
    }
    path = folder / "stress.yaml"
    path.write_text(yaml.safe_dump(suite), encoding="utf-8")
    return path


def forked(words: Sequence[str], limit_s: float | None = None, room: int | None = None) -> Ended:
    """`spdbench WORDS` in a child, killed after `limit_s`, with files of up to `room` bytes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        code = 99
        try:
            code = run_command(words)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    if limit_s is not None:
        time.sleep(limit_s)
        os.kill(child, signal.SIGKILL)  # if it has ended, it is still there to be waited for
    with open(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said)


# A day of requests


def day(chosen: argparse.Namespace, scratch: Path) -> str:
    """In a child, so that nothing else counts; it reports its memory after each tenth of the requests."""
    repeats = 100
    prompts = [
        {"id": f"p{n}", "category": "a", "turns": [f"Say {n}."]} for n in range(max(1, chosen.requests // repeats))
    ]
    suite = write_suite(scratch, prompts, TOKENS_A_REQUEST)
    words = ["run", str(suite), "-b", "plain", "--repeats", str(repeats), "--results", str(scratch / "day")]
    number, began = len(prompts) * repeats, time.monotonic()
    os.environ[REPORTS] = str(max(2, number // 10))
    ended = forked([*words, "--threads", "1", "--warmup", "0"])
    del os.environ[REPORTS]
    took = time.monotonic() - began
    require(ended.code == 0, ended.said)
    found = [(int(done), float(mb)) for done, mb in re.findall(r"MEMORY (\d+) ([\d.]+)", ended.said)]
    (first, first_mb), (last, last_mb) = found[0], found[-1]
    grown = (last_mb - first_mb) * 2**20 / max(1, last - first)
    require(grown < BYTES_A_REQUEST, f"memory grows by {grown:.0f} bytes a request: {found}")
    measured = f"{first_mb:.0f} to {last_mb:.0f} MB, {grown:.0f} bytes a request"
    return row(f"{number:,} requests of {TOKENS_A_REQUEST} tokens, {took:.0f} s", measured, f"below {BYTES_A_REQUEST}")


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        print(f"FAILED: {otherwise}")
        sys.exit(1)


if __name__ == "__main__":
    main()
