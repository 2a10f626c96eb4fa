"""Going back while decoding: every verdict and every draft as if each forward began from nothing.

Equal outputs prove little: a state that is wrong after a rejection often leaves greedy ids as they are. So all that a
step says is compared, against a decoder that never goes back, and planted mistakes have to show.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from spdbench.decoding.drafter_choice import parse_drafter
from spdbench.decoding.speculate import Speculation
from spdbench.decoding.synthetic import SyntheticDrafter, synthetic_drafts
from spdbench.decoding.tree_builder import chain_builder
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import HybridCache, KVCache
from spdbench.models.layer_ops import has_cpu_kernels
from spdbench.models.partition import split_by_counts
from spdbench.pipeline import inline
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.drafter import SyntheticPipelineDrafter
from tests import tiny
from tests.unit.models.rollback_mistakes import MISTAKES
from tests.unit.spd.inline import generate

CPU = torch.device("cpu")
PROMPTS = [tuple((start + 37 * i) % 262 for i in range(9)) for start in range(8)]
CUTS = ([3, 3], [2, 2, 2], [1, 2, 1, 2], [1] * 6)


class Copies:
    """The cache of `WithoutRollback`: a whole copy of a cache after each row so far, of which the first is empty."""

    def __init__(self, empty: KVCache) -> None:
        self.after = [empty]
        self.capacity = empty.capacity

    @property
    def length(self) -> int:
        return len(self.after) - 1

    def rollback(self, mark: int) -> None:
        del self.after[mark + 1 :]

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        self.rollback(mark + len(chosen))


T = TypeVar("T")


def copy_of(cache: KVCache) -> KVCache:
    """Another cache of the same content, in memory of its own: nothing is recorded in it, and no array is shared."""
    found, found.memory = _copy_of_tensors(cache), _copy_of_tensors(cache.memory)
    found.memory.recorded = OrderedDict()
    found._keys, found._values = found.memory.keys, found.memory.values
    return found


def _copy_of_tensors(of: T) -> T:
    found = copy(of)
    for name, value in vars(of).items():
        if isinstance(value, Tensor):
            setattr(found, name, value.clone())
        elif isinstance(getattr(type(of), name, None), cached_property):
            delattr(found, name)
    return found


class WithoutRollback:
    """Never goes back: every row is computed behind a copy of what its forerunners, one at a time from the first one,
    left in a new cache."""

    takes_trees = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.config, self.layers, self.dtype, self.device = (
            decoder.config,
            decoder.layers,
            decoder.dtype,
            decoder.device,
        )
        self.embed, self.ids, self.logits, self.kernels = decoder.embed, decoder.ids, decoder.logits, decoder.kernels
        self.bytes_per_token, self.snapshot_bytes = decoder.bytes_per_token, decoder.snapshot_bytes

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> Copies:  # noqa: ARG002
        return Copies(self._decoder.new_cache(capacity, layers))

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: Copies,
        layers: range | None = None,
        hidden_indices: Collection[int] = (),
        tree: object = None,
        cancelled: Callable[[], bool] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, dict[int, Tensor]]:
        assert (tree, start) == (None, cache.length)
        found = []
        for row, hidden_M in enumerate(hidden_SM, start):
            cache.after.append(copy_of(cache.after[row]))
            found.append(self._decoder.forward(hidden_M[None].clone(), row, cache.after[-1], layers, hidden_indices))
        hidden = torch.cat([row_1M.clone() for row_1M, _ in found])
        return hidden, {index: torch.cat([states[index] for _, states in found]) for index in found[0][1]}


@pytest.fixture(scope="module", params=tiny.HYBRIDS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    if not has_cpu_kernels(torch.float32, CPU):
        pytest.skip("numba is not installed: torch's own sums make no promise of the same bits")
    folder = tiny.make_model(tmp_path_factory.mktemp("hybrid"), request.param, seed=3)
    return tiny.load(folder).own_decoder


GREEDY = Sampling()


def requests(sampling: Sampling = GREEDY) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, (), 24, sampling, seed, frozenset()) for seed, prompt in enumerate(PROMPTS)]


def chain_steps(target: Any, plain: Decoder, request: GenerationRequest, depth: int, drafter: str) -> list[Step]:
    """A chain of drafts a round; every target but the last chooses its answer by `plain`."""
    greedy = replace(request, sampling=Sampling())
    drafts = synthetic_drafts(parse_drafter(drafter), 0, plain, greedy)
    return list(Speculation(target, SyntheticDrafter(drafts, chain_builder(depth, CPU), CPU), request).steps())


def pipeline_steps(
    target: Any, plain: Decoder, request: GenerationRequest, counts: Sequence[int], drafter: str
) -> list[Step]:
    drafts = synthetic_drafts(parse_drafter(drafter), 0, plain, replace(request, sampling=Sampling()))
    return list(generate(target, split_by_counts(6, counts), SyntheticPipelineDrafter(drafts), request))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("depth", [1, 3, 6])
def test_chains_get_the_verdicts_of_a_decoder_without_rollback(
    decoder: Decoder, depth: int, sampling: Sampling
) -> None:
    for request in requests(sampling)[:4]:
        found = chain_steps(decoder, decoder, request, depth, "oracle:0.7")
        assert found == chain_steps(WithoutRollback(decoder), decoder, request, depth, "oracle:0.7")
        rejected = [step for step in found if step.judged > step.accepted]
        assert rejected, "nothing was rolled back"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("counts", CUTS, ids=str)
def test_pipelines_get_the_verdicts_of_a_decoder_without_rollback(
    decoder: Decoder, counts: list[int], sampling: Sampling
) -> None:
    for request in requests(sampling)[:3]:
        found = pipeline_steps(decoder, decoder, request, counts, "oracle:0.7")
        assert found == pipeline_steps(WithoutRollback(decoder), decoder, request, counts, "oracle:0.7")
        assert any(step.judged > step.accepted for step in found), "nothing was rolled back"


def both_steps(decoder: Decoder, request: GenerationRequest) -> tuple[list[Step], list[Step]]:
    """Of a chain and of a pipeline."""
    return (
        chain_steps(decoder, decoder, request, 4, "oracle:0.5"),
        pipeline_steps(decoder, decoder, request, [2] * 3, "oracle:0.5"),
    )


@pytest.fixture(scope="module")
def right(decoder: Decoder) -> list[tuple[list[Step], list[Step]]]:
    return [both_steps(decoder, request) for request in requests()]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_show_in_the_verdicts(
    decoder: Decoder,
    right: list[tuple[list[Step], list[Step]]],
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[HybridCache, int], None],
) -> None:
    """Of chains and of pipelines, on most prompts."""
    monkeypatch.setattr(HybridCache, "rollback", mistake)
    differ = [0, 0]
    for request, (chain, pipeline) in zip(requests(), right, strict=True):
        found = both_steps(decoder, request)
        differ[0] += found[0] != chain
        differ[1] += found[1] != pipeline
    assert min(differ) >= 3


@pytest.mark.parametrize("counts", CUTS, ids=str)
def test_one_snapshot_fewer_is_too_few(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    """Every stage but the last needs all that it is given."""
    needed = inline.snapshots_in_step
    for stage in range(len(counts) - 1):
        if all(layer % 3 == 2 for layer in split_by_counts(6, counts)[stage]):
            continue  # it has no recurrent layer
        monkeypatch.setattr(inline, "snapshots_in_step", lambda s, n, short=stage: needed(s, n) - (s == short))
        with pytest.raises(IndexError, match="holds recurrent states back to"):
            pipeline_steps(decoder, decoder, requests()[0], counts, "oracle:0.7")
