"""What all benchmarks share: alternating sides, statistics of their times, and a description of the machine.

Absolute times on a shared machine mean little, so sides alternate in one run and are compared round by round: other
load that slows one side of a round mostly slows the other, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tabulate import tabulate

from spdbench.measure.environment import environment, git_state, read_bandwidth_bytes_per_s

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Row = dict[str, Any]


def take_turns(sides: Mapping[Key, Callable[[], Result]], rounds: int) -> dict[Key, list[Result]]:
    """Runs every side once to warm up, unrecorded, then all in turn, `rounds` times: A B, A B, ..."""
    for side in sides.values():
        side()
    results: dict[Key, list[Result]] = {key: [] for key in sides}
    for _ in range(rounds):
        for key, side in sides.items():
            results[key].append(side())
    return results


@dataclass(frozen=True)
class Spread:
    """The rounds' values, their median, quartiles and extremes."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    rounds: tuple[float, ...]


def spread(values: Iterable[float]) -> Spread:
    rounds = tuple(values)
    q1, q3 = (float(quartile) for quartile in np.percentile(rounds, (25, 75)))
    return Spread(statistics.median(rounds), q1, q3, min(rounds), max(rounds), rounds)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Spread of `over` / `under`, round by round."""
    return spread(a / b for a, b in zip(over, under, strict=True))


def mean_by_round(series: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each round over several series of rounds."""
    return [statistics.fmean(each) for each in zip(*series, strict=True)]


@dataclass(frozen=True)
class Goal:
    """A measured number with its target."""

    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        high_enough = self.at_least is None or self.measured >= self.at_least
        return high_enough and (self.at_most is None or self.measured <= self.at_most)

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        target = " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)
        return f"{self.what}: {self.measured:.2f} (target: {target}; {'met' if self.met else 'missed'})"


@dataclass
class Report:
    """A benchmark's findings: tables of raw rows by name, and goals."""

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    read_bandwidth_bytes_per_s: Mapping[str, int]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def as_json(self) -> str:
        goals = [{**asdict(goal), "met": goal.met} for goal in self.goals]
        return json.dumps({**asdict(self), "goals": goals}, indent=1)


def parser(doc: str | None, rounds: int, tokens: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `doc` is the script's docstring."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=_positive, default=rounds, help=f"turns of each side (default {rounds})")
    arguments.add_argument("--tokens", type=_positive, default=tokens, help=f"tokens a turn (default {tokens})")
    arguments.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default: torch's own")
    arguments.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    arguments.add_argument("--json", type=_writable, metavar="FILE", help="write all numbers there")
    return arguments


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file in a folder that exists")
    return path


def run(name: str, chosen: argparse.Namespace, measure: Callable[[argparse.Namespace, Report], None]) -> None:
    """Runs `measure` with the chosen threads, measures the read bandwidth before and after, prints and writes a report.

    `measure` prints its tables as they come and adds them to the report. Its figures need an otherwise idle machine: a
    load average well above 0 at the start shows that it was not.
    """
    torch.set_num_threads(chosen.threads)
    machine = {**environment(), "load_average": os.getloadavg()[0], "spdbench_git": git_state()}
    bandwidth = {"before": machine.pop("read_bandwidth_bytes_per_s"), "after": 0}
    settings = {key: value for key, value in vars(chosen).items() if key != "json"}
    report = Report(name, settings, machine, bandwidth)
    measure(chosen, report)
    torch.set_num_threads(chosen.threads)
    bandwidth["after"] = read_bandwidth_bytes_per_s()
    for goal in report.goals:
        print(goal)
    versions = machine["versions"]
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; read bandwidth {bandwidth['before'] / 1e9:.1f} GB/s before, "
        f"{bandwidth['after'] / 1e9:.1f} after; load average {machine['load_average']:.1f} before"
    )
    if chosen.json:
        chosen.json.write_text(report.as_json() + "\n", encoding="utf-8")


def require_same_settings(settings: object, file: Path, option: str) -> None:
    """Writes `settings` into `file`, next to the runs made with them. Ends the program if it holds other settings,
    since one table must not mix both."""
    text = json.dumps(settings, indent=1, default=str)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text("utf-8") != text:
        sys.exit(f"{file.parent} holds runs with other settings ({file}); choose another {option}")
    file.write_text(text, "utf-8")


def show(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table."""
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True), end="\n\n", flush=True)


def milliseconds(seconds: Spread) -> str:
    """`19.5 (19.4 to 19.7)`: the median, and the extremes."""
    return f"{seconds.median * 1e3:.1f} ({seconds.min * 1e3:.1f} to {seconds.max * 1e3:.1f})"


def times(ratios: Spread) -> str:
    """`1.98x (1.95 to 2.01)`: the median, and the quartiles."""
    return f"{ratios.median:.2f}x ({ratios.q1:.2f} to {ratios.q3:.2f})"
