"""The Pipeline Draft Module, version 11: features of all depths in, logits of the next token out.

    rows -> one projection a row type -> decoder layers with a cache of their own -> newest row -> the target's final
    norm -> the module's own head

Source: SPD.md, section 2. Knows features by position; must not know of stages, files or verdicts.
Shapes: S rows, M model width, m anchors, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import linear

from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from spdbench.models.timing import median_seconds
from spdbench_backends.spd.plan import FeaturePlan, Row


@dataclass(frozen=True)
class HeadWeights:
    """`projections[i]` is `[M, (i + 1) M]`; `decoder` holds the module's layers, the target's final norm, and the
    module's head `[U, M]`. `token_ids_U` names the draft vocabulary; None where it is the target's own."""

    plan: FeaturePlan
    projections: tuple[Tensor, ...]
    decoder: Decoder
    token_ids_U: Tensor | None
    use_deepest: bool


class FeatureRing:
    """Anchor features of the most recent positions, each position's side by side: `[positions, m M]`.

    A row of type i is then the first (i + 1) M columns, with nothing to gather. Old positions are overwritten: none
    further back than two pipelines is read again.
    """

    def __init__(self, plan: FeaturePlan, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._slot_of = {anchor: slice(i * width, (i + 1) * width) for i, anchor in enumerate(plan.anchors)}
        self._size = 2 * plan.full_depth + 2
        self._rows = torch.zeros(self._size, len(plan.anchors) * width, dtype=dtype, device=device)

    def put(self, position: int, states: Mapping[int, Tensor], row: int = 0) -> None:
        """Stores row `row` of each hidden state `[S, M]` in `states` for `position`; others are passed over."""
        for index, state_SM in states.items():
            if index in self._slot_of:
                self._rows[position % self._size, self._slot_of[index]] = state_SM[row]

    def get(self, positions: Sequence[int], columns: int) -> Tensor:
        """`[len(positions), columns]`."""
        return self._rows[[position % self._size for position in positions], :columns]


class DraftModule:
    """A head at work on one sequence."""

    def __init__(self, weights: HeadWeights) -> None:
        self.weights = weights
        self._plan = weights.plan
        self._width = weights.projections[0].shape[0]
        self._cache: KVCache | None = None
        self._ring = self._new_ring()

    def start(self, rows: Sequence[Row], states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        """Reads the prompt: `rows` are its rows at full depth, `states` the prompt's hidden states `[S, M]`."""
        decoder = self.weights.decoder
        self._cache = decoder.new_cache(capacity)
        self._ring = self._new_ring()
        for position in range(max(0, prompt_length - 2 * self._plan.full_depth), prompt_length):
            self._ring.put(position, states, row=position)
        if rows:
            kind = self._plan.row_type(self._plan.full_depth)
            features = torch.cat([states[anchor][: len(rows)] for anchor in self._plan.anchors[: kind + 1]], dim=-1)
            decoder.forward(linear(features, self.weights.projections[kind]), 0, self._cache)

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        """New hidden states of a token in flight, each `[1, M]`."""
        self._ring.put(position, states)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Draft logits `[U]` for the token after the last row. Rewrites the cache from the first row on."""
        assert self._cache is not None
        parts = []
        for kind, group in groupby(rows, key=lambda row: self._plan.row_type(row.depth)):
            features = self._ring.get([row.position for row in group], (kind + 1) * self._width)
            parts.append(linear(features, self.weights.projections[kind]))
        self._cache.rollback(rows[0].position)
        hidden_SM, _ = self.weights.decoder.forward(torch.cat(parts), rows[0].position, self._cache)
        return self.weights.decoder.logits(hidden_SM[-1:])[0]

    def rollback(self, length: int) -> None:
        """Forgets rows of positions from `length` on."""
        if self._cache is not None:
            self._cache.rollback(length)

    def _new_ring(self) -> FeatureRing:
        decoder = self.weights.decoder
        return FeatureRing(self._plan, self._width, decoder.dtype, decoder.device)


def drafting_seconds(weights: HeadWeights, threads: int) -> float:
    """What a draft takes in a full pipeline."""
    plan, decoder = weights.plan, weights.decoder
    width, depth = weights.projections[0].shape[0], plan.full_depth
    module, prompt_length = DraftModule(weights), 2 * depth
    state_SM = torch.zeros(prompt_length, width, dtype=decoder.dtype, device=decoder.device)
    states = dict.fromkeys(plan.anchors, state_SM)
    first = prompt_length - depth
    module.start([Row(position, depth) for position in range(first)], states, prompt_length, prompt_length)
    rows = [Row(position, prompt_length - 1 - position) for position in range(first, prompt_length)]
    return median_seconds(lambda: int(module.logits(rows).argmax()), threads=threads)
