"""The loop of drafting and verifying: exact output, and a cache that equals a fresh prefill, whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features, Speculation
from spdbench.decoding.tree import DraftTree, chain, from_paths
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from tests import tiny


class RandomTrees:
    """Trees of random shape, some of whose nodes are right, and a check of the features that come back."""

    hidden_indices = (2, 5)
    max_nodes = 12

    def __init__(self, decoder: Decoder, answer: Sequence[int], seed: int) -> None:
        self._decoder = decoder
        self._answer = answer
        self._random = random.Random(seed)
        self.ids: list[int] = []
        self.states: list[torch.Tensor] = []
        self._index = 0

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        self.ids = [*prompt_ids, root]
        self.states.append(features.states[5])

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002
        chosen = self._random
        paths: set[tuple[int, ...]] = set()
        for _ in range(chosen.randrange(self.max_nodes)):
            parent = chosen.choice([(), *sorted(paths)])
            if len(parent) < max_levels:
                paths.add((*parent, sum(len(p) == len(parent) + 1 and p[:-1] == parent for p in paths)))
        if not paths:
            return DraftTree(chain(0), self._decoder.ids(self.ids[-1:]))
        tree = from_paths(sorted(paths))
        depths = tree.rows.depths_S.tolist()
        ids = [self.ids[-1]]
        for depth in depths[1:]:
            index = self._index + depth
            right = self._answer[index] if index < len(self._answer) else 0
            ids.append(right if chosen.random() < 0.6 else chosen.randrange(262))
        return DraftTree(tree, torch.tensor(ids))

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        assert features.states[5].shape[0] == len(token_ids)
        self.ids += token_ids
        self.states.append(features.states[5])
        self._index += len(token_ids)


@pytest.mark.parametrize("seed", range(12))
def test_random_trees_change_nothing(decoder: Decoder, seed: int) -> None:
    request = tiny.greedy(tiny.PROMPT, 40)
    answer = list(decode(decoder, request))
    drafter = RandomTrees(decoder, answer, seed)
    speculation = Speculation(decoder, drafter, request)
    steps = list(speculation.steps())
    assert [token for step in steps for token in step.token_ids] == answer
    assert sum(step.accepted for step in steps) > 5
    with torch.inference_mode():
        fresh = decoder.new_cache(64)
        ids = drafter.ids[:-1]  # the newest token has not been through the target
        _, states = decoder.forward(decoder.embed(decoder.ids(ids)), 0, fresh, hidden_indices=(5,))
    assert speculation.cache.length == fresh.length == len(ids)
    assert isinstance(speculation.cache, KVCache)
    for layer in decoder.layers:
        for mine, theirs in zip(tiny.rows(speculation.cache, layer), tiny.rows(fresh, layer), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat(drafter.states), states[5], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_a_trees_logits_equal_those_of_its_branches(family: str, tmp_path: Path) -> None:
    decoder = tiny.load(tiny.make_model(tmp_path, family)).own_decoder
    tree = from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)])
    ids = [50, 61, 62, 63, 64, 65, 66]
    with torch.inference_mode():
        cache = decoder.new_cache(64)
        decoder.forward(decoder.embed(decoder.ids(tiny.PROMPT)), 0, cache)
        hidden, _ = decoder.forward(decoder.embed(decoder.ids(ids)), len(tiny.PROMPT), cache, tree=tree.rows)
        found = decoder.logits(hidden)
        for node, sees in enumerate(tree.rows.visible_SW):
            branch = [*tiny.PROMPT, *[ids[other] for other in sees.nonzero()[:, 0].tolist()]]
            alone, _ = decoder.forward(decoder.embed(decoder.ids(branch)), 0, decoder.new_cache(64))
            torch.testing.assert_close(found[node], decoder.logits(alone[-1:])[0], rtol=1e-5, atol=1e-5)


def test_spans_follow_each_other_and_tell_of_every_round(decoder: Decoder) -> None:
    request = tiny.greedy(tiny.PROMPT, 20)
    speculation = Speculation(decoder, RandomTrees(decoder, list(decode(decoder, request)), 1), request)
    rounds = len(list(speculation.steps())) - 1
    kinds = [span.kind for span in speculation.spans]
    assert kinds == ["draft", "target", "verify", "host"] * rounds
    for before, after in zip(speculation.spans, speculation.spans[1:], strict=False):
        assert before.start_ns <= before.end_ns <= after.start_ns
