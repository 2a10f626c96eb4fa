"""The accept rules: exact distributions, and a negative control that must fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft, verify_draft
from spdbench.judge.metrics.chi_square import chi_square
from spdbench.types import Sampling

TARGET = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0, 0.7, 1.3])
DRAFTER = torch.tensor([0.0, 1.5, -0.5, 1.0, 0.4, 0.0, 0.7, -2.0])
DRAWS = 20_000


def outcomes(make_draft: Callable[[Tensor, Sampler], Draft], sampling: Sampling) -> Counter[object]:
    sampler = Sampler(sampling, 17)
    counts: Counter[object] = Counter()
    for _ in range(DRAWS):
        counts[verify_draft(TARGET, make_draft(sampler.probabilities(DRAFTER), sampler), sampler).token_id] += 1
    return counts


def exact(sampling: Sampling) -> dict[object, float]:
    return dict(enumerate(Sampler(sampling, 0).probabilities(TARGET).tolist()))


def drawn(drafted: Tensor, sampler: Sampler) -> Draft:
    return Draft(sampler.draw(drafted), drafted)


def picked(drafted: Tensor, sampler: Sampler) -> Draft:  # noqa: ARG001
    return Draft(int(drafted.argmax()))


def picked_but_verified_as_drawn(drafted: Tensor, sampler: Sampler) -> Draft:  # noqa: ARG001
    return Draft(int(drafted.argmax()), drafted)


SAMPLINGS = [Sampling(1.0), Sampling(0.7), Sampling(1.0, top_p=0.8), Sampling(0.9, top_k=4)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("make_draft", [drawn, picked])
def test_what_comes_out_follows_the_target(make_draft: Callable[[Tensor, Sampler], Draft], sampling: Sampling) -> None:
    assert chi_square(outcomes(make_draft, sampling), exact(sampling)).p_value > 1e-4 / (2 * len(SAMPLINGS))


def test_the_rule_for_drawn_drafts_on_picked_ones_is_caught() -> None:
    """The negative control: were this test unable to fail, the ones above would prove nothing."""
    assert chi_square(outcomes(picked_but_verified_as_drawn, Sampling(1.0)), exact(Sampling(1.0))).p_value < 1e-9


def test_greedy_accepts_the_argmax_alone() -> None:
    sampler = Sampler(Sampling(), 0)
    assert verify_draft(TARGET, Draft(3), sampler) == verify_draft(TARGET, Draft(3, DRAFTER.softmax(0)), sampler)
    assert verify_draft(TARGET, Draft(3), sampler).accepted
    rejected = verify_draft(TARGET, Draft(0), sampler)
    assert (rejected.accepted, rejected.token_id) == (False, 3)


def test_a_draft_that_the_target_gives_no_mass_is_rejected_even_at_u_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Sampling(1.0, top_k=2), 0)
    monkeypatch.setattr(sampler, "uniform", lambda: 0.0)
    assert not verify_draft(TARGET, Draft(5), sampler).accepted


def test_equal_distributions_never_reject() -> None:
    sampler = Sampler(Sampling(1.0), 5)
    same = sampler.probabilities(TARGET)
    assert all(verify_draft(TARGET, Draft(sampler.draw(same), same), sampler).accepted for _ in range(2000))


def test_a_rejection_without_residual_mass_draws_from_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Sampling(1.0), 5)
    same = sampler.probabilities(TARGET)
    draws = iter([1.0, 0.5])  # u = 1 cannot happen; it forces the rejection that rounding might
    monkeypatch.setattr(sampler, "uniform", lambda: next(draws))
    verdict = verify_draft(TARGET, Draft(3, same), sampler)
    assert not verdict.accepted
    assert 0 <= verdict.token_id < 8
