"""When drafts that cost nothing to make are worth their rows: how often such drafts are right, against what a row adds.

The target's forward of a round takes longer with every drafted row, whether the draft is right or not. What it adds is
an option and not measured, so that a run drafts the same tokens on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from pydantic import Field

from spdbench_backends.local import GraphOptions

K = TypeVar("K", bound=Hashable)
PRIOR_WEIGHT = 6
MEMORY = 100
"""Drafts that a rate remembers: long enough to be steady, short enough to follow a text from prose into a table."""


class WeighedOptions(GraphOptions):
    """Options of the methods that weigh each draft against its row."""

    row_cost: float = Field(
        0.07,
        ge=0,
        le=10,
        description="what each drafted row adds to a forward, relative to one row; rows that are not likely to earn "
        "it are not drafted; 0: always draft",
    )
    earlier_answers: bool = Field(
        False, description="also look at earlier answers of the run; results then depend on the order of prompts"
    )

    @property
    def memory(self) -> str:
        """What results say of where drafts come from."""
        return "prompt, answer and earlier answers of the run" if self.earlier_answers else "prompt and answer"


class Rates(Generic[K]):
    """How often drafts of each kind were right: a running mean that begins at `prior` and forgets slowly."""

    def __init__(self, prior: Callable[[K], float]) -> None:
        self._prior = prior
        self._rates: dict[K, float] = {}
        self._counts: dict[K, int] = {}

    def __getitem__(self, kind: K) -> float:
        return self._rates[kind] if kind in self._rates else self._prior(kind)

    def add(self, kind: K, *, right: bool) -> None:
        count = self._counts[kind] = min(self._counts.get(kind, PRIOR_WEIGHT) + 1, MEMORY)
        rate = self[kind]
        self._rates[kind] = rate + (right - rate) / count


def worthwhile(chances: Iterable[float], row_cost: float) -> int:
    """How many drafts, of those whose chances to be accepted come in order, give most tokens for a round's time: the n
    with the largest (1 + sum of n chances) / (1 + n row_cost)."""
    best, best_rate, tokens = 0, 1.0, 1.0
    for count, chance in enumerate(chances, 1):
        tokens += chance
        if (rate := tokens / (1 + count * row_cost)) > best_rate:
            best, best_rate = count, rate
    return best
