"""A pipeline stepped in one process: every stage in turn, over its own layers and its own cache.

It does the same arithmetic as a pipeline of processes without its concurrency, so it shows acceptance and cycles, not
wall-clock gains.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.models.interface import TargetDecoder
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.output_head import HeadPart
from spdbench.pipeline.schedule import Batch, Change, Cycle
from spdbench.pipeline.stage_cache import StageCache


def snapshots_in_step(stage: int, num_stages: int) -> int:
    """How many tokens a stage has to go back by at a rejection, if all stages move in step: as many as it is ahead of
    the token whose verdict it is, which is in the last stage."""
    return num_stages - 1 - stage


class InlinePipeline(Pipeline):
    """Stages `stages` of `decoder`; reports the hidden states whose index is in `hidden_indices`. `head` are the parts
    of the output head, by rising token ids; empty: it is whole."""

    def __init__(
        self,
        decoder: TargetDecoder,
        stages: tuple[range, ...],
        hidden_indices: Collection[int],
        head: Sequence[HeadPart] = (),
    ) -> None:
        super().__init__(decoder, hidden_indices)
        self._head = head
        self._stages = stages
        self._caches: list[StageCache] = []
        self._inputs: dict[int, Tensor] = {}  # by node, `[1, M]`
        self._cycle: Cycle | None = None

    def prefill(
        self,
        prompt_ids: Collection[int],
        capacity: int,
        *,
        greedy: bool,  # noqa: ARG002 - it only saves a message
    ) -> tuple[Logits, States]:
        decoder, count = self._decoder, len(self._stages)
        self._caches.clear()
        self._inputs.clear()
        self._states.clear()
        hidden_SM = decoder.embed(decoder.ids(prompt_ids))
        states: dict[int, Tensor] = {}
        for stage, layers in enumerate(self._stages):
            cache = decoder.new_cache(capacity, layers, snapshots_in_step(stage, count))
            hidden_SM, found = decoder.forward(hidden_SM, 0, cache, layers, self._hidden_indices)
            states |= found
            self._caches.append(StageCache(decoder, cache, layers, self._hidden_indices, len(prompt_ids)))
        return self._logits(hidden_SM[-1:]), states

    def enter(self, batch: Batch) -> None:
        hidden_SM = self._embed(batch)
        self._give(batch, hidden_SM)
        if 0 in self._hidden_indices:
            self._observe(batch, {0: hidden_SM})

    def begin(self, cycle: Cycle) -> None:
        self._cycle = cycle

    def finish(self) -> Logits | None:
        cycle = self._cycle
        assert cycle is not None
        logits_V: Tensor | None = None
        for stage, batch in cycle.work():
            rows_SM = torch.cat([self._inputs.pop(node.id) for node in batch])
            hidden_SM, found = self._caches[stage].forward(rows_SM, batch, cycle.root.id)
            self._observe(batch, found)
            if stage == len(self._stages) - 1:
                logits_V = self._logits(hidden_SM)
            else:
                self._give(batch, hidden_SM)
        return logits_V

    def drop(self, change: Change) -> None:
        super().drop(change)
        for node in change.dropped:
            self._inputs.pop(node.id, None)

    def _give(self, batch: Batch, hidden_SM: Tensor) -> None:
        """A stage's inputs for the next cycle."""
        self._inputs |= {node.id: hidden_SM[row : row + 1] for row, node in enumerate(batch)}

    def close(self) -> None:
        self._caches.clear()

    def _logits(self, row_1M: Tensor) -> Tensor:
        """Logits `[V]`."""
        if not self._head:
            return self._decoder.logits(row_1M)[0]
        return torch.cat([part.logits(row_1M)[0] for part in self._head])
