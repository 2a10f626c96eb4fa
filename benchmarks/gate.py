"""Tests `spdbench check`: does it pass when nothing changed, and fail when something did?

Why: a gate that fails because of noise is switched off, and one that passes a regression is worth nothing. Only
repeated runs on a noisy machine show which it is.
Regimes: `spdbench run quick` with vanilla and spd, each run a fresh process, as in CI. Runs of the same code are the
baseline and its calibration; then rounds of a few starts of the same code, which have to pass, and of spd made slower
on purpose, which the timing gate has to catch; then rounds of spd in float32 with `oracle:0.8` and one accepted draft
in fifty turned into a rejection, another one each round, which the exact gate has to catch.
Output: a line a round with the exit codes and the change of the speed-up; how far runs of the same code differ; then
targets. All runs are kept in `--folder` and not measured again, so that the same command continues after an
interruption, and adds rounds when `--rounds` is larger.

    python -m benchmarks.gate --folder DIR [--rounds 20] [--baselines 8] [--together 5] [--limit 8] [--tokens 32]
                              [--repeats 1] [--slower-by 0.115] [--drafter auto] [--option executor=inline]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks.shared import sides
from benchmarks.shared.gate_backends import ENTRY_POINTS
from benchmarks.shared.sides import Goal, Report, show

ROOT = Path(__file__).parents[1]
EXIT_WORDS = {0: "pass", 1: "REGRESSION", 3: "inconclusive", 4: "NOT COMPARABLE"}
METADATA = "Metadata-Version: 2.1\nName: spdbench-gate-experiment\nVersion: 1.0\n"
EVERY = 50
SLOWER_BY = 0.115
"""By how much the stages are slowed to make the whole engine a tenth slower: drafting, messages and verification keep
their speed."""


class Checked(NamedTuple):
    """The finding of `spdbench check` on spd: its exit code and, from the timing gate, the speed-up's change."""

    exit_code: int
    change: float | None = None
    interval: tuple[float, float] | None = None
    allowed: float | None = None

    def __str__(self) -> str:
        words = EXIT_WORDS.get(self.exit_code, f"exit code {self.exit_code}")
        if self.change is None or self.interval is None:
            return words
        return f"{words} {self.change:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


@dataclass(frozen=True)
class Bench:
    """The folder of the experiment, and the runs in it."""

    folder: Path
    chosen: argparse.Namespace

    def prepare(self) -> None:
        """Makes the folder with what its runs need; ends the program if it holds runs with other settings."""
        kept = ("limit", "tokens", "repeats", "slower_by", "drafter", "option", "dtypes", "threads")
        settings = {name: getattr(self.chosen, name) for name in kept}
        sides.require_same_settings(settings, self.folder / "settings.json", "--folder")
        info = self._site / "spdbench_gate_experiment-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(METADATA, "utf-8")
        (info / "entry_points.txt").write_text(ENTRY_POINTS, "utf-8")

    @property
    def _site(self) -> Path:
        return self.folder / "site"

    def timed(self, place: str, number: int, backend: str = "spd", options: Sequence[str] = ()) -> list[Path]:
        """The results of a run of vanilla and spd, for the timing gate."""
        words = ["--dtype", self.chosen.dtypes[0], "--drafter", self.chosen.drafter]
        return self._run(place, number, ["-b", "vanilla", "-b", f"spd={backend}", *words, *_options(options)])

    def counted(self, place: str, number: int, backend: str = "spd", options: Sequence[str] = ()) -> list[Path]:
        """The result of a run of spd alone, in float32, for the exact gate."""
        words = ["--dtype", "float32", "--drafter", "oracle:0.8"]
        return self._run(place, number, ["-b", f"spd={backend}", *words, *_options(options)])

    def _run(self, place: str, number: int, words: Sequence[str]) -> list[Path]:
        """The results of a finished run; an interrupted one is started again."""
        folder = self.folder / place
        results, done_file = f"quick__*__{number}.json", folder / f"done-{number}"
        if done_file.exists():
            return sorted(folder.glob(results))
        for left in folder.glob(f"quick__*__{number}.*"):
            left.unlink()
        chosen = self.chosen
        settings = ["--limit", chosen.limit, "--max-new-tokens", chosen.tokens, "--repeats", chosen.repeats]
        more = [*_options(chosen.option), "--threads", chosen.threads, "--results", folder, "--name", number]
        began = time.perf_counter()
        done = self._spdbench("run", "quick", *words, *settings, *more)
        if done.returncode != 0:
            sys.exit(f"{folder}: `spdbench run` ended with {done.returncode}:\n{done.stderr}")
        done_file.write_text(f"{time.perf_counter() - began:.1f}", "utf-8")
        print(f"{place} {number}: {done_file.read_text('utf-8')} s", flush=True)
        return sorted(folder.glob(results))

    def calibrate(self, place: str) -> None:
        done = self._spdbench("check", self.folder / place, "--baseline", self.folder / place, "--calibrate")
        print(done.stdout or done.stderr, flush=True)

    def check(self, new: Sequence[Path], place: str | Path, gate: str) -> Checked:
        """`place` is the baseline: a folder below ours, or a file."""
        report = self.folder / "check.json"
        done = self._spdbench("check", *new, "--baseline", self.folder / place, "--gate", gate, "--json", report)
        if done.returncode not in EXIT_WORDS:
            sys.exit(f"`spdbench check` ended with {done.returncode}:\n{done.stderr}")
        findings = [
            finding
            for judgement in json.loads(report.read_text("utf-8"))["judgements"]
            for finding in judgement["findings"]
            if finding["metric"] == "speedup"
        ]
        if not findings:
            return Checked(done.returncode)
        [found] = findings
        return Checked(done.returncode, found["change"], found["interval"], found["allowed"])

    def _spdbench(self, *words: object) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (self._site.resolve(), ROOT, ROOT / "backends")))
        command = [sys.executable, "-m", "spdbench", *map(str, words)]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )


