"""Verification: which drafts the target accepts, and the token that it adds.

Drafts form a tree after the newest token, the root; a chain is a tree of width one. The target has computed the logits
of every node, which say what follows it. `verify` starts at the root. An accept rule chooses one child of the current
node, `verify` moves to that child, and so on until the rule rejects all children or there are none. After the last
accepted node the target adds a token of its own. Three rules, with p the target's warped distribution at the node:

Greedy. The child that is the target's argmax.

Lossless sampling. The emitted tokens follow p exactly. Two cases:
    Drawn: child x was drawn from the drafter's distribution q. Accept with probability min(1, p(x) / q(x)); after a
    rejection draw the token from norm(max(0, p - q)) (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).
    Picked: children x_1, x_2, ... were chosen without a draw, so each has a one-hot q. Accept x_i with its probability
    under p without the rejected siblings, p(x_i) / (1 - p(x_1) - ... - p(x_i-1)); after all are rejected draw the token
    from norm(p without all of them) (SpecInfer, arXiv 2305.09781; as EAGLE-2 and 3 verify).

Typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1). Not lossless. A node passes iff
p(x) > min(epsilon, delta e^(-H(p))), with p at the request's temperature and H its entropy; accept the longest path
whose nodes all pass, the most likely one of several.

Shapes: V vocabulary, N nodes of a tree, C children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spdbench.decoding.sampling import DraftVocabulary, Logits, Sampler, draw_rows, require_number
from spdbench.decoding.tree import DraftTree
from spdbench.models.layer_ops import next_tokens
from spdbench.models.torch_utils import one_thread, to_device


@dataclass(frozen=True)
class Draft:
    """A single drafted token. `probabilities_V` is the distribution that it was drawn from, None if it was picked.
    `forced_verdict` replaces verification in timing experiments."""

    token_id: int
    probabilities_V: Tensor | None = None
    forced_verdict: bool | None = None

    @classmethod
    def from_logits(cls, logits_V: Logits, sampler: Sampler) -> Draft:
        """What a drafter's own logits give: the argmax, picked, when greedy, else a draw."""
        if isinstance(logits_V, int) or sampler.greedy:
            return cls(sampler.choose(logits_V))
        drafted_V = sampler.probabilities(logits_V)
        return cls(sampler.draw(drafted_V), drafted_V)

    @one_thread()
    def in_target(self, vocabulary: DraftVocabulary) -> Draft:
        """The draft with the target's token ids, where this one has those of `vocabulary`."""
        if vocabulary.token_ids_U is None or vocabulary.listed is None:
            return self
        token_id, drafted_U = vocabulary.listed[self.token_id], self.probabilities_V
        if drafted_U is None:
            return Draft(token_id)
        drafted_V = torch.zeros(vocabulary.vocab_size, dtype=drafted_U.dtype, device=drafted_U.device)
        return Draft(token_id, drafted_V.index_copy_(0, vocabulary.token_ids_U, drafted_U))


@dataclass(frozen=True)
class DraftVerdict:
    """On a single draft or on siblings: `token_id` is the accepted draft, else the target's own token."""

    accepted: bool
    token_id: int


@dataclass(frozen=True)
class Verification:
    """On a tree. `path` holds the accepted nodes, root first; `token_ids` their tokens without the root's, then the
    target's own token. `drafted` is the tree's depth, `judged` counts the levels that were verified."""

    path: tuple[int, ...]
    token_ids: tuple[int, ...]
    drafted: int
    judged: int

    @property
    def accepted(self) -> int:
        return len(self.path) - 1

    def within(self, room: int) -> Verification:
        """The verdict as if the tree had been built for `room` tokens: deeper levels do not count."""
        levels = room - 1
        if self.drafted <= levels:
            return self
        return Verification(self.path[:room], self.token_ids[:room], levels, min(self.judged, levels))


class Rule(NamedTuple):
    """An accept rule on one tree, whose parents and token ids it has read to the host.

    `accept(node, children)` is the accepted child, or None. `token_after(node, rejected)` is the target's own token
    after the last accepted node, given those of its children that the rule rejected.
    """

    parents: list[int]
    ids: list[int]
    accept: Callable[[int, list[int]], int | None]
    token_after: Callable[[int, list[int]], int]


AcceptRule = Callable[[Tensor, DraftTree, Sampler], Rule]
"""Starts a rule on the target's logits of every node `[N, V]`."""


