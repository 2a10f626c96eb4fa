"""The verdict on one drafted token, exactly lossless.

Greedy: accepted iff it is the target's argmax. Sampling (Leviathan et al., arXiv 2211.17192, Chen et al., arXiv
2302.01318): with target p and draft q, both warped, accept x with probability min(1, p(x) / q(x)); on refusal draw
from the normalised max(p - q, 0). A draft that was not drawn but picked has a one-hot q: accept with probability
p(x), on refusal draw from p without x. Must not know of pipelines, trees or caches.

Shapes: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spdbench.decoding.sampling import Sampler


@dataclass(frozen=True)
class Draft:
    """A proposed token; `probabilities_V` is the distribution that it was drawn from, None if it was picked."""

    token_id: int
    probabilities_V: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """`token_id` is what comes out either way: the draft, or the target's correction."""

    accepted: bool
    token_id: int


def judge(logits_V: Tensor, draft: Draft, sampler: Sampler) -> Verdict:
    """The target's logits for a position against the token drafted for it."""
    if sampler.greedy:
        best = int(logits_V.argmax())
        return Verdict(best == draft.token_id, best)
    target_V = sampler.probabilities(logits_V)
    token, draft_V = draft.token_id, draft.probabilities_V
    likelihood = 1.0 if draft_V is None else float(draft_V[token])
    # Strictly less: a token that the target gives no mass must not pass when u is 0.
    if sampler.uniform() * likelihood < float(target_V[token]):
        return Verdict(True, token)
    if draft_V is None:
        residual_V = target_V.clone()
        residual_V[token] = 0.0
    else:
        residual_V = (target_V - draft_V).clamp_(min=0.0)
    if not float(residual_V.sum()) > 0.0:  # p equals q up to rounding, so a refusal has no probability to speak of
        residual_V = target_V
    return Verdict(False, sampler.draw(residual_V))
