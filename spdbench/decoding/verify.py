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

from spdbench.decoding.sampling import Logits, Sampler, draw_rows
from spdbench.decoding.tree import DraftTree
from spdbench.models.cpu.argmax import argmax
from spdbench.models.to_device import to_device


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
    return Verdict(False, sampler.draw(_residual(target_V, to_device((token,), target_V.device), draft_V)))


def _residual(target_V: Tensor, refused: Tensor, drafted_V: Tensor | None) -> Tensor:
    """What a token behind a refusal is drawn from: the target without the tokens `refused` that were picked, or what it
    has more of than the distribution that the refused one was drawn from."""
    residual_V = target_V.index_fill(0, refused, 0.0) if drafted_V is None else (target_V - drafted_V).clamp_(min=0.0)
    # Nothing left: the drafts had all the mass up to rounding, so that a refusal has no probability to speak of.
    return residual_V if float(residual_V.sum()) > 0.0 else target_V


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

    def within(self, room: int) -> TreeVerdict:
        """As of a tree that was grown for `room` tokens: of what lies deeper nothing counts."""
        levels = room - 1
        if self.drafted <= levels:
            return self
        return TreeVerdict(self.path[:room], self.token_ids[:room], levels, min(self.judged, levels))


def judge_tree(
    logits_NV: Tensor, draft: DraftTree, sampler: Sampler, dictated: Sequence[bool] | None = None
) -> TreeVerdict:
    """The target's logits behind every node against the nodes' children.

    `dictated`, by level, replaces the verdicts for a timing experiment: yes accepts a node's first child. The host
    waits for a device once. On a CPU, where there is nothing to wait for, what a sampled verdict needs of a node is
    computed when the walk has come to that node.
    """
    walk: _Walk
    if sampler.greedy:
        parents, ids, best = torch.stack((draft.tree.parents_N, draft.ids_N, argmax(logits_NV))).cpu().numpy()
        walk = _Greedy(ids, best)
    elif logits_NV.device.type == "cpu":
        parents, ids = draft.tree.parents_N.numpy(), draft.ids_N.numpy()
        walk = _Sampled(ids, logits_NV, draft.drawn, sampler)
    else:
        walk = SampledAtOnce(logits_NV, draft, sampler)
        parents, ids = walk.parents, walk.ids
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
    """Every node has two uniform numbers of its own: one for its verdict, one for the token drawn behind it."""

    def __init__(self, ids: Any, logits_NV: Tensor, drawn: tuple[Tensor, ...] | None, sampler: Sampler) -> None:
        self._ids, self._logits_NV, self._drawn, self._sampler = ids, logits_NV, drawn, sampler
        self._verdict_N, self._draw_N = _uniforms(sampler, len(ids))
        self._residual_V: Tensor | None = None

    def choose(self, node: int, children: Any) -> int | None:
        target_V = self._sampler.probabilities(self._logits_NV[node])
        tokens = torch.from_numpy(self._ids[children])
        drafted_V = None if self._drawn is None else self._drawn[int(children[0]) - 1]
        likelihoods = None if drafted_V is None else drafted_V[tokens].double().numpy()
        likely = target_V[tokens].double().numpy()
        found = _first_accepted(self._ids[children], likely, likelihoods, self._verdict_N[children])
        if found is not None:
            return int(children[found])
        self._residual_V = _residual(target_V, tokens, drafted_V)
        return None

    def last(self, node: int) -> int:
        weights_V = self._residual_V
        if weights_V is None:
            weights_V = self._sampler.probabilities(self._logits_NV[node])
        return self._sampler.draw(weights_V, float(self._draw_N[node]))


class SampledAtOnce:
    """The same, computed for all nodes where the logits are, and read in one go. Only for trees that are judged: a
    dictated refusal is followed by a draw as after a refusal of the target's."""

    def __init__(self, logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> None:
        device, parents_N, ids_N = logits_NV.device, draft.tree.parents_N, draft.ids_N
        self._verdict_N, draw_N = _uniforms(sampler, len(ids_N))
        target_NV = sampler.probabilities(logits_NV)
        of_parent = parents_N.clamp(min=0)
        likelihood_N = target_NV[of_parent, ids_N].double()
        drafted_N, residual_NV = torch.ones_like(likelihood_N), target_NV.clone()
        if draft.drawn is None:
            residual_NV[of_parent[1:], ids_N[1:]] = 0.0
        elif len(draft.drawn):  # a chain: node i's distribution is its parent i - 1's
            drafted_NV = torch.stack(draft.drawn)
            drafted_N[1:] = drafted_NV.gather(1, ids_N[1:, None])[:, 0].double()
            residual_NV[:-1] = (target_NV[:-1] - drafted_NV).clamp_(0)
        nothing_left_N1 = residual_NV.sum(-1, keepdim=True) <= 0.0
        residual_NV = torch.where(nothing_left_N1, target_NV, residual_NV)
        drawn_N = draw_rows(residual_NV, to_device(draw_N, device, torch.float64))
        read = torch.stack([x.double() for x in (parents_N, ids_N, drawn_N, likelihood_N, drafted_N)]).cpu().numpy()
        self.parents, self.ids, self._drawn = (row.astype(np.int64) for row in read[:3])
        self._likelihood, self._drafted = read[3:]
        self._was_drawn = draft.drawn is not None

    def choose(self, node: int, children: Any) -> int | None:  # noqa: ARG002 - one protocol with _Sampled
        drafted = self._drafted[children] if self._was_drawn else None
        likely, tokens = self._likelihood[children], self.ids[children]
        found = _first_accepted(tokens, likely, drafted, self._verdict_N[children])
        return None if found is None else int(children[found])

    def last(self, node: int) -> int:
        return int(self._drawn[node])


def _uniforms(sampler: Sampler, num_nodes: int) -> Any:
    """Numbers in [0, 1): `[2, N]` in float64."""
    return np.array([sampler.uniform() for _ in range(2 * num_nodes)]).reshape(2, num_nodes)


def _first_accepted(tokens: Any, target: Any, drafted: Any | None, uniform: Any) -> int | None:
    """Of siblings the first that is accepted, by what target and draft make of each: all are `[children]`.

    Strictly less: a token that the target gives no mass must not pass when u is 0.
    """
    if drafted is not None:
        accepted = np.flatnonzero(uniform * drafted < target)
    else:  # each is asked for its share of what the refused ones before it left, and a token only once
        target = np.where(np.isin(np.arange(len(tokens)), np.unique(tokens, return_index=True)[1]), target, 0.0)
        left = 1.0 - np.concatenate(([0.0], np.cumsum(target)[:-1]))
        accepted = np.flatnonzero(uniform * left < target)
    return int(accepted[0]) if len(accepted) else None