def verify(
    logits_NV: Tensor, draft: DraftTree, sampler: Sampler, accept_rule: AcceptRule | None = None
) -> Verification:
    """Verifies drafts against the target's logits of every node `[N, V]`, by `accept_rule`, by default greedy or
    lossless sampling as the request says. The host waits for a GPU once, except in typical acceptance."""
    forced = draft.forced_verdicts
    if accept_rule is None or sampler.greedy or forced is not None:
        accept_rule = greedy if sampler.greedy else sampled
    rule = accept_rule(logits_NV, draft, sampler)
    children: list[list[int]] = [[] for _ in rule.parents]
    depths = [0] * len(rule.parents)
    for node, parent in enumerate(rule.parents[1:], 1):  # parents come before their children
        children[parent].append(node)
        depths[node] = depths[parent] + 1
    path, judged = [0], 0
    while siblings := children[path[-1]]:
        judged += 1
        if forced is not None:
            accepted = siblings[0] if forced[judged - 1] else None
        else:
            accepted = rule.accept(path[-1], siblings)
        if accepted is None:
            break
        path.append(accepted)
    token = rule.token_after(path[-1], [] if forced is not None else siblings)
    return Verification(tuple(path), (*(rule.ids[node] for node in path[1:]), token), max(depths), judged)


def verify_draft(logits_V: Logits, draft: Draft | None, sampler: Sampler) -> DraftVerdict:
    """Verifies a single draft against the target's logits for its position, greedy or lossless.

    Without a draft, and after a forced rejection, the target's own token is its choice from p.
    """
    if draft is not None and draft.forced_verdict:
        return DraftVerdict(True, draft.token_id)
    if draft is None or draft.forced_verdict is False or sampler.greedy:
        token = sampler.choose(logits_V)
        return DraftVerdict(draft is not None and draft.forced_verdict is None and token == draft.token_id, token)
    assert not isinstance(logits_V, int)
    target_V, drafted_V, token = sampler.probabilities(logits_V), draft.probabilities_V, draft.token_id
    drafted = None if drafted_V is None else [float(drafted_V[token])]
    if first_accepted([token], [float(target_V[token])], drafted, [sampler.uniform()]) is not None:
        return DraftVerdict(True, token)
    return DraftVerdict(False, sampler.draw(residual(target_V, to_device([token], target_V.device), drafted_V)))


def verify_siblings(logits_V: Logits, drafts: Sequence[Draft], sampler: Sampler) -> DraftVerdict:
    """Verifies different drafts for one position against the target's logits for it, greedy or lossless.

    Several drafts have to be picked ones: then a token chosen from p, accepted if it is among them, has the same
    distribution as accepting them one after the other, and which drafts there are cannot bias it. A forced verdict is
    that of the first draft.
    """
    if len(drafts) < 2 or drafts[0].forced_verdict is not None:
        return verify_draft(logits_V, drafts[0] if drafts else None, sampler)
    if any(draft.probabilities_V is not None for draft in drafts):
        raise ValueError("of several drafts for one position none may be drawn")
    token = sampler.choose(logits_V)
    return DraftVerdict(any(draft.token_id == token for draft in drafts), token)


