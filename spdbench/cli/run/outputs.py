"""How outputs compare with plain decoding's, or with a plain server's: the first divergence, and its class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from spdbench.backend import Answer, divergence_explainer, engine_logits
from spdbench.decoding.divergence import OtherEngine, first_divergence
from spdbench.judge.results.schema import Run
from spdbench.measure.request_turn import RequestTurn
from spdbench.measure.runner import Candidate, Runner
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


def compare_servers(runner: Runner) -> None:
    """Records how each other server's greedy answers differ from the first one's, where both say that they run the same
    model, by the first one's own log-probabilities. Untimed; for when all is measured."""
    first, *others = runner.candidates
    explain = divergence_explainer(first.backend)
    model = first.backend.describe().other_model
    others = [
        each for each in others if each.backend.describe().other_model == model and divergence_explainer(each.backend)
    ]
    if explain is None or not others or not runner.workload.sampling.greedy:
        return
    for prompt in runner.workload.prompts:
        for turn in runner.turns(prompt):
            expected = first.journal.run(turn.key)
            for other in others:
                found = other.journal.run(turn.key)
                is_open = turn.key not in other.journal.outcomes and found.prompt_sha256 == expected.prompt_sha256
                if is_open and "error" not in (expected.finish_reason, found.finish_reason):
                    answers = [Answer(run.output_ids, run.text or "") for run in (expected, found)]
                    other.journal.add_comparison(turn.key, explain(turn.request, answers[0], answers[1], other.backend))


def _widths(run: Run) -> Collection[int]:
    """The numbers of rows of a run's forwards after prefill."""
    return {max(1, round(rows)) for rows in run.steps.forwards[1:]}
