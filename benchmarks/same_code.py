"""Tests that `spdbench check` never ends with 1 for runs of the same code, whichever way they are given.

Why: people name single files, folders of one start or of several, with a calibration and without; a red build for
noise in any of these ways is a gate that is switched off.
Regimes: `spdbench run quick` with vanilla and spd, each run a fresh process. Some runs are the baseline; each round is
one more, held against them by both gates: spd's file alone against one file, both labels against one start, against all
starts, and against all starts with their calibration.
Output: a line a round with the exit codes, then how often each came, and the targets. Runs are kept in `--folder`, as
by `benchmarks.gate`, so that the same command continues after an interruption.

    python -m benchmarks.same_code --folder DIR [--rounds 20] [--baselines 8] [--together 1] [--limit 8] [--tokens 32]
                                   [--repeats 1] [--drafter auto] [--option executor=inline]
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gate import EXIT_WORDS, Bench, parser
from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, show

WAYS = ("single files", "one start", "all starts", "calibrated")


def main() -> None:
    sides.run("same_code", parser(__doc__, together=1).parse_args(), measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    bench = Bench(Path(chosen.folder), chosen)
    bench.prepare()
    starts = [bench.timed("all starts", number) for number in range(chosen.baselines)]
    _copy(starts[:1], bench.folder / "one start")
    _copy(starts, bench.folder / "calibrated")
    bench.calibrate("calibrated")
    [alone] = [file.resolve() for file in starts[0] if "__spd__" in file.name]
    counts = {way: Counter[int]() for way in WAYS}
    rounds = []
    for number in range(chosen.rounds):
        together = range(number * chosen.together, (number + 1) * chosen.together)
        new = [file for start in together for file in bench.timed("same", start)]
        found = {"single files": bench.check([file for file in new if "__spd__" in file.name], alone, "all")}
        found |= {way: bench.check(new, way, "all") for way in WAYS[1:]}
        for way, checked in found.items():
            counts[way][checked.exit_code] += 1
        rounds.append({way: checked.exit_code for way, checked in found.items()})
        print(f"round {number + 1}: " + "; ".join(f"{way} {checked}" for way, checked in found.items()), flush=True)
    report.tables["rounds"] = rounds
    show(("way", *EXIT_WORDS.values()), [(way, *(counts[way][code] for code in EXIT_WORDS)) for way in WAYS])
    report.goals += [Goal(f"{way}: exit code 1", counts[way][1], at_most=0) for way in WAYS]


def _copy(starts: Sequence[Sequence[Path]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for start in starts:
        for file in start:
            shutil.copy(file, folder / file.name)


if __name__ == "__main__":
    main()
