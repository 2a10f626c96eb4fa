"""A pipeline stepped in one process: every stage in turn, over its own layers and its own cache.

It does the same arithmetic as a pipeline of processes without its concurrency, so it shows acceptance and cycles, not
wall-clock gains.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.models.interface import TargetCache, TargetDecoder
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.schedule import Cycle, Node


def snapshots_in_step(stage: int, num_stages: int) -> int:
    """How many tokens a stage has to go back by at a rejection, if all stages move in step: as many as it is ahead of
    the token whose verdict it is, which is in the last stage."""
    return num_stages - 1 - stage


class InlinePipeline(Pipeline):
    """Stages `stages` of `decoder`; reports the hidden states whose index is in `hidden_indices`."""

    def __init__(self, decoder: TargetDecoder, stages: tuple[range, ...], hidden_indices: Collection[int]) -> None:
        super().__init__(decoder, hidden_indices)
        self._stages = stages
        self._caches: list[TargetCache] = []
        self._inputs: dict[int, Tensor] = {}
        self._cycle: Cycle | None = None

    def prefill(
        self,
        prompt_ids: Collection[int],
        capacity: int,
        *,
        greedy: bool,  # noqa: ARG002 - it only saves a message
    ) -> tuple[Logits, States]:
        decoder = self._decoder
        self._caches = [
            decoder.new_cache(capacity, layers, snapshots_in_step(stage, len(self._stages)))
            for stage, layers in enumerate(self._stages)
        ]
        self._inputs.clear()
        self._states.clear()
        hidden_SM = decoder.embed(decoder.ids(prompt_ids))
        states: dict[int, Tensor] = {}
        for layers, cache in zip(self._stages, self._caches, strict=True):
            hidden_SM, found = decoder.forward(hidden_SM, 0, cache, layers, self._hidden_indices)
            states |= found
        return decoder.logits(hidden_SM[-1:])[0], states

    def enter(self, node: Node) -> None:
        self._inputs[node.id] = self._embed(node)
        if 0 in self._hidden_indices:
            self._states.append((node.position, {0: self._inputs[node.id]}))

    def begin(self, cycle: Cycle) -> None:
        self._cycle = cycle

    def finish(self) -> Logits | None:
        assert self._cycle is not None
        logits_V: Tensor | None = None
        for stage, node in self._cycle.work():
            hidden_SM, found = self._decoder.forward(
                self._inputs.pop(node.id), node.position, self._caches[stage], self._stages[stage], self._hidden_indices
            )
            self._states.append((node.position, found))
            if stage == len(self._stages) - 1:
                logits_V = self._decoder.logits(hidden_SM)[0]
            else:
                self._inputs[node.id] = hidden_SM
        return logits_V

    def rollback(self, length: int) -> None:
        super().rollback(length)
        for cache in self._caches:
            cache.rollback(length)
        self._inputs.clear()

    def close(self) -> None:
        self._caches.clear()
