"""Forward passes that are recorded and replayed give the bits of those that run layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdbench.decoding.tree import from_paths
from spdbench.models import decoder as decoder_module
from spdbench.models.attention_context import TreeRows
from spdbench.models.cpu.recorded_forward import MAX_RECORDINGS, MAX_ROWS
from spdbench.models.decoder import Decoder
from spdbench.models.interface import CancelledForwardError
from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import has_cpu_kernels
from tests import tiny

pytestmark = pytest.mark.skipif(
    not has_cpu_kernels(torch.float32, torch.device("cpu")), reason="there are no compiled kernels here"
)
TREE = from_paths([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)]).rows
PIECES: list[tuple[int, TreeRows | None]] = [
    (5, None),
    (1, None),
    (3, None),
    (1, None),
    (6, TREE),
    (1, None),
    (3, None),
]
"""Rows of one forward after the other; after each but the first, one row is forgotten again."""


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.make_model(tmp_path / "model", request.param)


def passes(decoder: Decoder, layers: range, states: tuple[int, ...]) -> list[Tensor]:
    """All that a few passes through `layers` give."""
    found: list[Tensor] = []
    with torch.inference_mode():
        cache = decoder.new_cache(40, layers)
        for number, (count, tree) in enumerate(PIECES):
            rows_SM = tiny.tensor(count, decoder.config.hidden_size, seed=number).to(decoder.dtype)
            last_SM, named = decoder.forward(rows_SM, cache.length, cache, layers, states, tree)
            found += [last_SM, *(named[index] for index in sorted(named))]
            if number and tree is None:
                cache.rollback(cache.length - 1)
            elif tree is not None:
                cache.keep(cache.length - count, (0, 2, 4))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [range(6), range(2, 5)])
def test_they_give_the_same_bits(model: Path, dtype: str, layers: range, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, states = tiny.load(model, dtype).own_decoder, (0, 3, 5)
    recorded = passes(decoder, layers, states)
    monkeypatch.setattr(decoder_module, "MAX_ROWS", 0)
    expected = passes(decoder, layers, states)
    assert len(recorded) == len(expected) > len(PIECES)
    assert all(torch.equal(one, other) for one, other in zip(recorded, expected, strict=True))


def test_a_pass_is_recorded_once_for_each_shape(decoder: Decoder) -> None:
    cache = decoder.new_cache(40)
    with torch.inference_mode():
        for count in (1, 2, 1, 1, 2, MAX_ROWS + 1):
            decoder.forward(decoder.embed(decoder.ids([30] * count)), cache.length, cache)
    assert len(cache.memory.recorded) == 2
    assert cache.length == 7 + MAX_ROWS + 1


def test_the_next_request_has_the_memory_and_the_recorded_passes_of_the_last(decoder: Decoder) -> None:
    def answer(cache: KVCache) -> Tensor:
        ids = decoder.ids([30, 31, 32])
        return torch.cat([decoder.forward(decoder.embed(ids[:, None][i]), i, cache)[0] for i in range(3)])

    with torch.inference_mode():
        cache, beside = decoder.new_cache(40), decoder.new_cache(40)
        memory, expected = cache.memory, answer(cache)
        assert beside.memory is not memory
        recorded = dict(memory.recorded)
        assert recorded
        del cache
        following = decoder.new_cache(60)
        assert following.memory is memory
        assert following.length == 0
        assert torch.equal(answer(following), expected)
        assert dict(memory.recorded) == recorded
        assert torch.equal(answer(beside), expected)
        del following
        assert decoder.new_cache(memory.capacity + 1).memory is not memory  # the old one is freed, as it is too small
        assert decoder.new_cache(40, range(2)).memory is not memory


def test_passes_that_were_not_used_for_long_are_forgotten(decoder: Decoder) -> None:
    cache = decoder.new_cache(1000)
    with torch.inference_mode():
        for count in (1, *range(2, MAX_RECORDINGS + 2), 1):
            decoder.forward(decoder.embed(decoder.ids([30] * count)), cache.length, cache)
    rows = [shape.num_rows for shape in cache.memory.recorded]
    assert rows == [*range(3, MAX_RECORDINGS + 2), 1]


def test_a_pass_that_is_cancelled_leaves_the_cache_as_it_was(decoder: Decoder) -> None:
    asked: list[None] = []

    def after_three() -> bool:
        asked.append(None)
        return len(asked) > 3

    cache = decoder.new_cache(8)
    rows_1M = decoder.embed(decoder.ids([30]))
    with pytest.raises(CancelledForwardError):
        decoder.forward(rows_1M, 0, cache, cancelled=after_three)
    assert (len(asked), cache.length) == (4, 0)
    found, _ = decoder.forward(rows_1M, 0, cache, cancelled=lambda: False)
    expected, _ = decoder.forward(rows_1M, 0, decoder.new_cache(8))
    assert torch.equal(found, expected)


def test_a_full_cache_is_an_error_at_every_pass(decoder: Decoder) -> None:
    cache = decoder.new_cache(2)
    row_1M = decoder.embed(decoder.ids([30]))
    for _ in range(2):
        decoder.forward(row_1M, cache.length, cache)
    for count in (1, 2):
        with pytest.raises(IndexError, match="cannot hold"):
            decoder.forward(row_1M.expand(count, -1), 2, cache)
