"""Wrong ways of going back in a cache with recurrent states, each of which a test has to notice."""

from __future__ import annotations

from spdbench.models.kv_cache import HybridCache


def rolled_back_length_only(cache: HybridCache, mark: int) -> None:
    """States stay as they are, and only attention goes back."""
    windows, matrices = (part[:, cache.slot(0)].clone() for part in (cache._windows, cache._matrices))
    cache.length = min(cache.length, mark)
    cache._windows[:, cache.slot(0)] = windows
    cache._matrices[:, cache.slot(0)] = matrices


def window_stays(cache: HybridCache, mark: int) -> None:
    windows = cache._windows[:, cache.slot(0)].clone()
    cache.length = min(cache.length, mark)
    cache._windows[:, cache.slot(0)] = windows


def matrix_stays(cache: HybridCache, mark: int) -> None:
    matrices = cache._matrices[:, cache.slot(0)].clone()
    cache.length = min(cache.length, mark)
    cache._matrices[:, cache.slot(0)] = matrices


def window_off_by_one(cache: HybridCache, mark: int) -> None:
    cache.length = min(cache.length, mark)
    cache._windows[:, cache.slot(0)] = cache._windows[:, cache.slot(0)].roll(1, dims=1)


def one_too_deep(cache: HybridCache, mark: int) -> None:
    """The snapshot before the right one."""
    cache.length = min(cache.length, mark)
    for part in (cache._windows, cache._matrices):
        part[:, cache.slot(0)] = part[:, cache.slot(-1)]


def one_layer_forgotten(cache: HybridCache, mark: int) -> None:
    matrix = cache._matrices[0, cache.slot(0)].clone()
    cache.length = min(cache.length, mark)
    cache._matrices[0, cache.slot(0)] = matrix


MISTAKES = [
    rolled_back_length_only,
    window_stays,
    matrix_stays,
    window_off_by_one,
    one_too_deep,
    one_layer_forgotten,
]
