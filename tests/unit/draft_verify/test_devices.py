"""Whatever a drafter proposes lies where its tokens do. Tensors without data stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.tree import DraftTree, chain
from spdbench.types import Sampling
from spdbench_backends.draft_model import ModelDrafter
from spdbench_backends.ngram import NgramDrafter

META = torch.device("meta")
SAMPLER = Sampler(Sampling(), 0)
NOTHING = Features(torch.zeros(0, 0), {})


class Elsewhere:
    """What drafters need of a target whose tokens are elsewhere."""

    class config:  # noqa: N801 - an attribute's name
        max_positions = 100

    def ids(self, token_ids: Collection[int]) -> Tensor:
        return torch.zeros(len(token_ids), dtype=torch.long, device=META)

    def new_cache(self, capacity: int, num_snapshots: int = 0) -> Elsewhere:  # noqa: ARG002
        return self

    length = 0


def test_prompt_lookup() -> None:
    drafter = NgramDrafter(3, 2, 1, Elsewhere())
    drafter.start((1, 2, 3, 1), NOTHING, 2)
    for levels in (0, 2):
        draft = drafter.propose(levels, SAMPLER)
        assert len(draft.tree) == levels + 1
        assert draft.tree.parents_N.device == draft.ids_N.device == META


def test_a_smaller_model() -> None:
    drafter = ModelDrafter(Elsewhere(), 9, 3, 50)  # type: ignore[arg-type]
    drafter.start((1, 2), NOTHING, 3)
    draft = drafter.propose(0, SAMPLER)
    assert draft.tree.parents_N.device == draft.ids_N.device == META


def test_a_tree_elsewhere_than_its_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a tree on cpu of tokens on meta"):
        DraftTree(chain(1), torch.zeros(2, dtype=torch.long, device=META))
