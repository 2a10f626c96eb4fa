"""Warping and drawing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdbench.decoding.sampling import Sampler, warp
from spdbench.types import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def test_temperature_one_is_softmax() -> None:
    torch.testing.assert_close(warp(LOGITS, Sampling(1.0)), LOGITS.softmax(0))


def test_temperature_divides_logits() -> None:
    torch.testing.assert_close(warp(LOGITS, Sampling(0.5)), (LOGITS * 2).softmax(0))


def test_top_k_keeps_the_k_best_and_renormalises() -> None:
    kept = warp(LOGITS, Sampling(1.0, top_k=2))
    assert kept.nonzero().flatten().tolist() == [0, 4]
    assert float(kept.sum()) == pytest.approx(1.0)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    # softmax of LOGITS: 0.234, 0.086, 0.032, 0.012, 0.636
    assert warp(LOGITS, Sampling(1.0, top_p=0.6)).nonzero().flatten().tolist() == [4]
    assert warp(LOGITS, Sampling(1.0, top_p=0.64)).nonzero().flatten().tolist() == [0, 4]


@given(st.integers(0, 2**32), st.floats(0.2, 2.0), st.floats(0.1, 1.0), st.integers(0, 12))
def test_warping_equals_transformers(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = warp(logits, Sampling(temperature, top_p, top_k))
    # A cumulative mass that equals top_p up to rounding may fall to either side.
    if float((scores[0].softmax(0) - found).abs().max()) > 1e-5:
        mass = (logits / temperature).softmax(0).sort(descending=True).values.cumsum(0)
        assert float((mass - top_p).abs().min()) < 1e-5


def test_greedy_takes_the_argmax() -> None:
    assert Sampler(Sampling(), 0).choose(LOGITS) == 4


def test_the_same_seed_draws_the_same_tokens() -> None:
    draws = [[Sampler(Sampling(1.0), seed).choose(LOGITS) for _ in range(1)] for seed in (5, 5)]
    assert draws[0] == draws[1]
    a, b = Sampler(Sampling(1.0), 1), Sampler(Sampling(1.0), 2)
    assert [a.choose(LOGITS) for _ in range(40)] != [b.choose(LOGITS) for _ in range(40)]


def test_draws_follow_the_weights_and_never_hit_zero() -> None:
    sampler = Sampler(Sampling(1.0), 3)
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    counts = Counter(sampler.draw(weights) for _ in range(4000))
    assert set(counts) == {1, 3}
    assert counts[3] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_draw_at_the_very_top_of_the_range_still_has_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Sampling(1.0), 0)
    monkeypatch.setattr(sampler, "uniform", lambda: 1.0)
    assert sampler.draw(torch.tensor([1.0, 2.0, 0.0])) == 1
