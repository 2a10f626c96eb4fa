"""The cache: marks, rollback, capacity."""

from __future__ import annotations

import pytest
import torch

from spdbench.models.kv_cache import KVCache
from tests import tiny


def new_cache(capacity: int = 8, layers: range = range(2, 4)) -> KVCache:
    return KVCache(layers, 2, 4, capacity, torch.float32, torch.device("cpu"))


def append(cache: KVCache, value: float, rows: int = 1) -> None:
    for layer in cache.layers:
        block = torch.full((rows, 2, 4), value + layer)
        cache.write(layer, block, -block)
    cache.advance(rows)


def test_written_rows_come_back_in_order_for_each_layer() -> None:
    cache = new_cache()
    append(cache, 10.0, rows=2)
    append(cache, 20.0)
    keys, values = tiny.rows(cache, 3)
    assert keys[0, :, 0].tolist() == [13.0, 13.0, 23.0]
    assert values[1, :, 3].tolist() == [-13.0, -13.0, -23.0]


def test_write_shows_the_new_rows_before_they_are_valid() -> None:
    cache = new_cache()
    append(cache, 1.0)
    keys, _ = cache.write(2, torch.full((1, 2, 4), 9.0), torch.zeros(1, 2, 4))
    assert keys.shape == (2, 2, 4)
    assert cache.length == 1


def test_rolled_back_rows_are_gone_and_overwritten() -> None:
    cache = new_cache()
    append(cache, 1.0, rows=3)
    mark = cache.length
    append(cache, 5.0, rows=4)
    cache.rollback(mark)
    append(cache, 7.0)
    assert tiny.rows(cache, 2)[0][0, :, 0].tolist() == [3.0, 3.0, 3.0, 9.0]


def test_rolling_back_past_the_end_changes_nothing() -> None:
    cache = new_cache()
    append(cache, 1.0)
    cache.rollback(5)
    assert cache.length == 1


def test_a_full_cache_refuses_more() -> None:
    cache = new_cache(capacity=2)
    append(cache, 1.0, rows=2)
    with pytest.raises(IndexError, match="2 slots cannot hold 3"):
        append(cache, 1.0)


def test_keeping_a_path_moves_its_rows_together() -> None:
    cache = new_cache()
    append(cache, 1.0, rows=2)
    mark = cache.length
    append(cache, 10.0, rows=5)
    before = [part.clone() for part in tiny.rows(cache, 2)]
    cache.keep(mark, [0, 2, 4])
    assert cache.length == 5
    for part, old in zip(tiny.rows(cache, 2), before, strict=True):
        assert torch.equal(part, old[:, [0, 1, 2, 4, 6]])


def test_keeping_the_first_rows_moves_nothing() -> None:
    cache = new_cache()
    append(cache, 1.0, rows=4)
    before = [part.clone() for part in tiny.rows(cache, 2)]
    cache.keep(1, [0, 1])
    assert cache.length == 3
    assert all(torch.equal(part, old[:, :3]) for part, old in zip(tiny.rows(cache, 2), before, strict=True))