def greedy(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:  # noqa: ARG001 - draws nothing
    """Greedy acceptance."""
    parents, ids, best = torch.stack((draft.tree.parents_N, draft.ids_N, next_tokens(logits_NV))).tolist()

    def accept(node: int, children: list[int]) -> int | None:
        return next((child for child in children if ids[child] == best[node]), None)

    return Rule(parents, ids, accept, lambda node, _: require_number(int(best[node])))


def first_accepted(
    tokens: Sequence[int], target: Sequence[float], drafted: Sequence[float] | None, uniform: Sequence[float]
) -> int | None:
    """Lossless sampling: the index of the first accepted one of siblings `tokens`.

    `target` are their probabilities under p, `drafted` under the distribution that they were drawn from (None: they
    were picked), `uniform` a number in [0, 1) for each. The comparison is strict: a token without probability must not
    be accepted where its number is 0.
    """
    rejected: set[int] = set()
    taken = 0.0  # by the siblings rejected so far
    for index, token in enumerate(tokens):
        if drafted is not None:
            if uniform[index] * drafted[index] < target[index]:
                return index
        elif token not in rejected:  # a second draft of a rejected token has no probability left
            if uniform[index] * (1.0 - taken) < target[index]:
                return index
            rejected.add(token)
            taken += target[index]
    return None


@one_thread()
def residual(target_V: Tensor, rejected_C: Tensor, drafted_V: Tensor | None) -> Tensor:
    """Lossless sampling: weights `[V]` of the token after rejected siblings `rejected_C`, from the distribution
    `drafted_V` where they were drawn."""
    left_V = target_V.index_fill(0, rejected_C, 0.0) if drafted_V is None else (target_V - drafted_V).clamp_(min=0.0)
    return _unless_empty(left_V, target_V)


def _unless_empty(left: Tensor, target: Tensor) -> Tensor:
    """Rows `[..., V]` of `left`, or of `target` where nothing is left: then the drafts had all the probability, and
    were rejected by rounding alone."""
    return torch.where(left.sum(-1, keepdim=True) > 0.0, left, target)


def sampled(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:
    """Lossless sampling. A CPU computes p for the nodes that the walk reaches. A GPU computes it for all nodes, so that
    the host waits for it once; the numbers are the same.

    Every node has two uniform numbers of its own, one for its verdict and one for the token drawn after it, so that
    the draws do not depend on the path.
    """
    return (sampled_by_node if logits_NV.device.type == "cpu" else sampled_at_once)(logits_NV, draft, sampler)


def sampled_by_node(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:
    """Lossless sampling that computes p one node at a time."""
    ids_N, drawn = draft.ids_N, draft.drawn
    parents, ids = draft.tree.parents_N.tolist(), ids_N.tolist()
    verdict_N, draw_N = _uniforms(sampler, len(ids))
    target = cache(lambda node: sampler.probabilities(logits_NV[node]))

    def accept(node: int, children: list[int]) -> int | None:
        tokens_C = ids_N[children]
        drafted = None if drawn is None else drawn[node][tokens_C].tolist()
        uniform = [verdict_N[child] for child in children]
        found = first_accepted(tokens_C.tolist(), target(node)[tokens_C].tolist(), drafted, uniform)
        return None if found is None else children[found]

    def token_after(node: int, rejected: list[int]) -> int:
        weights_V = target(node)
        if rejected:
            weights_V = residual(weights_V, ids_N[rejected], None if drawn is None else drawn[node])
        return sampler.draw(weights_V, draw_N[node])

    return Rule(parents, ids, accept, token_after)


def sampled_at_once(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:
    """Lossless sampling that computes p for all nodes where the logits are, and reads what the walk needs in one copy:
    by node its parent, its token, the token drawn after it, and its probabilities under p and where it was drawn."""
    parents_N, ids_N = draft.tree.parents_N, draft.ids_N
    verdict_N, draw_N = _uniforms(sampler, len(ids_N))
    target_NV, of_parent = sampler.probabilities(logits_NV), parents_N.clamp(min=0)
    likely_N = target_NV[of_parent, ids_N].double()
    drafted_N, left_NV = torch.ones_like(likely_N), target_NV.clone()
    if draft.forced_verdicts is not None:
        pass  # the token after a forced rejection is drawn from p
    elif draft.drawn is None:
        left_NV[of_parent[1:], ids_N[1:]] = 0.0
    elif len(draft.drawn):  # a chain: node i is drawn from the distribution at node i - 1
        drafted_NV = torch.stack(draft.drawn)
        drafted_N[1:] = drafted_NV.gather(1, ids_N[1:, None])[:, 0].double()
        left_NV[:-1] = (target_NV[:-1] - drafted_NV).clamp_(0)
    drawn_N = draw_rows(_unless_empty(left_NV, target_NV), to_device(draw_N, logits_NV.device, torch.float64))
    numbers = torch.stack([x.double() for x in (parents_N, ids_N, drawn_N, likely_N, drafted_N)]).tolist()
    parents, ids, drawn = ([int(x) for x in row] for row in numbers[:3])

    def accept(node: int, children: list[int]) -> int | None:  # noqa: ARG001
        tokens, likely, drafted, uniform = (
            [row[child] for child in children] for row in (ids, *numbers[3:], verdict_N)
        )
        found = first_accepted(tokens, likely, None if draft.drawn is None else drafted, uniform)
        return None if found is None else children[found]

    return Rule(parents, ids, accept, lambda node, _: require_number(drawn[node]))


def _uniforms(sampler: Sampler, num_nodes: int) -> tuple[list[float], ...]:
    """Numbers in [0, 1): one a node, twice."""
    return tuple([sampler.uniform() for _ in range(num_nodes)] for _ in range(2))


def typical(epsilon: float, delta: float) -> AcceptRule:
    """Typical acceptance. `epsilon` is the threshold where the target is certain, `delta` lowers it where it is not."""

    @one_thread()
    def rule(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:
        log_NV = (logits_NV.float() / sampler.sampling.temperature).log_softmax(dim=-1)
        entropy_N = -(log_NV.exp() * log_NV).nan_to_num(0.0).sum(dim=-1)
        bound_N = torch.minimum(torch.full_like(entropy_N, epsilon), delta * torch.exp(-entropy_N))
        parents_N = draft.tree.parents_N.clamp(min=0)
        likely_N = log_NV[parents_N, draft.ids_N]
        passes_N = likely_N.exp() > bound_N[parents_N]
        passes_N[0], likely_N[0] = True, 0.0
        sees_NN = draft.tree.rows.visible_SW
        all_pass_N = (sees_NN & ~passes_N).sum(dim=1) == 0
        depths_N = draft.tree.rows.depths_S.masked_fill(~all_pass_N, -1)
        path_likely_N = (sees_NN * likely_N).sum(dim=1).masked_fill(depths_N < depths_N.max(), -torch.inf)
        path = set(sees_NN[path_likely_N.argmax()].nonzero()[:, 0].tolist())

        def accept(node: int, children: list[int]) -> int | None:  # noqa: ARG001
            return next((child for child in children if child in path), None)

        return Rule(
            draft.tree.parents_N.tolist(),
            draft.ids_N.tolist(),
            accept,
            lambda node, _: sampler.choose(logits_NV[node]),
        )

    return rule
