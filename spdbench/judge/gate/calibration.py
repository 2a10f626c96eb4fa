"""What slowdown a gate may take seriously: found from runs of the same code (A/A), which differ by noise alone.

With x the logarithm of a metric in each of K runs, d = sqrt(mean of (x_i - x_j)^2 over all pairs) is how far two runs
of the same code lie apart, between-run noise included. Of two further runs one falls behind the other by more than

    s = 1 - exp(-t * d)        t: the 99.9 % quantile of Student's t with K - 1 degrees of freedom

once in 1,000 times, if the logarithms are normal; t counts in that d is itself an estimate from few runs. The mean of M
runs falls behind the mean of B others by less: s = 1 - exp(-t * d * sqrt((1 / M + 1 / B) / 2)).

Source: G. Hahn and W. Meeker, "Statistical Intervals" (1991), chapter 4 (prediction of a further observation).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spdbench.console import counted
from spdbench.errors import InputError, NotComparableError, first_problem
from spdbench.input_files import json_record
from spdbench.judge.comparison.pairing import concurrency, machine, workload
from spdbench.judge.gate.counterpart import reference
from spdbench.judge.gate.timing import SPEED, SPEEDUP
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.stats import t_quantile
from spdbench.judge.results.schema import Result, RunKey

SCHEMA = "spdbench.calibration/1"
MIN_RUNS = 5
ONE_SIDED = 0.999
MIN_LIMIT = 0.01
"""A slowdown of less than this is not worth a red build, however quiet the machine is."""
WIDE = 0.25
"""A gate that allows a slowdown of more than this finds hardly any; so much noise comes from a busy machine."""

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Threshold(BaseModel):
    """For one metric of one label: `spread` is d, over `num_runs` runs; `max_slowdown` is s against one run. `work`
    hashes all that the runs were asked to do, and `num_answers` is how many answers each of them measured, with so many
    `requests_at_once`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str
    label: str
    model: str
    dtype: str
    work: str
    metric: Literal["speedup", "decode_tokens_per_s"]
    num_runs: Annotated[int, Field(ge=2)]
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    max_slowdown: Share
    num_answers: Annotated[int, Field(ge=1)] | None = None
    requests_at_once: Annotated[int, Field(ge=1)] = 1

    def slowdown(self, num_new: int, num_baselines: int) -> float:
        """s of the mean of so many runs against that of so many others."""
        return slowdown(self.spread, self.num_runs, num_new, num_baselines)

    def fits(self, result: LoadedResult, metric: str) -> bool:
        """True for the same work in no fewer answers: fewer of them (`--limit`, `--repeats`) have more noise."""
        same = (self.work, self.label, self.metric) == (work_of(result.head), result.label, metric)
        return same and len(result.runs.keys) >= (self.num_answers or 0)


class Calibration(BaseModel):
    """The noise of one machine, by its fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["spdbench.calibration/1"] = Field(alias="schema")
    created: str
    fingerprint: str
    thresholds: list[Threshold]

    @property
    def max_slowdown(self) -> float:
        """One slowdown for all labels: the largest of the thresholds that decide."""
        deciding = [each.max_slowdown for each in self.thresholds if each.metric == SPEEDUP]
        return max(deciding or [each.max_slowdown for each in self.thresholds])

    def find(self, result: LoadedResult, metric: str) -> Threshold | None:
        """What was found of a label's `metric`; None if that was not calibrated on this machine."""
        if result.head.environment.get("fingerprint") != self.fingerprint:
            return None
        return next((each for each in self.thresholds if each.fits(result, metric)), None)

    def merged_with(self, older: Calibration) -> Calibration:
        """Adds what `older` holds of other labels and other work of this machine."""
        if older.fingerprint != self.fingerprint:
            return self
        known = {(each.work, each.label, each.metric) for each in self.thresholds}
        kept = [each for each in older.thresholds if (each.work, each.label, each.metric) not in known]
        return self.model_copy(update={"thresholds": [*self.thresholds, *kept]})


def calibrate(results: Sequence[LoadedResult]) -> Calibration:
    """Thresholds from repeated runs of the same code.

    Raises:
        InputError: a label has fewer than `MIN_RUNS` runs, or nothing was decoded.
        NotComparableError: the runs are not of one machine, or not of the same prompts.
    """
    groups: dict[str, list[LoadedResult]] = {}
    for each in results:
        groups.setdefault(workload(each.head) + each.label, []).append(each)
    _check(results, list(groups.values()))
    thresholds = [found for group in groups.values() for found in _thresholds(group, results)]
    return Calibration(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=str(results[0].head.environment["fingerprint"]),
        thresholds=thresholds,
    )


