"""The verdict on drafted tokens, one or a tree of them, exactly lossless.

Greedy: accepted iff it is the target's argmax. Sampling (Leviathan et al., arXiv 2211.17192, Chen et al., arXiv
2302.01318): with target p and draft q, both warped, accept x with probability min(1, p(x) / q(x)); on refusal draw
from the normalised max(p - q, 0). A draft that was not drawn but picked has a one-hot q: accept with probability
p(x), on refusal draw from p without x; of several picked siblings each is asked in turn for what mass the refused ones
left, which is how EAGLE-2 and 3 judge (METHODS.md A.4). Must not know of pipelines, drafters or caches.

Shapes: V vocabulary, N nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits, Sampler
from spdbench.decoding.tree import DraftTree
from spdbench.models.likeliest import likeliest


@dataclass(frozen=True)
class Draft:
    """A proposed token; `probabilities_V` is the distribution that it was drawn from, None if it was picked."""

    token_id: int
    probabilities_V: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """`token_id` is what comes out either way: the draft, or the target's correction."""

    accepted: bool
    token_id: int


def judge(logits_V: Logits, draft: Draft, sampler: Sampler) -> Verdict:
    """The target's logits for a position against the token drafted for it."""
    if sampler.greedy:
        best = sampler.choose(logits_V)
        return Verdict(best == draft.token_id, best)
    assert not isinstance(logits_V, int)
    target_V = sampler.probabilities(logits_V)
    token, draft_V = draft.token_id, draft.probabilities_V
    likelihood = 1.0 if draft_V is None else float(draft_V[token])
    # Strictly less: a token that the target gives no mass must not pass when u is 0.
    if sampler.uniform() * likelihood < float(target_V[token]):
        return Verdict(True, token)
    if draft_V is None:
        residual_V = target_V.clone()
        residual_V[token] = 0.0
    else:
        residual_V = (target_V - draft_V).clamp_(min=0.0)
    if not float(residual_V.sum()) > 0.0:  # p equals q up to rounding, so a refusal has no probability to speak of
        residual_V = target_V
    return Verdict(False, sampler.draw(residual_V))


@dataclass(frozen=True)
class TreeVerdict:
    """`path` are the accepted nodes, root first, `token_ids` their tokens without the root's, and then the target's own
    token behind the last. `drafted` is the tree's depth, `judged` counts the levels that got a verdict."""

    path: tuple[int, ...]
    token_ids: tuple[int, ...]
    drafted: int
    judged: int

    @property
    def accepted(self) -> int:
        return len(self.path) - 1


def judge_tree(
    logits_NV: Tensor, draft: DraftTree, sampler: Sampler, dictated: Sequence[bool] | None = None
) -> TreeVerdict:
    """The target's logits behind every node against the nodes' children.

    `dictated`, by level, replaces the verdicts for a timing experiment: yes accepts a node's first child. When greedy
    the host waits for the device once; when sampling, once for every level that is reached.
    """
    if sampler.greedy:
        parents, ids, best = torch.stack((draft.tree.parents_N, draft.ids_N, likeliest(logits_NV))).cpu().numpy()
        walk: _Walk = _Greedy(ids, best)
    else:
        parents, ids = torch.stack((draft.tree.parents_N, draft.ids_N)).cpu().numpy()
        walk = _Sampled(ids, logits_NV, draft.drawn, sampler)
    node, path, judged = 0, [0], 0
    while len(children := np.flatnonzero(parents == node)):
        judged += 1
        if dictated is None:
            found = walk.choose(node, children)
        else:
            found = int(children[0]) if dictated[judged - 1] else None
        if found is None:
            break
        node = found
        path.append(node)
    accepted = tuple(int(ids[node]) for node in path[1:])
    return TreeVerdict(tuple(path), (*accepted, walk.last(node)), depth_of(parents), judged)


def depth_of(parents: Any) -> int:
    """The depth of the deepest node."""
    depth, nodes = 0, np.flatnonzero(parents == 0)
    while len(nodes):
        depth, nodes = depth + 1, np.flatnonzero(np.isin(parents, nodes))
    return depth


class _Walk(Protocol):
    """Down the tree from accepted node to accepted node."""

    def choose(self, node: int, children: Any) -> int | None:
        """The accepted one of a node's children."""

    def last(self, node: int) -> int:
        """The target's own token behind the last accepted node."""


class _Greedy:
    def __init__(self, ids: Any, best: Any) -> None:
        self._ids, self._best = ids, best

    def choose(self, node: int, children: Any) -> int | None:
        right = children[self._ids[children] == self._best[node]]
        return int(right[0]) if len(right) else None

    def last(self, node: int) -> int:
        return int(self._best[node])


class _Sampled:
    def __init__(self, ids: Any, logits_NV: Tensor, drawn: tuple[Tensor, ...] | None, sampler: Sampler) -> None:
        self._ids, self._logits_NV, self._drawn, self._sampler = ids, logits_NV, drawn, sampler
        self._correction: int | None = None

    def choose(self, node: int, children: Any) -> int | None:
        if self._drawn is not None:
            return self._judge_drawn(node, int(children[0]), self._drawn[int(children[0]) - 1])
        residual_V = self._sampler.probabilities(self._logits_NV[node]).clone()
        mass = float(residual_V.sum())
        for child in children.tolist():
            likelihood = float(residual_V[self._ids[child]])  # 0 for a token that was refused already
            if self._sampler.uniform() * mass < likelihood:
                return int(child)
            residual_V[self._ids[child]] = 0.0
            mass -= likelihood
        if not float(residual_V.sum()) > 0.0:  # the children had all the mass: a refusal is rounding, as in `judge`
            residual_V = self._sampler.probabilities(self._logits_NV[node])
        self._correction = self._sampler.draw(residual_V)
        return None

    def last(self, node: int) -> int:
        return self._sampler.choose(self._logits_NV[node]) if self._correction is None else self._correction

    def _judge_drawn(self, node: int, child: int, drawn_V: Tensor) -> int | None:
        verdict = judge(self._logits_NV[node], Draft(int(self._ids[child]), drawn_V), self._sampler)
        if verdict.accepted:
            return child
        self._correction = verdict.token_id
        return None
