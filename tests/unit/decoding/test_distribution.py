"""Quantiles of sampled tokens: by hand, uniform for what follows the target, and a control that is not."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.distribution import PlainDistribution
from spdbench.judge.metrics.chi_square import ChiSquare, chi_square
from spdbench.models.interface import TargetDecoder
from spdbench.types import GenerationRequest, Sampling
from tests import tiny

PROMPT = (1, 2, 3)
WARPED = Sampling(0.8, top_p=0.9, top_k=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TargetDecoder:
    folder: Path = tmp_path_factory.mktemp("small")
    return tiny.load(tiny.make_model(folder, vocab_size=5, num_hidden_layers=2, seed=4)).decoder


def test_a_quantile_is_what_is_likelier_and_a_part_of_the_token_itself(small: TargetDecoder) -> None:
    plain = PlainDistribution(small, PROMPT, WARPED, 3)
    for answer in [(4, 0, 2), (1, 1, 1), (0, 3, 4)]:  # one after the other: nothing stays of the one before
        for number, found in enumerate(plain.quantiles(answer, (0.0, 0.25, 0.5))):
            p = tiny.next_probabilities(small, PROMPT + answer[:number], WARPED)
            own = p[answer[number]]
            likelier = sum(other for other in p if other > own)
            expected = None if own == 0.0 else likelier + own * (0.0, 0.25, 0.5)[number]
            assert found == pytest.approx(expected, abs=1e-6)


def drawn_and_claimed(small: TargetDecoder, sampling: Sampling, claimed: Sampling) -> ChiSquare:
    """Answers drawn at `sampling` against the distribution at `claimed`."""
    plain, numbers = PlainDistribution(small, PROMPT, claimed, 2), random.Random(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        answer = tuple(decode(small, GenerationRequest(PROMPT, (), 2, sampling, seed, frozenset())))
        found = plain.quantiles(answer, (numbers.random(), numbers.random()))
        counts[tuple(-1 if quantile is None else int(4 * quantile) for quantile in found)] += 1
    return chi_square(counts, dict.fromkeys(product(range(4), repeat=2), 1 / 16))


@pytest.mark.parametrize("sampling", [Sampling(1.0), WARPED], ids=["plain", "warped"])
def test_answers_of_plain_decoding_are_uniform(small: TargetDecoder, sampling: Sampling) -> None:
    assert drawn_and_claimed(small, sampling, sampling).p_value > 1e-3


def test_answers_of_another_temperature_are_not(small: TargetDecoder) -> None:
    assert drawn_and_claimed(small, Sampling(1.0), Sampling(0.5)).p_value < 1e-6


def test_what_the_warp_excludes_is_impossible(small: TargetDecoder) -> None:
    found = drawn_and_claimed(small, Sampling(1.0), Sampling(1.0, top_k=2))
    assert found.impossible > 0
    assert found.p_value == 0.0