def _check(results: Sequence[LoadedResult], groups: Sequence[Sequence[LoadedResult]]) -> None:
    machines = {machine(each.head) for each in results}
    if len(machines) > 1 or not results[0].head.environment.get("fingerprint"):
        raise NotComparableError(
            f"--calibrate: the runs are of {len(machines)} machines (environment.fingerprint); noise is one machine's"
        )
    for group in groups:
        if len(group) < MIN_RUNS:
            raise InputError(
                f"--calibrate: {counted(len(group), 'result')} of the label '{group[0].label}', and {MIN_RUNS} are the "
                "fewest. Run the same code that often, with a --name or --results of its own each time."
            )
        first_turn = min((turn for each in group for _, turn, _ in each.runs.keys), default=0)
        prompts = {frozenset(pair for pair in each.runs.asked if pair[0][1] == first_turn) for each in group}
        if len(prompts) > 1 or any(each.runs.failed.any() for each in group):
            raise NotComparableError(
                f"--calibrate: the results of the label '{group[0].label}' are not of the same prompts, all answered"
            )


def _thresholds(group: Sequence[LoadedResult], results: Sequence[LoadedResult]) -> Iterator[Threshold]:
    """For the speed-up, where each run has plain decoding too; and for tokens/s. Of later turns, whose prompts hold the
    answers before them, those that were the same in all runs count."""
    in_all = set.intersection(*(set(each.runs.asked) for each in group))
    keys = [key for key, prompt in group[0].runs.asked if (key, prompt) in in_all]
    rates = [_rate(each, keys) for each in group]
    references = ((each, reference(each, results)) for each in group)
    plain = [other for each, other in references if other is not None and other is not each]
    if len(plain) == len(group):
        over = [_rate(other, keys) for other in plain]
        yield _threshold(group[0], SPEEDUP, [a / b for a, b in zip(rates, over, strict=True)])
    elif plain:
        raise NotComparableError(
            f"--calibrate: {len(group) - len(plain)} of {len(group)} results of the label '{group[0].label}' have no "
            "plain decoding of their own run among the results"
        )
    yield _threshold(group[0], SPEED, rates)


def _rate(result: LoadedResult, keys: Sequence[RunKey]) -> float:
    if any(key not in result.runs.row_of for key in keys):
        raise NotComparableError(f"--calibrate: {result.file} lacks prompts that were measured in its run")
    tokens, seconds = result.runs.rates(keys).sum(axis=0)
    if not (tokens and seconds):
        raise InputError(f"--calibrate: {result.file}: no tokens were decoded after the first")
    return float(tokens / seconds)


def _threshold(
    one: LoadedResult, metric: Literal["speedup", "decode_tokens_per_s"], values: Sequence[float]
) -> Threshold:
    """From the values of a metric in runs of which `one` is one."""
    head = one.head
    spread = distance([math.log(value) for value in values])
    return Threshold(
        suite=head.suite.name,
        label=head.backend.label,
        model=head.model.id,
        dtype=head.model.dtype,
        work=work_of(head),
        metric=metric,
        num_runs=len(values),
        spread=spread,
        max_slowdown=slowdown(spread, len(values), num_new=1, num_baselines=1),
        num_answers=len(one.runs.keys),
        requests_at_once=concurrency(head),
    )


def work_of(head: Result) -> str:
    """The same for results that did the same work."""
    return hashlib.sha256(workload(head).encode()).hexdigest()[:16]


def slowdown(spread: float, num_runs: int, num_new: int, num_baselines: int) -> float:
    """s above, from d over `num_runs` runs."""
    distance_of_means = spread * math.sqrt((1 / num_new + 1 / num_baselines) / 2)
    return max(MIN_LIMIT, -math.expm1(-t_quantile(ONE_SIDED, num_runs - 1) * distance_of_means))


def distance(logarithms: Sequence[float]) -> float:
    """d above: the root of the mean squared distance of two of them."""
    squares = [(a - b) ** 2 for a, b in combinations(logarithms, 2)]
    return math.sqrt(sum(squares) / len(squares))


def parse_calibration(text: bytes | str) -> Calibration:
    """Raises `ValueError` in one line if `text` is no calibration."""
    try:
        return json_record(Calibration, text)
    except ValidationError as error:
        loc, reason = first_problem(error)
        raise ValueError(": ".join(filter(None, [".".join(loc), reason]))) from None
