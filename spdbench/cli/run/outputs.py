"""How outputs in `run` and `audit` compare with plain decoding's: the first divergence, and its class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from spdbench.backend import engine_logits
from spdbench.decoding.divergence import OtherEngine, first_divergence
from spdbench.judge.results.schema import Run
from spdbench.measure.request_turn import RequestTurn
from spdbench.measure.runner import Candidate
from spdbench.models.target import Target
from spdbench.types import FirstDivergence


@dataclass(frozen=True)
class OutputComparer:
    """Compares runs of the same request by `target`."""

    target: Target

    def __call__(self, candidate: Candidate, turn: RequestTurn, expected: Run, found: Run) -> FirstDivergence | None:
        """Where and why the candidate's run `found` differs from plain decoding's; None if it does not."""
        if expected.output_ids == found.output_ids:
            return None
        return first_divergence(
            self.target.decoder,
            turn.request.prompt_ids,
            expected.output_ids,
            found.output_ids,
            _widths(found),
            other_engine(candidate),
        )


def other_engine(candidate: Candidate) -> OtherEngine | None:
    """The engine that computes the candidate's model; None where the target's own layers do."""
    logits, other_model = engine_logits(candidate.backend), candidate.backend.describe().other_model
    return None if logits is None and other_model is None else OtherEngine(logits, same_model=other_model is None)


def _widths(run: Run) -> Collection[int]:
    """The numbers of rows of a run's forwards after prefill."""
    return {max(1, round(rows)) for rows in run.steps.forwards[1:]}
