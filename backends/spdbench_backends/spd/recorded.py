"""The Pipeline Draft Module as a branch beside the stages: the same arithmetic as `head.DraftModule`, recorded.

A cycle with s busy stages has s + 1 rows: the tokens in flight, each as deep as it has come, and the one before them at
full depth. While the pipeline fills, that one is computed again, to the same numbers. For heads that read each row as
deep as it has come. Knows features by position; must not know verdicts, nor what else is recorded.

Shapes: S rows, M model width, m anchors, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.models.cpu.argmax import argmax
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.pipeline.schedule import Cycle
from spdbench_backends.spd.drafter import HeadDrafter
from spdbench_backends.spd.head import HeadWeights


class RecordedDraftModule:
    """A head with the cache of one sequence of up to `capacity` tokens. A token that stands at `capacity` is nobody's:
    its features go to a row of the ring, and its rows to slots of the cache, that no other reads."""

    def __init__(self, weights: HeadWeights, capacity: int) -> None:
        decoder, plan = weights.decoder, weights.plan
        self._weights = weights
        self._capacity = capacity
        self._width = weights.projections[0].shape[0]
        self._ring_size = 2 * plan.full_depth + 2
        assert decoder.head is not None
        with torch.inference_mode():
            self._cache = decoder.new_cache(capacity + plan.full_depth + 2)
            self._layers = CapturedLayers(decoder.weights, decoder.geometry, decoder.rotary, self._cache)
            shape = self._ring_size + 1, len(plan.anchors) * self._width
            self._ring = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
            num_ids = decoder.config.vocab_size if weights.token_ids_U is None else len(weights.token_ids_U)
            self.logits_1U = torch.zeros(1, num_ids, dtype=decoder.dtype, device=decoder.device)

    def start(self, states: Mapping[int, Tensor], prompt_length: int) -> None:
        """Reads the prompt: its hidden states, `[S, M]` by index."""
        plan, decoder = self._weights.plan, self._weights.decoder
        first = max(0, prompt_length - 2 * plan.full_depth)
        positions_S = torch.arange(first, prompt_length, device=decoder.device)
        for index in plan.anchors:
            self._put(index, positions_S, states[index][first:])
        kind = plan.row_type(plan.full_depth)
        features = torch.cat([states[index] for index in plan.anchors[: kind + 1]], dim=-1)
        self._cache.rollback(0)
        decoder.forward(linear(features, self._weights.projections[kind]), 0, self._cache)

    def enter(self, position_1: Tensor, hidden_1M: Tensor) -> None:
        self._put(0, position_1, hidden_1M)

    def observe(self, index: int, position_1: Tensor, hidden_1M: Tensor) -> None:
        self._put(index, position_1, hidden_1M)

    def draft(self, num_stages: int, position_1: Tensor, bucket: int) -> Tensor:
        weights, decoder, plan = self._weights, self._weights.decoder, self._weights.plan
        first_1 = (position_1 - num_stages).masked_fill(position_1 >= self._capacity, self._capacity + 1)
        positions_S = first_1 + torch.arange(num_stages + 1, device=position_1.device)
        places_S = positions_S % self._ring_size
        depths = (plan.full_depth, *reversed(range(num_stages)))
        parts, done = [], 0
        for kind, group in groupby(plan.row_type(depth) for depth in depths):
            count, columns = len(list(group)), (kind + 1) * self._width
            rows = self._ring[:, :columns].index_select(0, places_S[done : done + count])
            parts.append(linear(rows, weights.projections[kind]))
            done += count
        context = self._layers.chain(positions_S, bucket)
        hidden_SM = self._layers.forward(torch.cat(parts), context, decoder.layers)
        logits_1U = decoder.logits(hidden_SM[-1:])
        self.logits_1U.copy_(logits_1U)
        best_1 = argmax(logits_1U)
        ids_U = weights.token_ids_U
        return best_1 if ids_U is None else ids_U.index_select(0, best_1)

    def _put(self, index: int, positions_S: Tensor, hidden_SM: Tensor) -> None:
        anchor = self._weights.plan.anchors.index(index)
        rows_S = (positions_S % self._ring_size).masked_fill(positions_S >= self._capacity, self._ring_size)
        columns = slice(anchor * self._width, (anchor + 1) * self._width)
        self._ring[:, columns].index_copy_(0, rows_S, hidden_SM)


class RecordedHeadDrafter(HeadDrafter):
    """One request's drafter whose drafts come out of the pipeline's own cycle: `drafted` waits for this one's."""

    def __init__(self, weights: HeadWeights, module: RecordedDraftModule, drafted: Callable[[], int]) -> None:
        super().__init__(weights)
        self._recorded = module
        self._drafted = drafted

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:  # noqa: ARG002
        self._recorded.start(states, prompt_length)

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        """The stages have put them where they are read."""

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:  # noqa: ARG002 - the cycle has drafted
        return Draft(self._drafted()) if sampler.greedy else self._draft(self._recorded.logits_1U[0], sampler)

    def rollback(self, length: int) -> None:
        """Rows from `length` on are written again before they are read."""
