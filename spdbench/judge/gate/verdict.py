"""What a gate reports: a finding on one metric, the judgement of one label, and the exit code that follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from spdbench.judge.results.schema import Result, RunKey

GateVerdict = Literal["regression", "not comparable", "inconclusive", "improved", "pass"]
Gate = Literal["exact", "timing"]
WORST_FIRST: tuple[GateVerdict, ...] = get_args(GateVerdict)
"""Where several hold, the first of them is the verdict of all."""
EXIT_CODES: dict[GateVerdict, int] = {
    "regression": 1,
    "not comparable": 4,
    "inconclusive": 3,
    "improved": 0,
    "pass": 0,
}


@dataclass(frozen=True)
class Finding:
    """One verdict: on one metric, over all prompts or those of one `category`.

    `before` and `now` are the metric's values; `change` is their ratio with its 95 % `interval`, and `allowed` the
    share that it may fall by. A finding that does not decide is there to inform, and leaves the exit code alone.
    """

    gate: Gate
    metric: str
    verdict: GateVerdict
    reason: str
    before: float | None = None
    now: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    allowed: float | None = None
    category: str | None = None
    decides: bool = True


@dataclass(frozen=True)
class Judgement:
    """Everything found of one label. `file` is None for a label that only the baseline has, `against` for one that
    only the new results have; `head` is that of either."""

    label: str
    file: str | None
    against: str | None
    head: Result
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> GateVerdict:
        return worst(finding.verdict for finding in self.findings if finding.decides)


def worst(verdicts: Iterable[GateVerdict]) -> GateVerdict:
    """The verdict of all `verdicts` together; `pass` for none."""
    found = set(verdicts)
    return next((verdict for verdict in WORST_FIRST if verdict in found), "pass")


def verdict_of(judgements: Iterable[Judgement]) -> GateVerdict:
    return worst(judgement.verdict for judgement in judgements)


def name_of(key: RunKey) -> str:
    """`maths-1`, with turn and repeat where they are not the first."""
    prompt, turn, repeat = key
    return prompt + f" turn {turn}" * bool(turn) + f" repeat {repeat}" * bool(repeat)
