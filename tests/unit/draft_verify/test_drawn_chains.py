"""With a temperature, EAGLE and Medusa draw the drafts of a chain, and leave the distributions that they drew from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spdbench.backend import BackendContext, find_backend, parse_options
from spdbench.decoding.sampling import Sampler, warp
from spdbench.decoding.speculate import Drafter, Features
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.tree_builder import StaticTreeBuilder, TreeBuilder
from spdbench.models.target import Target
from spdbench.types import Sampling
from spdbench_backends.drafting import DraftVerify
from tests import tiny

HOT = Sampling(0.9, top_k=7)
CHAINS = [("eagle", {"tree": "chain", "depth": "3"}), ("medusa", {"tree": "chain", "heads": "3"})]


@pytest.fixture(scope="module")
def target(tiny_model: str) -> Target:
    return tiny.load(tiny_model)  # type: ignore[arg-type]


def started(target: Target, name: str, options: dict[str, str]) -> DraftVerify:
    cls = find_backend(name)
    backend = cls(parse_options(name, cls.Options, options), BackendContext(name, target, "random", ("cpu",), 1, 0))
    backend.load()
    assert isinstance(backend, DraftVerify)
    return backend


def proposed(target: Target, backend: DraftVerify, sampling: Sampling, max_levels: int, seed: int = 0) -> DraftTree:
    """The first tree after a prompt of ten tokens."""
    request = replace(tiny.greedy(tuple(range(40, 50)), 20), sampling=sampling)
    drafter: Drafter = backend._new_drafter(request)
    decoder = target.own_decoder
    with torch.inference_mode():
        hidden, states = decoder.forward(
            decoder.embed(decoder.ids(request.prompt_ids)),
            0,
            decoder.new_cache(10),
            hidden_indices=drafter.hidden_indices,
        )
        drafter.start(request.prompt_ids, Features(hidden, states), 50)
        return drafter.propose(max_levels, Sampler(sampling, seed))


@pytest.mark.parametrize(("name", "options"), CHAINS)
@pytest.mark.parametrize("levels", [1, 2, 9])
def test_each_draft_is_a_draw_from_the_distribution_that_is_kept(
    target: Target, name: str, options: dict[str, str], levels: int
) -> None:
    backend = started(target, name, options)
    tree = proposed(target, backend, HOT, levels)
    depth = min(levels, 3)
    assert tree.tree.is_chain
    assert tree.drawn is not None
    assert len(tree.drawn) == len(tree.ids_N) - 1 == depth
    for drawn_V, token in zip(tree.drawn, tree.ids_N[1:].tolist(), strict=True):
        assert drawn_V.shape == (target.config.vocab_size,)
        assert float(drawn_V.sum()) == pytest.approx(1.0, abs=1e-5)
        assert int((drawn_V > 0).sum()) == 7
        assert drawn_V[token] > 0
    firsts = {int(proposed(target, backend, HOT, levels, seed).ids_N[1]) for seed in range(30)}
    assert len(firsts) > 3


@pytest.mark.parametrize(("name", "options"), CHAINS)
def test_the_first_distribution_is_the_heads_own_warped_as_the_request_says(
    target: Target, name: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, seen = started(target, name, options), []
    original = Sampler.probabilities

    def watched(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return original(sampler, logits)

    monkeypatch.setattr(Sampler, "probabilities", watched)
    tree = proposed(target, backend, HOT, 1)
    assert tree.drawn is not None
    expected = torch.zeros(target.config.vocab_size)
    vocabulary = backend._weights.vocabulary
    expected[vocabulary.to_target(torch.arange(vocabulary.size))] = warp(seen[0].flatten(), HOT)
    torch.testing.assert_close(tree.drawn[0], expected)


@pytest.mark.parametrize(
    ("name", "options", "sampling"),
    [
        *((name, options, Sampling(0.0)) for name, options in CHAINS),
        ("eagle", {"tree": "static"}, HOT),
        ("eagle", {"tree": "dynamic", "depth": "2", "top_k": "2", "total_tokens": "4"}, HOT),
        ("medusa", {"tree": "mc_sim_7b_63", "heads": "4"}, HOT),
        ("medusa", {"tree": "chain", "heads": "3", "acceptance": "typical"}, HOT),
        ("medusa", {"tree": "chain", "heads": "3", "graphs": "on"}, HOT),
    ],
)
def test_all_else_is_picked(target: Target, name: str, options: dict[str, str], sampling: Sampling) -> None:
    assert proposed(target, started(target, name, options), sampling, 9).drawn is None


@pytest.mark.parametrize("words", ["dynamic", "chain with"])
def test_an_automatic_tree_gives_way_to_a_drawn_chain_as_deep(
    target: Target, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    from spdbench.profiles.profile import RowCosts
    from spdbench_backends.eagle.backend import Eagle

    def costs(_self: Eagle, shallow: TreeBuilder, _deep: TreeBuilder, _forward_s: float) -> Callable[[int], float]:
        grows = not isinstance(shallow, StaticTreeBuilder)
        return lambda _levels: 0.0 if grows == (words == "dynamic") else 1.0

    monkeypatch.setattr(Eagle, "_draft_costs", costs)
    monkeypatch.setattr(Eagle, "_row_costs", lambda *_: RowCosts((1, 64), (1.0, 1.0)))
    backend = started(target, "eagle", {"tree": "auto", "total_tokens": "6"})
    chosen = backend.describe().chosen
    assert chosen["tree"].startswith(words)
    tree = proposed(target, backend, HOT, 9)
    assert tree.drawn is not None
    assert chosen["with a temperature"] == f"chain, depth {len(tree.drawn)}, drawn"
    assert proposed(target, backend, Sampling(0.0), 9).drawn is None
