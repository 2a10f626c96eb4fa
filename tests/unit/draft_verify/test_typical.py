"""Medusa's typical acceptance."""

from __future__ import annotations

import torch

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree, from_paths
from spdbench.types import Sampling
from spdbench_backends.medusa.typical import TypicalAcceptance


def test_typical_acceptance_takes_what_is_likely_enough() -> None:
    """By hand: p = softmax of logits at the parent, bound min(epsilon, delta e^-H)."""
    tree = from_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    ids = torch.tensor([0, 1, 2, 3, 1, 2])
    logits = torch.zeros(6, 4)
    logits[0] = torch.tensor([0.0, 2.0, 2.1, -9.0])  # both 1 and 2 pass
    logits[1] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # 3 does not
    logits[2] = torch.tensor([-9.0, 1.0, 3.0, -9.0])  # 1 and 2 pass, 2 is the likelier
    verdict = TypicalAcceptance(0.09, 0.3)(logits, DraftTree(tree, ids), Sampler(Sampling(1.0), 0))
    assert verdict.path == (0, 2, 5)
    assert verdict.token_ids[:2] == (2, 2)
    assert (verdict.drafted, verdict.judged) == (2, 2)
    strict = TypicalAcceptance(0.99, 5.0)(logits, DraftTree(tree, ids), Sampler(Sampling(1.0), 0))
    assert (strict.path, strict.judged) == ((0,), 1)
    greedy = TypicalAcceptance(0.09, 0.3)(logits, DraftTree(tree, ids), Sampler(Sampling(), 0))
    assert greedy.path == (0, 2, 5)
