"""Medusa's typical acceptance: a draft passes if the target finds it likely enough. Not lossless.

Accept x iff p(x) > min(epsilon, delta e^(-H(p))), p at the request's temperature and H its entropy; the longest path
counts, the likelier one of several. Source: arXiv 2401.10774, section 2.3.1; METHODS.md B.

Shapes: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.verify import TreeVerdict, depth_of, judge_tree


@dataclass(frozen=True)
class TypicalAcceptance:
    """`epsilon` is the threshold where the target is sure, `delta` scales it down where it is not."""

    epsilon: float
    delta: float

    def __call__(
        self, logits_NV: Tensor, draft: DraftTree, sampler: Sampler, dictated: Sequence[bool] | None = None
    ) -> TreeVerdict:
        if sampler.greedy or dictated is not None:
            return judge_tree(logits_NV, draft, sampler, dictated)
        log_NV = (logits_NV.float() / sampler.sampling.temperature).log_softmax(dim=-1)
        entropy_N = -(log_NV.exp() * log_NV).nan_to_num(0.0).sum(dim=-1)
        bound_N = torch.minimum(torch.full_like(entropy_N, self.epsilon), self.delta * torch.exp(-entropy_N))
        parents_N = draft.tree.parents_N.clamp(min=0)
        likelihood_N = log_NV[parents_N, draft.ids_N]
        passes_N = likelihood_N.exp() > bound_N[parents_N]
        passes_N[0], likelihood_N[0] = True, 0.0
        sees_NN = draft.tree.rows.visible_SW
        stands_N = (sees_NN & ~passes_N).sum(dim=1) == 0
        depths_N = draft.tree.rows.depths_S.masked_fill(~stands_N, -1)
        along_N = (sees_NN * likelihood_N).sum(dim=1).masked_fill(depths_N < depths_N.max(), -torch.inf)
        node = int(along_N.argmax())
        path = sees_NN[node].nonzero()[:, 0].tolist()
        accepted = draft.ids_N[path[1:]].tolist()
        parents = draft.tree.parents_N.cpu().numpy()
        judged = len(accepted) + int((parents == node).any())
        last = sampler.choose(logits_NV[node])
        return TreeVerdict(tuple(path), (*accepted, last), depth_of(parents), judged)
