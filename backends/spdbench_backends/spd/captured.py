"""The Pipeline Draft Module as a branch of the captured cycle, next to the stages.

A cycle with s busy stages has s + 1 rows: the tokens in flight, each as deep as it has come, and the one before them at
full depth. `head.DraftModule` computes that one once; here, where the number of rows must not depend on values, it is
computed again while the pipeline fills, to the same numbers. Serves heads that read each row as deep as it has come.

Shapes: S rows, M model width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.models.layer_ops import argmax
from spdbench.pipeline.schedule import Cycle, Node
from spdbench_backends.spd.drafter import HeadDrafter
from spdbench_backends.spd.head import AnchoredModule, HeadWeights


class CapturedDraftModule(AnchoredModule):
    """The `CoDrafter` of a streams pipeline. A token at position `capacity` is that of an idle stage: its features go
    to the spare row of the ring and its rows to the spare slots of the cache, which no other token reads."""

    def __init__(self, weights: HeadWeights, capacity: int) -> None:
        with torch.inference_mode():
            super().__init__(weights, capacity, spare_slots=weights.plan.full_depth + 2)
            decoder = weights.decoder
            self._capacity = capacity
            self._layers = CapturedLayers(decoder.weights, decoder.geometry, decoder.rotary, self._cache)
            self.logits_1U = torch.zeros(1, weights.vocabulary.size, dtype=decoder.dtype, device=decoder.device)

    def enter(self, position_1: Tensor, hidden_1M: Tensor) -> None:
        self.observe_stage(0, position_1, hidden_1M)

    def observe_stage(self, index: int, position_1: Tensor, hidden_1M: Tensor) -> None:
        rows_1 = (position_1 % self._ring_size).masked_fill(position_1 >= self._capacity, self._ring_size)
        self._ring_PF[:, self._columns[index]].index_copy_(0, rows_1, hidden_1M)

    def draft(self, num_stages: int, position_1: Tensor, bucket: int) -> Tensor:
        decoder = self.weights.decoder
        first_1 = (position_1 - num_stages).masked_fill(position_1 >= self._capacity, self._capacity + 1)
        positions_S = first_1 + torch.arange(num_stages + 1, device=position_1.device)
        depths = (self._plan.full_depth, *reversed(range(num_stages)))
        rows_SM = self._project(positions_S % self._ring_size, depths)
        hidden_SM = self._layers.forward(rows_SM, self._layers.chain(positions_S, bucket), decoder.layers)
        self.logits_1U.copy_(decoder.logits(hidden_SM[-1:]))
        return self.weights.vocabulary.to_target(argmax(self.logits_1U))


class CapturedHeadDrafter(HeadDrafter):
    """One request's drafter whose drafts come out of the pipeline's cycle: `drafted` waits for the current one's."""

    def __init__(self, weights: HeadWeights, module: CapturedDraftModule, drafted: Callable[[], int]) -> None:
        super().__init__(weights)
        self._captured = module
        self._drafted = drafted

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:  # noqa: ARG002
        self._captured.start(prompt_length, states, prompt_length)

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        """The stages have put them into the module's ring."""

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:  # noqa: ARG002 - the cycle has drafted
        return Draft(self._drafted()) if sampler.greedy else self._draft(self._captured.logits_1U[0], sampler)

    def rollback(self, length: int) -> None:
        """Rows from `length` on are overwritten before they are read."""
