"""Sequences in a batch must equal those decoded alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spdbench.decoding.sampling import warp
from spdbench.errors import PromptFailedError
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.training.distill import batched
from spdbench.training.distill.batched import Slots
from spdbench.training.distill.continuous import TOP_K, Batch, Completion, Script, choose, likeliest, results_of
from spdbench.types import Sampling
from tests import tiny

PROMPTS = [tuple(range(start, start + length)) for start, length in ((30, 11), (5, 3), (100, 40), (64, 1), (7, 22))]
LIMITS = (40, 9, 70, 25, 1)


def vanilla(
    decoder: TargetDecoder, prompt: tuple[int, ...], limit: int, eos: frozenset[int] = frozenset()
) -> list[int]:
    """Greedy ids by one forward a token."""
    cache, unread, new = decoder.new_cache(len(prompt) + limit), prompt, list[int]()
    with torch.inference_mode():
        while len(new) < limit and not eos.intersection(new[-1:]):
            hidden, _ = decoder.forward(decoder.embed(decoder.ids(unread)), cache.length, cache)
            new.append(int(decoder.logits(hidden[-1:])[0].argmax()))
            unread = (new[-1],)
    return new


def greedy(ids: tuple[int, ...], limit: int, eos: frozenset[int] = frozenset()) -> Completion:
    return Completion(ids, limit, Sampling(), 0, eos)


def once(number: int, request: Completion) -> Script[tuple[int, list[int]]]:
    return number, list((yield request))


def scripts(eos: frozenset[int] = frozenset()) -> Iterator[Script[tuple[int, list[int]]]]:
    return (once(i, greedy(*pair, eos)) for i, pair in enumerate(zip(PROMPTS, LIMITS, strict=True)))


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(batched, "has_cpu_kernels", lambda *_: False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_greedy_rows_are_vanillas_token_for_token(family: str, tmp_path: Path) -> None:
    decoder = tiny.load(tiny.make_model(tmp_path, family)).own_decoder
    found = dict(filter(None, Batch(Slots(decoder, 3, 128), scripts()).results()))
    assert [found[i] for i in range(len(PROMPTS))] == [
        vanilla(decoder, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)
    ]


@pytest.mark.usefixtures("kernels")
def test_eos_ends_a_row_and_counts(decoder: Decoder) -> None:
    eos = frozenset({vanilla(decoder, PROMPTS[0], 6)[-1]})
    found = dict(filter(None, Batch(Slots(decoder, 2, 128), scripts(eos)).results()))
    assert found[0] == vanilla(decoder, PROMPTS[0], LIMITS[0], eos)
    assert found[0][-1] in eos


def test_threads_find_what_one_finds(decoder: Decoder) -> None:
    shared = scripts()
    lock = threading.Lock()
    batches = [Batch(Slots(decoder, 2, 128), shared, lock) for _ in range(2)]
    results = results_of(batches, 2)
    found = dict(filter(None, results))
    assert found == dict(filter(None, Batch(Slots(decoder, 3, 128), scripts()).results()))


def test_error_in_a_thread_reaches_the_caller(decoder: Decoder) -> None:
    shared = (once(i, greedy(PROMPTS[0], 1000)) for i in range(4))
    with pytest.raises(IndexError, match="cannot hold"):
        list(results_of([Batch(Slots(decoder, 1, 64), shared, threading.Lock()) for _ in range(2)], 2))


def test_a_continued_request_reads_only_what_is_new(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    read = Slots.read

    def counted(slots: Slots, ids: list[int | None]) -> torch.Tensor:
        steps.append(ids)
        return read(slots, ids)

    monkeypatch.setattr(Slots, "read", counted)

    def two_requests() -> Script[list[int]]:
        first = yield greedy(PROMPTS[0], 5)
        return list((yield greedy((*PROMPTS[0], *first, 3), 4)))

    (found,) = filter(None, Batch(Slots(decoder, 1, 64), iter([two_requests()])).results())
    assert found == vanilla(decoder, (*PROMPTS[0], *vanilla(decoder, PROMPTS[0], 5), 3), 4)
    assert len(steps) == len(PROMPTS[0]) + 5 + 1 + 4 - 1


def test_script_without_a_request_ends_at_once(decoder: Decoder) -> None:
    def nothing() -> Script[str]:
        yield from ()
        return "done"

    assert list(Batch(Slots(decoder, 2, 8), iter([nothing(), nothing()])).results()) == ["done", "done"]


def test_draws_follow_the_warped_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(1000, 1)
    points = [i / 1000 for i in range(1000)]
    tokens = choose(logits, [Sampling(1.0, 0.9)] * 1000, points)
    assert [tokens.count(i) for i in range(4)] == pytest.approx([526, 316, 158, 0], abs=2)


def test_weights_are_those_of_the_warp_that_decoding_uses() -> None:
    logits_RV = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2)) * 3
    samplings = [Sampling(0.7, 0.5), Sampling(1.0, 0.95), Sampling(1.3)]
    ids_RN, weights_RN = likeliest(logits_RV, samplings)
    found_RV = torch.zeros(3, 1000).scatter_(1, ids_RN, weights_RN / weights_RN.sum(-1, keepdim=True))
    expected = [warp(row, replace(how, top_k=TOP_K)) for row, how in zip(logits_RV, samplings, strict=True)]
    torch.testing.assert_close(found_RV, torch.stack(expected))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9)])
def test_logits_that_are_not_numbers_end_the_run(sampling: Sampling) -> None:
    with pytest.raises(PromptFailedError, match="logits are not numbers"):
        choose(torch.tensor([[1.0, torch.nan, 0.0]]), [sampling], [0.5])


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 5.0, 0.0], [0.0, 0.0, 3.0]])
    assert choose(logits, [Sampling(), Sampling(1.0), Sampling()], [0.0, 0.999, 0.0])[::2] == [1, 2]


def test_point_at_the_very_end_draws_a_token_that_may_be_drawn() -> None:
    tokens = choose(torch.tensor([[9.0, 8.0, -50.0]]), [Sampling(1.0, 0.5)], [0.9999999999999999])
    assert tokens == [0]
