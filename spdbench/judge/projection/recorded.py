"""What recorded results give to a projection: the verdict on each token, rounds, and how long each part took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spdbench.errors import InputError
from spdbench.judge.comparison.pairing import differences
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.schema import RunKey
from spdbench.judge.results.table import COLUMN, STEP_COLUMNS

EMITTED, DRAFTED, _, ACCEPTED = range(len(STEP_COLUMNS))
REMEASURE = "spdbench run {suite} -b vanilla -b spd -m {model} --dtype {dtype}"


@dataclass(frozen=True)
class Recorded:
    """Results of one workload, by kind. `vanilla` is None where there is none; the others may be empty."""

    vanilla: LoadedResult | None
    pipelines: tuple[LoadedResult, ...]
    rounds: tuple[LoadedResult, ...]

    @property
    def all(self) -> tuple[LoadedResult, ...]:
        return (*([self.vanilla] if self.vanilla else []), *self.pipelines, *self.rounds)

    @property
    def first(self) -> LoadedResult:
        return self.all[0]

    @property
    def num_layers(self) -> int:
        layers = self.first.head.model.num_layers
        assert layers is not None  # `sort_results` refused results that do not know it
        return layers

    @cached_property
    def context(self) -> float:
        """Tokens before a new one, on average over all of them."""
        runs = self.first.runs
        sums = runs.total(runs.answered)
        return float((sums[COLUMN["prompt_tokens"]] + sums[COLUMN["new_tokens"]] / 2) / max(1.0, sums[COLUMN["runs"]]))

    def remeasure(self) -> str:
        """The command that records what these results lack."""
        head = self.first.head
        return REMEASURE.format(suite=head.suite.name, model=head.model.id, dtype=head.model.dtype)


def sort_results(loaded: Sequence[LoadedResult]) -> Recorded:
    """Results by kind.

    Raises:
        InputError: they are not of one workload, or one of them has no recorded steps.
    """
    first = loaded[0]
    for each in loaded:
        if different := differences(first.head, each.head):
            raise InputError(
                f"{each.file}: does not fit {first.file}: they differ in {'; '.join(different)}. Project the results "
                "of one workload at a time."
            )
        _require_steps(each)
    by_kind = {
        kind: tuple(each for each in loaded if each.head.backend.kind == kind)
        for kind in ("autoregressive", "pipeline", "draft_verify")
    }
    plain = [each for each in by_kind["autoregressive"] if each.head.backend.name == "vanilla"]
    vanilla = next(iter([*plain, *by_kind["autoregressive"]]), None)
    found = Recorded(vanilla, by_kind["pipeline"], by_kind["draft_verify"])
    if not found.pipelines:
        raise InputError(
            f"{first.file}: there is no result of a pipeline among these, whose verdicts a projection replays. Measure "
            f"one: {found.remeasure()}"
        )
    return found


def _require_steps(result: LoadedResult) -> None:
    head, runs = result.head, result.runs
    lacking = {"drafts", "times"}.intersection(head.backend.unknown) if head.backend.kind != "autoregressive" else ()
    if lacking or head.model.num_layers is None:
        raise InputError(
            f"{result.file}: {head.backend.label} records no {' and '.join(sorted(lacking)) or 'model'} (a server's "
            "result), so there are no steps to project. Leave it out."
        )
    if not len(runs.answered) or not runs.total(runs.answered)[COLUMN["decode_tokens"]]:
        raise InputError(f"{result.file}: holds no run with decode steps. Measure again with `spdbench run`.")


def num_stages(result: LoadedResult) -> int:
    """Stages of a pipeline: the lanes that hold layers."""
    return sum(map(bool, result.head.backend.stage_layers)) or result.head.backend.lanes


def verdicts(result: LoadedResult) -> dict[RunKey, list[bool]]:
    """For each run of a pipeline: was the draft of each token after the first accepted. A token without a draft counts
    as a rejection, for it flushes the pipeline too."""
    found = {}
    for key in result.runs.answered:
        steps = result.runs.steps_of(key)
        committed = steps[:, steps[EMITTED] > 0][:, 1:]
        found[key] = (committed[ACCEPTED] > 0).tolist()
    return found


def with_acceptance(sequence: Sequence[bool], change: float, rng: np.random.Generator) -> list[bool]:
    """`sequence` with so much more (or less) of it accepted, in shares of all verdicts as they were drawn."""
    draws = rng.random(len(sequence))
    rate = sum(sequence) / max(1, len(sequence))
    if change >= 0:
        turned = min(1.0, change / (1 - rate)) if rate < 1 else 0.0
        return [bool(each or draw < turned) for each, draw in zip(sequence, draws, strict=True)]
    turned = min(1.0, -change / rate) if rate else 0.0
    return [bool(each and draw >= turned) for each, draw in zip(sequence, draws, strict=True)]


@dataclass(frozen=True)
class Rounds:
    """One request of a draft-verify method: how many rounds, their mean rows and drafted levels."""

    num: int
    rows: float
    levels: float


def rounds_of(result: LoadedResult) -> dict[RunKey, Rounds]:
    """The rounds of each run after prefill."""
    runs, found = result.runs, {}
    for key in result.runs.answered:
        steps = runs.steps_of(key)[:, 1:]
        num = steps.shape[1]
        forwards = runs.sums[runs.row_of[key], COLUMN["forwards"]]
        found[key] = Rounds(num, float(forwards) / max(1, num), float(steps[DRAFTED].mean()) if num else 0.0)
    return found


def part_seconds(result: LoadedResult, part: str) -> float | None:
    """Seconds of one piece of a part (`layer`, `head`, `draft`, `verify`), on average; None where none was recorded."""
    total = result.runs.total(result.runs.answered)
    num = total[COLUMN[f"{part}_num"]]
    return float(total[COLUMN[f"{part}_part_s"]] / num) if num else None


def host_seconds(result: LoadedResult) -> float:
    """Seconds a cycle in which lanes waited for messages and the host (the bubble's part `host`), on average."""
    total = result.runs.total(result.runs.answered)
    measured, steps = total[COLUMN["measured_s"]], total[COLUMN["steps"]]
    return float(total[COLUMN["host"]] / steps) if measured and steps else 0.0


def start_seconds(result: LoadedResult) -> float:
    """Seconds that a request takes before its first cycle, such as the drafter's reading of the prompt: what the first
    cycle takes longer than the first after a rejection, which enters an empty pipeline too; the median over runs."""
    runs, first, others = result.runs, [], []
    for key in runs.answered:
        row = runs.row_of[key]
        gaps = runs.gaps_ns[runs.ends[row] - runs.num_steps[row] : runs.ends[row]]
        steps = runs.steps_of(key)
        flushes = np.flatnonzero((steps[EMITTED, 1:-1] > 0) & (steps[ACCEPTED, 1:-1] == 0)) + 2
        first += gaps[1:2].tolist()
        others += gaps[flushes].tolist()
    if not first or not others:
        return 0.0
    return max(0.0, float(np.median(first) - np.median(others))) / 1e9
