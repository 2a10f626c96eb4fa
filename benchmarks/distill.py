"""How fast `spdbench distill` writes training data, in tokens of answers and user turns per second.

Why: a drafter needs half a million tokens of data or more, so this speed decides whether one can be trained on a
machine without a GPU.
Regimes: the embedded model on the CPU writes user turns and answers with the command's own settings, in a new process
to a new file each time, always with the same seed. The clock is the command's own, which excludes loading the model.
With fewer than 12,800 tokens there are fewer than 128 conversations at a time, which is slower.
Output: one row per dtype: generated tokens per second, and those of them that were kept as answers (without user turns,
dropped conversations and those unfinished at the end), medians with the extremes. The goal is for the former in
bfloat16 on two cores. Each dtype is warmed up once.

    python -m benchmarks.distill [--rounds 3] [--tokens 20000] [--threads 2] [--dtypes bfloat16] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, Row, Spread, show, spread, take_turns
from benchmarks.shared.workload import MODEL

MIN_TOKENS_PER_S = {"bfloat16": 400.0}


def main() -> None:
    arguments = sides.parser(__doc__, rounds=3, tokens=20_000)
    arguments.set_defaults(dtypes=["bfloat16"])
    sides.run("distill", arguments.parse_args(), measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    turns = take_turns({dtype: partial(distilled, dtype, chosen) for dtype in chosen.dtypes}, chosen.rounds)
    rows = [row(dtype, found) for dtype, found in turns.items()]
    report.tables["distill"] = rows
    for each in rows:
        if least := MIN_TOKENS_PER_S.get(each["dtype"]):
            what = f"generated tokens/s, {each['dtype']}"
            report.goals.append(Goal(what, each["generated_per_s"].median, at_least=least))
    keys = ("generated_per_s", "kept_per_s", "seconds")
    show(
        ["dtype", "generated tokens/s", "kept tokens/s", "seconds"],
        [[each["dtype"], *(figures(each[key]) for key in keys)] for each in rows],
    )


def row(dtype: str, found: Sequence[dict[str, Any]]) -> Row:
    """The figures of one dtype from the summaries of its files."""
    return {
        "dtype": dtype,
        "generated_per_s": spread(each["generated_tokens"] / each["seconds"] for each in found),
        "kept_per_s": spread(each["tokens"] / each["seconds"] for each in found),
        "seconds": spread(each["seconds"] for each in found),
    }


def figures(values: Spread) -> str:
    """`412 (405 to 420)`: the median, and the extremes."""
    return f"{values.median:.0f} ({values.min:.0f} to {values.max:.0f})"


def distilled(dtype: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The summary of a data file made in a new process, whose progress goes to stderr."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "data.jsonl")
        subprocess.run([sys.executable, "-m", "spdbench", *words(dtype, chosen, out)], check=True)
        found: dict[str, Any] = json.loads(out.with_name("data.jsonl.summary.json").read_bytes())
        return found


def words(dtype: str, chosen: argparse.Namespace, out: Path) -> list[str]:
    options = [f"--tokens={chosen.tokens}", f"--threads={chosen.threads}", f"--dtype={dtype}", "--devices=cpu"]
    return ["distill", f"--out={out}", f"--model={MODEL}", *options]


if __name__ == "__main__":
    main()
