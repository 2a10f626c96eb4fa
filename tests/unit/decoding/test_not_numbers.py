"""NaN among a model's logits: the prompt fails and says so, and the next one is answered as ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.decoding.sampling import Sampler, draw_rows
from spdbench.errors import PromptFailedError
from spdbench.models.layer_ops import NOT_NUMBERS, argmax, next_tokens
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling
from tests import tiny

BAD = 7
CASES = [
    ("vanilla", {}, "auto"),
    ("vanilla", {"graphs": "on"}, "auto"),
    ("ngram", {"min_ngram": "1", "max_ngram": "1"}, "auto"),
    ("ngram", {"min_ngram": "1", "max_ngram": "1", "graphs": "on"}, "auto"),
    ("eagle", {"tree": "chain"}, "random"),
    ("eagle", {"tree": "static", "graphs": "on"}, "random"),
    ("medusa", {"tree": "chain"}, "random"),
    ("draft_model", {}, "oracle:0.7"),
    ("spd", {"executor": "inline", "stages": "3"}, "random"),
    ("spd", {"executor": "streams", "stages": "3"}, "random"),
    ("ppsd", {"executor": "inline", "stages": "2"}, "random"),
]


def request(*prompt: int, sampling: Sampling) -> GenerationRequest:
    return GenerationRequest(prompt, (), 16, sampling, 3, frozenset())


@contextmanager
def nan_embedding(target: Target, token: int) -> Iterator[None]:
    """A token's embedding is NaN, as a value that overflows becomes within a layer."""
    table_VM = target.own_decoder.embeddings_VM
    assert table_VM is not None
    row = table_VM[token]
    before = row.clone()
    with torch.inference_mode():
        row.fill_(torch.nan)
        yield
        row.copy_(before)


def answer(backend: Backend, asked: GenerationRequest) -> list[int]:
    backend.prepare(asked)
    return [token for step in backend.generate(asked) for token in step.token_ids]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_the_prompt_fails_and_the_next_is_answered_as_before(
    tiny_model: Path, name: str, options: dict[str, str], drafter: str, sampling: Sampling
) -> None:
    if not sampling.greedy and drafter.startswith("oracle"):
        pytest.skip("an oracle knows greedy answers only")
    target, cls = tiny.load(tiny_model), find_backend(name)
    backend = cls(parse_options(name, cls.Options, options), BackendContext(name, target, drafter, ("cpu",), 1, seed=0))
    backend.load()
    good = request(*range(30, 41), sampling=sampling)
    before = answer(backend, good)
    for prompt in ((30, BAD, 31), (*range(30, 60), BAD)):
        with nan_embedding(target, BAD), pytest.raises(PromptFailedError, match=r"logits are not numbers \(NaN\)"):
            answer(backend, request(*prompt, sampling=sampling))
        assert answer(backend, good) == before
    backend.close()


def test_in_the_middle_of_an_answer_tokens_so_far_have_been_emitted(tiny_model: Path) -> None:
    target, cls = tiny.load(tiny_model), find_backend("vanilla")
    backend = cls(cls.Options(), BackendContext("vanilla", target, "auto", ("cpu",), 1, seed=0))
    backend.load()
    good = request(*range(30, 41), sampling=Sampling())
    expected = answer(backend, good)
    found: list[int] = []
    with nan_embedding(target, expected[2]), pytest.raises(PromptFailedError):
        found.extend(token for step in backend.generate(good) for token in step.token_ids)
    assert found == expected[: expected.index(expected[2]) + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 63, 64, 150, 299])
def test_one_nan_among_many_logits_is_found_at_any_place(dtype: torch.dtype, place: int) -> None:
    logits = torch.zeros(3, 300, dtype=dtype)
    logits[:, 20] = 5.0
    logits[1, place] = torch.nan
    assert argmax(logits).tolist() == [20, place, 20]
    assert next_tokens(logits).tolist() == [20, NOT_NUMBERS, 20]
    assert int(next_tokens(logits[1])) == NOT_NUMBERS
    with pytest.raises(PromptFailedError):
        Sampler(Sampling(), 0).choose(logits[1])


def test_a_draw_from_weights_with_nan_is_refused() -> None:
    weights = torch.tensor([[0.5, 0.5], [torch.nan, 0.5]])
    assert draw_rows(weights, torch.tensor([0.7, 0.7], dtype=torch.float64)).tolist() == [1, NOT_NUMBERS]
    with pytest.raises(PromptFailedError):
        Sampler(Sampling(temperature=1.0), 0).draw(weights[1])


def test_infinite_logits_are_numbers() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf])
    assert int(next_tokens(logits)) == 1
    assert int(next_tokens(torch.tensor([0.0, torch.inf]))) == 1
