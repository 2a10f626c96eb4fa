"""The draft module's caches and ring against a computation from scratch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_evenly
from spdbench.pipeline.schedule import Cycle, Node
from spdbench_backends.spd.drafter import HeadDrafter
from spdbench_backends.spd.formats import build_head, random_head
from spdbench_backends.spd.head import HeadWeights
from tests import tiny
from tests.unit.spd.inline import generate


class Checked(HeadDrafter):
    """Drafts like its parent, and each time again from all features ever seen, without any cache.

    Half of its drafts are made right, so that pipelines fill, complete and flush.
    """

    def __init__(self, decoder: Decoder, num_stages: int, answer: list[int]) -> None:
        stages = split_evenly(6, num_stages)
        super().__init__(build_head(random_head(decoder, stages, 3, num_layers=2), decoder, stages))
        self.features: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.answer = answer
        self.prompt_length = 0
        self.num_checked = 0

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        self.prompt_length = prompt_length
        for position in range(prompt_length):
            self.features[position] = {index: state[position : position + 1] for index, state in states.items()}
        super().start(states, prompt_length, capacity)

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        self.features[node.position].update(states)
        super().observe(node, states)

    def rollback(self, length: int) -> None:
        for position in [p for p in self.features if p >= length]:
            del self.features[position]
        super().rollback(length)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        newest = cycle.newest
        assert newest is not None
        from_scratch = int(self.logits_from_scratch(cycle, newest.position).argmax())
        draft = super().draft(cycle, sampler)
        assert draft.token_id == from_scratch
        self.num_checked += 1
        index = newest.position + 1 - self.prompt_length
        return Draft(self.answer[index]) if index < len(self.answer) and index % 3 else draft

    def logits_from_scratch(self, cycle: Cycle, newest: int) -> Tensor:
        head = self._weights
        assert isinstance(head, HeadWeights)
        depth = {batch[0].position: stage for stage, batch in cycle.work()}
        rows = []
        for position in range(newest + 1):
            kind = head.plan.row_type(depth.get(position, head.plan.full_depth))
            parts = [self.features[position][anchor] for anchor in head.plan.anchors[: kind + 1]]
            rows.append(head.projections[kind](torch.cat(parts, dim=-1)))
        hidden, _ = head.decoder.forward(torch.cat(rows), 0, head.decoder.new_cache(newest + 1))
        return head.decoder.logits(hidden[-1:])[0]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 6])
@pytest.mark.parametrize("prompt", [tiny.PROMPT, tiny.PROMPT[:1]], ids=["prompt", "one-token prompt"])
def test_cached_drafts_equal_drafts_from_scratch(decoder: Decoder, num_stages: int, prompt: tuple[int, ...]) -> None:
    request = tiny.greedy(prompt, 30)
    answer = list(decode(decoder, request))
    drafter = Checked(decoder, num_stages, answer)
    steps = list(generate(decoder, split_evenly(6, num_stages), drafter, request))
    assert [token for step in steps for token in step.token_ids] == answer
    assert drafter.num_checked > 25
    accepted = sum(step.accepted for step in steps)
    assert 10 < accepted < 29


def test_nothing_is_kept_of_old_positions(decoder: Decoder) -> None:
    """Features lie in a ring of two pipelines, whatever the length of the answer."""
    stages = split_evenly(6, 3)
    drafter = HeadDrafter(build_head(random_head(decoder, stages, 3), decoder, stages))
    list(generate(decoder, stages, drafter, tiny.greedy(tiny.PROMPT, 60)))
    assert drafter._module is not None
    assert drafter._module._ring_size == 8
    assert len(drafter._module._ring_PF) == 9, "one more for tokens that do not exist"
