"""The Pipeline Draft Module, version 11: features of all depths in, logits of the next token out.

    rows -> one projection a row type -> decoder layers with a cache of their own -> newest row -> the target's final
    norm -> the module's own head

Source: SPD.md, section 2.
Shapes: S rows, M model width, P rows of the ring, F = m M columns for m anchors, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench.models.decoder import Decoder
from spdbench.models.torch_utils import median_seconds, to_device
from spdbench_backends.spd.plan import FeaturePlan, Row


@dataclass(frozen=True)
class HeadWeights:
    """`projections[i]` is `[M, (i + 1) M]`; `decoder` holds the module's layers, the target's final norm, and the
    module's head `[U, M]`. `token_ids_U` lists the draft vocabulary; None where it is the target's own."""

    plan: FeaturePlan
    projections: tuple[Tensor, ...]
    decoder: Decoder
    token_ids_U: Tensor | None
    use_deepest: bool


class DraftModule:
    """A head with what it remembers of one sequence of up to `capacity` tokens: the anchor features of the most recent
    positions, and a cache of the module's own layers.

    Features of a position stand side by side in a row of `_ring_PF`, so that a row of type i is its first (i + 1) M
    columns. Rows are reused: no position further back than two pipelines is read again. `spare_slots` of the cache, and
    one spare row of the ring, are for tokens that do not exist (see `captured.CapturedDraftModule`).
    """

    def __init__(self, weights: HeadWeights, capacity: int, spare_slots: int = 0) -> None:
        decoder, plan = weights.decoder, weights.plan
        self.weights = weights
        self._plan = plan
        self._width = weights.projections[0].shape[0]
        self._ring_size = 2 * plan.full_depth + 2
        self._columns = {anchor: slice(i * self._width, (i + 1) * self._width) for i, anchor in enumerate(plan.anchors)}
        self._cache = decoder.new_cache(capacity + spare_slots)
        shape = self._ring_size + 1, len(plan.anchors) * self._width
        self._ring_PF = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)

    def start(self, num_rows: int, states: Mapping[int, Tensor], prompt_length: int) -> None:
        """Reads the prompt's hidden states `[S, M]`: their first `num_rows` are rows at full depth."""
        self._cache.rollback(0)
        first = max(0, prompt_length - 2 * self._plan.full_depth)
        rows_S = to_device(
            [position % self._ring_size for position in range(first, prompt_length)], self.weights.decoder.device
        )
        for anchor, columns in self._columns.items():
            self._ring_PF[:, columns].index_copy_(0, rows_S, states[anchor][first:])
        if num_rows:
            kind = self._plan.row_type(self._plan.full_depth)
            features = torch.cat([states[anchor][:num_rows] for anchor in self._plan.anchors[: kind + 1]], dim=-1)
            self.weights.decoder.forward(linear(features, self.weights.projections[kind]), 0, self._cache)

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        """New hidden states of a token in flight, each `[1, M]`; those that are no anchors are ignored."""
        for index, state_1M in states.items():
            if index in self._columns:
                self._ring_PF[position % self._ring_size, self._columns[index]] = state_1M[0]

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Draft logits `[U]` for the token after the last row. Rewrites the cache from the first row on."""
        decoder, first = self.weights.decoder, rows[0].position
        ring_rows_S = to_device([row.position % self._ring_size for row in rows], decoder.device)
        self._cache.rollback(first)
        hidden_SM, _ = decoder.forward(self._project(ring_rows_S, [row.depth for row in rows]), first, self._cache)
        return decoder.logits(hidden_SM[-1:])[0]

    def rollback(self, length: int) -> None:
        """Forgets rows of positions from `length` on."""
        self._cache.rollback(length)

    def _project(self, ring_rows_S: Tensor, depths: Sequence[int]) -> Tensor:
        """The layers' inputs `[S, M]`: rows of the ring read at `depths`, each row type through its projection."""
        parts, start = [], 0
        for kind, group in groupby(map(self._plan.row_type, depths)):
            end = start + len(list(group))
            features = self._ring_PF[:, : (kind + 1) * self._width].index_select(0, ring_rows_S[start:end])
            parts.append(linear(features, self.weights.projections[kind]))
            start = end
        return torch.cat(parts)


def drafting_seconds(weights: HeadWeights, threads: int) -> float:
    """Seconds of a draft in a full pipeline."""
    plan, decoder = weights.plan, weights.decoder
    width, depth = weights.projections[0].shape[0], plan.full_depth
    prompt_length = 2 * depth
    module = DraftModule(weights, prompt_length)
    state_SM = torch.zeros(prompt_length, width, dtype=decoder.dtype, device=decoder.device)
    states = dict.fromkeys(plan.anchors, state_SM)
    first = prompt_length - depth
    module.start(first, states, prompt_length)
    rows = [Row(position, prompt_length - 1 - position) for position in range(first, prompt_length)]
    return median_seconds(lambda: int(module.logits(rows).argmax()), threads=threads)
