"""What an audit found of each backend: does it give plain decoding's outputs, and if not, why. The verdict in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from spdbench.judge.metrics.chi_square import ChiSquare
from spdbench.types import DivergenceClass, FirstDivergence

AuditVerdict = Literal["lossless", "lossless but for rounding", "NOT lossless", "faulty", "unknown", "not audited"]

SIGNIFICANCE = 1e-3
"""Probability that an audit calls a distribution wrong that is right; shared by all backends (Bonferroni)."""
POWER = 0.95
MAX_DIFFERENT_SHARE, MIN_DIFFERENT = 0.1, 3
"""Rounds whose drafts are others from scratch: rounding turns a few."""


@dataclass(frozen=True)
class PromptDivergence:
    """One first divergence: the request, and both tokens as text."""

    prompt_id: str
    turn: int
    expected: str
    found: str
    divergence: FirstDivergence


@dataclass
class Restarts:
    """Rounds that were run again from scratch, with all tokens before them as the prompt: a drafter whose state holds
    only what was committed proposes the same again, and gets the same verdicts."""

    compared: int = 0
    different: int = 0

    @property
    def is_stale(self) -> bool:
        return self.different >= max(MIN_DIFFERENT, MAX_DIFFERENT_SHARE * self.compared)


@dataclass
class Ends:
    """Requests in which a token of the answer's middle ends the sequence. `wrong`: other tokens up to it; `overrun`:
    the backend went on after the step that held it."""

    compared: int = 0
    wrong: int = 0
    overrun: int = 0


@dataclass
class BackendAudit:
    """Everything that an audit found of one label."""

    label: str
    backend: str
    kernels: str
    not_audited: str | None = None
    outcomes: Counter[DivergenceClass] = field(default_factory=Counter)
    divergences: list[PromptDivergence] = field(default_factory=list)
    restarts: Restarts = field(default_factory=Restarts)
    ends: Ends = field(default_factory=Ends)
    sampled: ChiSquare | None = None
    failed: list[str] = field(default_factory=list)
    significance: float = SIGNIFICANCE

    @property
    def verdict(self) -> AuditVerdict:
        if self.not_audited is not None:
            return "not audited"
        if self.outcomes["real"] or self.ends.wrong or self.is_skewed:
            return "NOT lossless"
        if self.failed or self.restarts.is_stale or self.ends.overrun:
            return "faulty"
        if self.outcomes["unclassified"] or not (self.outcomes or (self.sampled and self.sampled.degrees)):
            return "unknown"
        rounding = self.outcomes["tie"] + self.outcomes["near_tie"]
        return "lossless but for rounding" if rounding else "lossless"

    @property
    def is_skewed(self) -> bool:
        """True if sampled answers do not follow the target's distribution."""
        return self.sampled is not None and self.sampled.p_value < self.significance

    @property
    def exit_code(self) -> int:
        """1: a finding; 3: it cannot be known."""
        return {"NOT lossless": 1, "faulty": 1, "unknown": 3, "not audited": 3}.get(self.verdict, 0)

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        if self.not_audited is not None:
            return f"not audited: {self.not_audited}."
        return f"{self.verdict}. {'; '.join(self._facts())}."

    def _facts(self) -> Iterator[str]:
        compared = self.outcomes.total()
        if compared:
            yield f"{self.outcomes['identical']} of {compared} outputs are plain decoding's"
        if self.outcomes["real"]:
            yield f"{self.outcomes['real']} differ by more than a tie or rounding explains"
        if rounding := self.outcomes["tie"] + self.outcomes["near_tie"]:
            yield f"{rounding} differ first where both tokens' logits are equal or within rounding of each other"
        if unknown := self.outcomes["unclassified"]:
            yield f"of {unknown} it cannot be known whether a tie explains them, as the engine reports no logits"
        if self.ends.wrong:
            yield f"{self.ends.wrong} of {self.ends.compared} answers change if one of their tokens ends the sequence"
        if self.ends.overrun:
            yield f"{self.ends.overrun} of {self.ends.compared} answers go on after the end of sequence"
        if self.restarts.is_stale:
            yield (
                f"its drafts get other verdicts from scratch in {self.restarts.different} of {self.restarts.compared} "
                "rounds, so its drafter keeps a state of tokens that were rejected (outputs stay right, speed does not)"
            )
        elif self.restarts.compared:
            same = self.restarts.compared - self.restarts.different
            yield f"{same} of {self.restarts.compared} rounds drafted again from scratch get the same verdicts"
        if self.sampled is not None:
            yield from self._sampling_facts(self.sampled)
        if self.failed:
            yield f"{len(self.failed)} requests failed, first: {self.failed[0]}"

    def _sampling_facts(self, sampled: ChiSquare) -> Iterator[str]:
        if not sampled.degrees:
            yield f"{sampled.draws} sampled answers are too few for a test: raise --draws"
            return
        if sampled.impossible:  # in addition to the test, whose p is 0 then
            yield f"{sampled.impossible} of their tokens are excluded by top-k or top-p"
        yield (
            f"{sampled.draws} sampled answers {'do not follow' if self.is_skewed else 'follow'} the target's exact "
            f"distribution (chi-square {sampled.statistic:.1f} of {sampled.degrees} degrees, p = {sampled.p_value:.2g})"
        )
        apart = sampled.detectable(self.significance, POWER)
        yield f"a deviation of {apart:.1%} (total variation) would have been found with a probability of {POWER:.0%}"
