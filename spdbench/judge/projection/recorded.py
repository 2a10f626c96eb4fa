"""What recorded results give to a projection: the verdict on each token, rounds, and how long each part took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from spdbench.errors import InputError
from spdbench.judge.comparison.pairing import differences
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.stats import SEED
from spdbench.judge.results.schema import RunKey
from spdbench.judge.results.table import COLUMN, STEP_COLUMNS

EMITTED, DRAFTED, _, ACCEPTED = range(len(STEP_COLUMNS))
MIN_STAGES = 2
"""Of one stage there is no slowest."""
DRAWS, HALVINGS, LEAST_SIGMA, MAX_SIGMA = 4_096, 20, 1e-3, 1.5
STEADY = 0.1
"""How far rounds may be from the usual number of rows, on average and as a share of it, for their mean time to be that
of a round of so many."""
REMEASURE = "spdbench run {suite} -b vanilla -b spd -m {model} --dtype {dtype}"


@dataclass(frozen=True)
class Recorded:
    """Results of one workload, by kind. `vanilla` is None where there is none; the others may be empty. `unused` are
    further results of plain decoding."""

    vanilla: LoadedResult | None
    pipelines: tuple[LoadedResult, ...]
    rounds: tuple[LoadedResult, ...]
    unused: tuple[LoadedResult, ...] = ()

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
        return REMEASURE.format(suite=quote(head.suite.name), model=quote(head.model.id), dtype=quote(head.model.dtype))

    def profile_command(self) -> str:
        """What measures the costs that results do not hold, and how a projection reads them."""
        model = self.first.head.model
        profile = f"spdbench profile -m {quote(model.id)} --dtype {quote(model.dtype)} -o profile.json"
        return f"{profile}, then --profile profile.json"


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
    others = tuple(each for each in by_kind["autoregressive"] if each is not vanilla)
    found = Recorded(vanilla, by_kind["pipeline"], by_kind["draft_verify"], others)
    if not found.pipelines:
        raise InputError(
            f"{first.file}: there is no result of a pipeline among these, whose verdicts a projection replays. Measure "
            f"one: {found.remeasure()}"
        )
    return found


def has_steps(result: LoadedResult) -> bool:
    """True if a projection can read the result."""
    try:
        _require_steps(result)
    except InputError:
        return False
    return True


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


def verdicts(result: LoadedResult, num_stages: int | None = None) -> dict[RunKey, list[int]]:
    """For each run of a pipeline the verdict on the draft of each token after the first: 0 for a rejection, else in how
    many cycles the next verdict came. That is 1, or more where a branch was accepted that had entered later, but no
    more than a flush of `num_stages` takes, or of as many as were recorded. A token without a draft counts as rejected,
    for it flushes the pipeline too."""
    found, most = {}, num_stages or result.head.backend.num_stages
    for key in result.runs.answered:
        steps = result.runs.steps_of(key)
        at = np.flatnonzero(steps[EMITTED] > 0)[1:]
        gaps = np.minimum(np.diff(at, append=at[-1:] + 1), most)
        found[key] = np.where(steps[ACCEPTED, at] > 0, gaps, 0).tolist()
    return found


def with_acceptance(sequence: Sequence[int], change: float, rng: np.random.Generator) -> list[int]:
    """`sequence` with so much more (or less) of it accepted, in shares of all verdicts as they were drawn."""
    draws = rng.random(len(sequence))
    rate = sum(map(bool, sequence)) / max(1, len(sequence))
    if change >= 0:
        turned = min(1.0, change / (1 - rate)) if rate < 1 else 0.0
        return [each or int(draw < turned) for each, draw in zip(sequence, draws, strict=True)]
    turned = min(1.0, -change / rate) if rate else 0.0
    return [each if draw >= turned else 0 for each, draw in zip(sequence, draws, strict=True)]


def rows_a_stage(result: LoadedResult) -> float:
    """Rows that a busy stage of a pipeline works on in a cycle, on average: 1 without branches, of which `max_rows`
    tells."""
    runs, layers = result.runs, [count for count in result.head.backend.stage_layers if count]
    if not layers or "max_rows" not in result.head.backend.chosen:
        return 1.0
    shares = np.cumsum(layers) / sum(layers)  # of the layers, those at work in each cycle after a flush
    rows = one = 0.0
    for key in runs.answered:
        rows += float(runs.sums[runs.row_of[key], COLUMN["forwards"]])
        since = 0
        for emitted, accepted in runs.steps_of(key)[[EMITTED, ACCEPTED], 1:].T.tolist():
            one += shares[min(since, len(layers) - 1)]
            since = 0 if emitted and not accepted else since + 1
    return max(1.0, float(rows / one)) if one else 1.0


def stage_sigma(result: LoadedResult) -> float:
    """How the times of a pipeline's stages scatter, as the standard deviation of their logarithm: with it the slowest
    of the stages takes on average what it took in cycles with all of them at work. 0 where that was not recorded."""
    total, backend = result.runs.total(result.runs.answered), result.head.backend
    layer, head = part_seconds(result, "layer"), part_seconds(result, "head") or 0.0
    if layer is None or not total[COLUMN["cycles"]] or backend.num_stages < MIN_STAGES:
        return 0.0
    means = np.array([count * layer for count in backend.stage_layers[: backend.num_stages]])
    if len(backend.stage_layers) == backend.num_stages:
        means[-1] += head
    slowest = total[COLUMN["stage_s"]] / total[COLUMN["cycles"]]
    draws = np.random.default_rng(SEED).standard_normal((DRAWS, len(means)))
    low, high = 0.0, MAX_SIGMA
    for _ in range(HALVINGS):
        sigma = (low + high) / 2
        factors = np.exp(sigma * draws)
        expected = (means * factors / factors.mean(axis=0)).max(axis=1).mean()
        low, high = (sigma, high) if expected < slowest else (low, sigma)
    return low if low > LEAST_SIGMA else 0.0


@dataclass(frozen=True)
class Rounds:
    """One request of a draft-verify method: how many rounds, their mean rows and drafted levels, and how many drafts
    each accepted [num]."""

    num: int
    rows: float
    levels: float
    accepted: NDArray[np.integer]

    @property
    def is_chain(self) -> bool:
        """True if no round drafted two tokens for one place."""
        return bool(np.isclose(self.rows, self.levels + 1)) or not self.num


def rounds_of(result: LoadedResult) -> dict[RunKey, Rounds]:
    """The rounds of each run after prefill."""
    runs, found = result.runs, {}
    for key in result.runs.answered:
        steps = runs.steps_of(key)[:, 1:]
        num = steps.shape[1]
        forwards = runs.sums[runs.row_of[key], COLUMN["forwards"]]
        found[key] = Rounds(
            num, float(forwards) / max(1, num), float(steps[DRAFTED].mean()) if num else 0.0, steps[ACCEPTED]
        )
    return found


def steady_rows(result: LoadedResult) -> float | None:
    """Rows of a round's forward, on average, where nearly all rounds have as many; else None."""
    drafted = [result.runs.steps_of(key)[DRAFTED, 1:] for key in result.runs.answered]
    rounds = np.concatenate([*drafted, np.zeros(0, np.int64)])
    usual = np.bincount(rounds).argmax() if len(rounds) else 0
    if not usual or abs(rounds - usual).mean() > STEADY * (1 + usual):
        return None
    total = result.runs.total(result.runs.answered)
    return float(total[COLUMN["forwards"]] / total[COLUMN["steps"]])


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
