"""EAGLE's drafter: a head proposes candidates from the target's features, and a tree builder makes a tree of them.

Shapes: S rows, k candidates of each, F feature columns, M draft width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.tree import DraftTree, lone_root
from spdbench.decoding.tree_builder import Candidates, TreeBuilder, is_chain
from spdbench.decoding.verify import Draft
from spdbench.models.attention_context import TreeRows
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import argmax, top_k
from spdbench.models.torch_utils import one_thread
from spdbench_backends.eagle.head import EagleHead, EagleModule, EagleWeights


class Rounds:
    """A head's rounds of drafting for a sequence of up to `capacity` tokens, step by step. `captured.CapturedRounds`
    replays them."""

    def __init__(self, weights: EagleWeights, builder: TreeBuilder, capacity: int) -> None:
        self.weights, self.builder, self.capacity = weights, builder, capacity
        # A builder feeds at most all of its levels but the last, each as wide as the whole tree could be.
        self._tree_slots = builder.num_levels * builder.max_nodes
        self._module = EagleModule(weights, capacity + self._tree_slots)

    def reset(self) -> None:
        """Forgets everything: another sequence begins."""
        self._module.reset()

    def draft(self, features_SF: Tensor, next_ids_S: Tensor, max_levels: int, sampler: Sampler) -> DraftTree:
        """Commits rows as `EagleModule.extend` does, and builds a tree after the last of `next_ids_S`: with a
        temperature a chain is drawn, all else is picked. Levels deeper than `max_levels`, which is 1 at least, will
        not count."""
        draws = is_chain(self.builder) and not sampler.greedy
        return draft_tree(self._module, self.builder, features_SF, next_ids_S, max_levels, sampler if draws else None)


class EagleDrafter:
    """A head's drafts for one request. The target's true features replace guessed ones as soon as they are known."""

    def __init__(self, target: Decoder, rounds: Rounds) -> None:
        self.hidden_indices = rounds.weights.aux
        self.max_nodes = rounds.builder.max_nodes
        self._target = target
        self._rounds = rounds
        self._features: Features | None = None
        self._next_ids: Tensor | None = None

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        self._rounds.reset()
        self.accept((*prompt_ids[1:], root), features)

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        assert self._features is not None
        assert self._next_ids is not None
        if max_levels < 1:
            return lone_root(self._next_ids[-1:])
        return self._rounds.draft(self._inputs(self._features), self._next_ids, max_levels, sampler)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        self._features = features
        self._next_ids = self._target.ids(token_ids)

    def _inputs(self, features: Features) -> Tensor:
        if not self.hidden_indices:
            return self._target.normed(features.hidden)
        return torch.cat([features.states[index] for index in self.hidden_indices], dim=-1)


def draft_tree(
    head: EagleHead,
    builder: TreeBuilder,
    features_SF: Tensor,
    next_ids_S: Tensor,
    max_levels: int,
    sampler: Sampler | None = None,
) -> DraftTree:
    """One round: the head's rows of `next_ids_S`, and a tree after the last of them. Can be captured without a
    `sampler`, with which a chain is drawn."""
    logits_1U, state_1M = head.extend(features_SF, next_ids_S)
    proposer = HeadProposer(head, logits_1U, state_1M, sampler)
    draft = builder.build_tree(proposer, next_ids_S[-1:], max_levels)
    return draft if sampler is None else replace(draft, drawn=tuple(proposer.drawn))


class HeadProposer:
    """A head's candidates of one round. `_states_SM` are those of the rows of the previous call. With a `sampler` the
    only candidate of a row is a draw, and `drawn` holds the distributions `[V]` that were drawn from."""

    def __init__(self, head: EagleHead, logits_1U: Tensor, state_1M: Tensor, sampler: Sampler | None = None) -> None:
        self._head = head
        self._logits_1U = logits_1U
        self._states_SM = state_1M
        self._sampler = sampler
        self.drawn: list[Tensor] = []

    def first(self, count: int) -> Candidates:
        return self._best(self._logits_1U, count)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:
        logits_SU, self._states_SM = self._head.extend_tree(self._states_SM[parents_S], ids_S, rows)
        return self._best(logits_SU, count)

    @one_thread()
    def _best(self, logits_SU: Tensor, count: int) -> Candidates:
        to_target = self._head.weights.vocabulary.to_target
        if self._sampler is not None:
            return self._draw(logits_SU[0], self._sampler)
        if count == 1:
            best_S1 = argmax(logits_SU)[:, None]
            return Candidates(torch.zeros_like(best_S1, dtype=torch.float32), to_target(best_S1))
        scores_SK, ids_SK = top_k(logits_SU, count)
        return Candidates(scores_SK, to_target(ids_SK))

    def _draw(self, logits_U: Tensor, sampler: Sampler) -> Candidates:
        draft = Draft.from_logits(logits_U, sampler).in_target(self._head.weights.vocabulary)
        assert draft.probabilities_V is not None
        self.drawn.append(draft.probabilities_V)
        id_11 = torch.tensor([[draft.token_id]], device=logits_U.device)
        return Candidates(torch.zeros_like(id_11, dtype=torch.float32), id_11)