def _options(words: Sequence[str]) -> list[str]:
    return [part for word in words for part in ("-o", f"spd.{word}")]


def main() -> None:
    sides.run("gate", parser(__doc__, together=5).parse_args(), measure)


def parser(doc: str | None, together: int) -> argparse.ArgumentParser:
    """The options of a benchmark that keeps runs of `spdbench run quick` in a folder; `doc` is its docstring."""
    arguments = sides.parser(doc, rounds=20, tokens=32)
    arguments.set_defaults(dtypes=["bfloat16"])
    arguments.add_argument("--folder", required=True, help="where runs are kept; may hold some already")
    arguments.add_argument(
        "--baselines", type=int, default=8, help="runs that are baseline and calibration (default 8)"
    )
    arguments.add_argument("--together", type=int, default=together, help=f"new runs a check (default {together})")
    arguments.add_argument("--limit", type=int, default=8, help="conversations of a run (default 8)")
    arguments.add_argument("--repeats", type=int, default=1, help="of each conversation (default 1)")
    arguments.add_argument("--slower-by", type=float, default=SLOWER_BY, help="share of a stage's time (default 0.115)")
    arguments.add_argument("--drafter", default="auto", help="of the timed runs (default auto)")
    arguments.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of spd, in every run")
    return arguments


def measure(chosen: argparse.Namespace, report: Report) -> None:
    bench = Bench(Path(chosen.folder), chosen)
    bench.prepare()
    for number in range(chosen.baselines):
        bench.timed("baseline", number)
    bench.calibrate("baseline")
    timed = [timed_round(bench, number) for number in range(chosen.rounds)]
    bench.counted("exact-baseline", 0)
    again = bench.check(bench.counted("exact-again", 0), "exact-baseline", "exact")
    print(f"exact gate on the same code: {again}", flush=True)
    rounds = [{**found, "rejecting": rejecting_round(bench, number)} for number, found in enumerate(timed)]
    report.tables["rounds"] = rounds
    counts = {side: Counter(each[side]["exit_code"] for each in rounds) for side in ("same", "slower", "rejecting")}
    show(
        ("side", *EXIT_WORDS.values()),
        [(side, *(found[code] for code in EXIT_WORDS)) for side, found in counts.items()],
    )
    print(f"slower code has {slowdown(rounds):.3f} of the same code's speed, over all rounds", flush=True)
    report.goals += goals(counts, chosen.rounds)


def rejecting_round(bench: Bench, number: int) -> dict[str, Any]:
    """The check of rejecting code, whose counts have no noise."""
    options = [f"every={EVERY}", f"first={number % EVERY + 1}"]
    found = bench.check(bench.counted("rejecting", number, "rejecting_spd", options), "exact-baseline", "exact")
    print(f"round {number + 1}: rejecting code {found}", flush=True)
    return found._asdict()


def timed_round(bench: Bench, number: int) -> dict[str, Any]:
    """The checks of the same code and of slower code, a few starts of each."""
    chosen = bench.chosen
    starts = range(number * chosen.together, (number + 1) * chosen.together)
    slower = [f"slower_by={chosen.slower_by}"]
    same = [file for start in starts for file in bench.timed("same", start)]
    slow = [file for start in starts for file in bench.timed("slower", start, "slower_spd", slower)]
    found = {name: bench.check(files, "baseline", "timing") for name, files in (("same", same), ("slower", slow))}
    print(f"round {number + 1}: same code {found['same']}; slower {found['slower']}", flush=True)
    return {name: checked._asdict() for name, checked in found.items()}


def slowdown(rounds: Sequence[dict[str, Any]]) -> float:
    """How slow the slower side really was: geometric mean of its change over that of the same code."""
    pairs = [(each["slower"]["change"], each["same"]["change"]) for each in rounds]
    return geometric_mean([slower / same for slower, same in pairs if slower and same] or [math.nan])


def goals(counts: dict[str, Counter[int]], rounds: int) -> list[Goal]:
    """The targets as shares: of 20 runs none, three and 18."""
    same = counts["same"]
    return [
        Goal("same code, share of regressions", (same[1] + same[4]) / rounds, at_most=0),
        Goal("same code, share of inconclusive", same[3] / rounds, at_most=3 / 20),
        Goal("slower code, share of regressions", counts["slower"][1] / rounds, at_least=18 / 20),
        Goal("rejecting code, share of regressions", counts["rejecting"][1] / rounds, at_least=1),
    ]


if __name__ == "__main__":
    main()
