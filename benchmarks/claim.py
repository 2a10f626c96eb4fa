"""Reproduces the claim of speculative pipeline decoding: spd with 2 to 10 stages against ppsd, EAGLE and Medusa.

Why: the paper (arXiv 2605.30852) measures large models with one GPU per stage; users have other models, other drafters
and fewer devices. Here every method has a drafter trained on the same data, and one clock measures all.
Regimes: the embedded model in bfloat16, `quick` and the first prompts of MT-Bench, GSM8K and HumanEval, at
temperatures 0 and 1, all backends interleaved in one run per suite and temperature. Stages are processes; where there
are more of them than processors, tokens/s show what this machine achieves, `ideal` what a device per stage would, and
`ideal a device` what each of these would add.
Output: `table.md`, one row per suite, temperature and label, with 95 % intervals; `learning.md`, held-out acceptance
against tokens seen for every drafter; `rows.csv`, all metrics. Results stay in `--results`; a run that is complete
there is not repeated, and one that was interrupted is resumed.

    python -m benchmarks.claim --data DIR [--drafters DIR] [--out results/claim] [--suites ...] [--stages ...]
                              [--temperatures 0 1] [--limit 20] [--sampled-limit 8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.shared import sides
from spdbench.judge.comparison.compare import Row, Table, compare
from spdbench.judge.loaded import read_results
from spdbench.models.checkpoints.weights import sha256_of_files
from spdbench.render.export import to_csv
from spdbench.training.loop import expected_length

SUITES = ("quick", "mtbench", "gsm8k", "humaneval")
STAGES = (2, 3, 5, 10)
PPSD_STAGES = 3
DRAFTERS = ("eagle3", "medusa", "ppsd-3", "spd")
SHIPPED = Path("spdbench/drafters")
ABSENT = "-"
HEADER = (
    "suite",
    "T",
    "label",
    "accept",
    "tau or equivalent",
    "ideal",
    "ideal a device",
    "speed-up",
    "per device",
    "bubble",
    "tok/s",
    "identical",
    "degenerate",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="where MT-Bench and GSM8K are")
    arguments.add_argument("--drafters", type=Path, default=SHIPPED, help=f"a folder of {', '.join(DRAFTERS)}")
    arguments.add_argument("--logs", type=Path, default=Path("results/training"))
    arguments.add_argument("--results", type=Path, default=Path("results/claim-runs"))
    arguments.add_argument("--out", type=Path, default=Path("results/claim"))
    arguments.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    arguments.add_argument("--temperatures", nargs="+", type=float, default=(0.0, 1.0))
    arguments.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=STAGES)
    arguments.add_argument("--limit", type=int, default=20, help="conversations of a suite (default 20)")
    arguments.add_argument("--sampled-limit", type=int, default=8, help="the same above temperature 0 (default 8)")
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    chosen = arguments.parse_args()
    hold(chosen)
    tables = [
        table
        for suite, temperature in product(chosen.suites, chosen.temperatures)
        for table in compare(read_results(measured(suite, temperature, chosen)))
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "table.md").write_text(shown(tables), encoding="utf-8")
    (chosen.out / "rows.csv").write_text(to_csv(tables), encoding="utf-8")
    (chosen.out / "learning.md").write_text(learning(chosen.logs), encoding="utf-8")
    print(shown(tables))


def hold(chosen: argparse.Namespace) -> None:
    """Exits if `--results` holds runs with other settings or drafters."""
    kept = ("limit", "sampled_limit", "max_new_tokens", "drafters", "stages")
    weights = [path for name in DRAFTERS if (path := chosen.drafters / name / "model.safetensors").exists()]
    settings = {name: getattr(chosen, name) for name in kept} | {"weights": sha256_of_files(weights)}
    sides.require_same_settings(settings, chosen.results / "settings.txt", "--results")


def measured(suite: str, temperature: float, chosen: argparse.Namespace) -> list[Path]:
    """The results of one run, which is made or resumed unless it is complete."""
    name = f"t{temperature:g}"
    labels = ["vanilla", "eagle", "medusa", "ngram", "ppsd", *(f"spd-{stages}" for stages in chosen.stages)]
    files = [chosen.results / f"{suite}__{label}__smollm2__{name}.json" for label in labels]
    if are_whole(files):
        return files
    command = [sys.executable, "-m", "spdbench", "run", suite, f"--name={name}", f"--results={chosen.results}"]
    limit = chosen.sampled_limit if temperature else chosen.limit
    command += [f"--limit={limit}", f"--max-new-tokens={chosen.max_new_tokens}", f"--data={chosen.data}"]
    command += [f"--temperature={temperature:g}", "--resume", *words_of_backends(chosen.drafters, chosen.stages)]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1) or not are_whole(files):
        sys.exit(f"{' '.join(command)}: exit code {code}; the same command goes on from there")
    return files


def are_whole(files: Sequence[Path]) -> bool:
    """True if all exist and none is left to resume: an interrupted run leaves a journal next to its result."""
    return all(file.exists() and not file.with_name(f"{file.stem}.journal.jsonl").exists() for file in files)


def words_of_backends(drafters: Path, every_stages: Sequence[int]) -> Iterator[str]:
    yield from ("-b", "vanilla", "-b", "eagle", "-b", "medusa", "-b", "ngram", "-b", "ppsd")
    yield from ("--drafter", f"eagle={drafters / 'eagle3'}", "--drafter", f"medusa={drafters / 'medusa'}")
    yield from ("--drafter", f"ppsd={drafters / f'ppsd-{PPSD_STAGES}'}", "-o", f"ppsd.stages={PPSD_STAGES}")
    for stages in every_stages:
        label = f"spd-{stages}"
        yield from ("-b", f"{label}=spd", "-o", f"{label}.stages={stages}")
        yield from ("--drafter", f"{label}={drafters / 'spd'}")


def shown(tables: Sequence[Table]) -> str:
    rows = [list(cells(table, row)) for table in tables for row in table.rows]
    return tabulate(rows, HEADER, tablefmt="github", disable_numparse=True) + "\n"


def cells(table: Table, row: Row) -> Iterator[str]:
    metrics, backend = row.metrics, row.head.backend
    pipeline = backend.kind == "pipeline"
    yield table.head.suite.name
    yield f"{table.head.decoding.temperature:g}"
    yield row.label
    yield with_interval(metrics, "acceptance_rate", ".1%")
    yield with_interval(metrics, "equivalent_acceptance_length" if pipeline else "acceptance_length", ".2f")
    yield with_interval(metrics, "ideal_speedup", ".2f")
    ideal = metrics["ideal_speedup"]
    yield ABSENT if ideal is None else f"{ideal / (backend.lanes or 1):.2f}"
    for name in ("speedup", "speedup_per_device"):
        yield ABSENT if row.is_baseline else with_interval(metrics, name, ".2f")
    yield with_interval(metrics, "bubble_ratio", ".0%")
    yield f"{metrics['decode_tokens_per_s']:.1f}"
    yield f"{row.outputs.num_identical}/{row.outputs.num_compared}" if row.outputs else ABSENT
    yield f"{metrics['num_degenerate']}/{metrics['num_runs']}"


def with_interval(metrics: Mapping[str, Any], name: str, form: str) -> str:
    value, interval = metrics.get(name), metrics.get(f"{name}_ci")
    if value is None:
        return ABSENT
    if not interval:
        return format(value, form)
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def learning(logs: Path) -> str:
    """Held-out acceptance of the first draft, and expected drafts in a row, at every evaluation: of each run of
    training, which holds out conversations of its own, a table."""
    header = ["drafter", "tokens seen", "first draft accepted", "tokens a round, as a chain"]
    runs = [logs, *sorted(path for path in logs.iterdir() if path.is_dir())]
    tables = [tabulate(list(curves(run)), header, tablefmt="github", disable_numparse=True) for run in runs]
    titles = [f"Run {number}, on the conversations that it held out:" for number in range(1, len(runs) + 1)]
    return "\n\n".join(f"{title}\n\n{table}" for title, table in zip(titles, tables, strict=True)) + "\n"


def curves(logs: Path) -> Iterator[list[str]]:
    for file in sorted(logs.glob("*.jsonl")):
        tokens = 0
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            tokens += entry.get("tokens", entry.get("learned_before", 0))
            if rates := entry.get("acceptance"):
                yield [file.stem, f"{tokens:,}", f"{rates[0]:.1%}", f"{1 + expected_length(rates):.2f}"]


if __name__ == "__main__":
    main()
