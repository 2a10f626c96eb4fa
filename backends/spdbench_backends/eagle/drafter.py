"""EAGLE's drafter: a proposer of candidates, and a growth that makes trees of them.

Candidates come from a head that reads the target's features, or from a synthetic drafter that reads the answer; both
grow the same trees. Must not know how trees are verified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.synthetic import SyntheticDrafts, fill_siblings
from spdbench.decoding.tree import DraftTree, chain
from spdbench.models.attention_context import TreeRows
from spdbench.models.cpu.argmax import argmax
from spdbench.models.decoder import Decoder
from spdbench_backends.eagle.head import EagleModule, EagleWeights
from spdbench_backends.eagle.tree_builder import Candidates, TreeBuilder
from spdbench_backends.synthetic_trees import SyntheticTrees


class EagleDrafter:
    """A head at work on one request. True target features replace guessed ones as soon as they are known."""

    def __init__(
        self,
        weights: EagleWeights,
        target: Decoder,
        growth: TreeBuilder,
        capacity: int,
        module: EagleModule | None = None,
    ) -> None:
        self.hidden_indices = weights.aux
        self.max_nodes = growth.max_nodes
        self._target = target
        self._growth = growth
        # A growth feeds at most all of its levels but the last, each as wide as the whole tree could be.
        self._module = module or EagleModule(weights, capacity + growth.num_levels * growth.max_nodes)
        self._features: Features | None = None
        self._next_ids: Tensor | None = None

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        self._features = features
        self._next_ids = self._target.ids((*prompt_ids[1:], root))

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002 - picks, and never draws
        assert self._features is not None
        assert self._next_ids is not None
        root = self._next_ids[-1:]
        if max_levels < 1:
            return DraftTree(chain(0, root.device), root)
        logits, state = self._module.extend(self._inputs(self._features), self._next_ids)
        return self._growth.grow(HeadProposer(self._module, logits, state), root, max_levels)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        self._features = features
        self._next_ids = self._target.ids(token_ids)

    def dictated(self, num_levels: int) -> Sequence[bool] | None:  # noqa: ARG002
        return None

    def _inputs(self, features: Features) -> Tensor:
        if not self.hidden_indices:
            return self._target.normed(features.hidden)
        return torch.cat([features.states[index] for index in self.hidden_indices], dim=-1)


class HeadProposer:
    """A head's candidates of one round. `_states` are those of the rows asked last."""

    def __init__(self, module: EagleModule, logits_1U: Tensor, state_1M: Tensor) -> None:
        self._module = module
        self._logits_1U = logits_1U
        self._states_SM = state_1M

    def first(self, count: int) -> Candidates:
        return self._best(self._logits_1U, count)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:
        logits_SU, self._states_SM = self._module.grow(self._states_SM[parents_S], ids_S, rows)
        return self._best(logits_SU, count)

    def _best(self, logits_SU: Tensor, count: int) -> Candidates:
        if count == 1:
            best_S1 = argmax(logits_SU)[:, None]
            return Candidates(torch.zeros_like(best_S1, dtype=torch.float32), self._module.token_ids(best_S1))
        best = logits_SU.topk(count, dim=-1)
        scores = best.values.float() - logits_SU.float().logsumexp(dim=-1, keepdim=True)
        return Candidates(scores, self._module.token_ids(best.indices))


class SyntheticEagleDrafter(SyntheticTrees):
    """The first child of every level is the dialled draft, its siblings are wrong."""

    def __init__(self, drafts: SyntheticDrafts, growth: TreeBuilder, device: torch.device) -> None:
        super().__init__(drafts, growth.max_nodes, device)
        self._growth = growth

    def _grow(self, root: Tensor, max_levels: int) -> DraftTree:
        return self._growth.grow(_SyntheticProposer(self._drafts, self._index, self._device), root, max_levels)


class _SyntheticProposer:
    """Row 0 of every level stands on the spine: its first candidate is the draft, and the most probable of all."""

    def __init__(self, drafts: SyntheticDrafts, index: int, device: torch.device) -> None:
        self._drafts = drafts
        self._index = index
        self._device = device

    def first(self, count: int) -> Candidates:
        return self._candidates(1, count)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:  # noqa: ARG002
        return self._candidates(len(ids_S), count)

    def _candidates(self, num_rows: int, count: int) -> Candidates:
        self._index += 1
        ids = torch.tensor(fill_siblings(self._drafts, self._index, count), device=self._device)
        scores = RANK_LOG_PROBABILITY * torch.arange(count, device=self._device)
        return Candidates(scores.expand(num_rows, count), ids.expand(num_rows, count))


RANK_LOG_PROBABILITY = -0.7
"""Each rank half as likely as the one before, or so, and the first certain: no branch, however short, beats the spine,
which is thus as deep as was asked for."""
