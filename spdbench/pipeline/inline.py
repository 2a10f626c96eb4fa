"""A pipeline stepped in one process: every stage in turn, over its own layers and its own cache.

The same arithmetic as a real pipeline and none of its concurrency, so it shows acceptance and cycles, not wall-clock
gains. Knows stages and hidden states; must not know who drafts or how tokens are judged.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from spdbench.models.interface import TargetCache, TargetDecoder
from spdbench.pipeline.schedule import Cycle, Node

States = Mapping[int, Tensor]
"""Hidden states by index k, each `[S, M]`."""


@dataclass(frozen=True)
class CycleOutput:
    """What a cycle gave: logits `[V]` of the completed node, the new hidden states by position, layers computed."""

    logits_V: Tensor | None
    states: tuple[tuple[int, States], ...]
    num_layers: int


class InlinePipeline:
    """Stages `stages` of `decoder`; reports the hidden states whose index is in `wanted`."""

    def __init__(self, decoder: TargetDecoder, stages: tuple[range, ...], wanted: Collection[int]) -> None:
        self._decoder = decoder
        self._stages = stages
        self._wanted = frozenset(wanted)
        self._caches: list[TargetCache] = []
        self._inputs: dict[int, Tensor] = {}

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    def prefill(self, prompt_ids: Collection[int], capacity: int) -> tuple[Tensor, States]:
        """The prompt through all stages, with fresh caches of `capacity` tokens: last logits `[V]`, states `[S, M]`."""
        decoder = self._decoder
        self._caches = [decoder.new_cache(capacity, layers) for layers in self._stages]
        self._inputs.clear()
        hidden_SM = decoder.embed(decoder.ids(prompt_ids))
        states: dict[int, Tensor] = {}
        for layers, cache in zip(self._stages, self._caches, strict=True):
            hidden_SM, found = decoder.forward(hidden_SM, 0, cache, layers, self._wanted)
            states |= found
        return decoder.logits(hidden_SM[-1:])[0], states

    def enter(self, node: Node) -> Tensor:
        """Embeds a node on its way into stage 0: hidden state 0, `[1, M]`."""
        hidden_SM = self._decoder.embed(self._decoder.ids((node.token_id,)))
        self._inputs[node.id] = hidden_SM
        return hidden_SM

    def step(self, cycle: Cycle) -> CycleOutput:
        """Runs every busy stage once on its own node."""
        logits_V: Tensor | None = None
        states: list[tuple[int, States]] = []
        num_layers = 0
        for stage, node in cycle.work():
            layers = self._stages[stage]
            hidden_SM = self._inputs.pop(node.id)
            hidden_SM, found = self._decoder.forward(
                hidden_SM, node.position, self._caches[stage], layers, self._wanted
            )
            states.append((node.position, found))
            num_layers += len(layers)
            if stage == self.num_stages - 1:
                logits_V = self._decoder.logits(hidden_SM)[0]
            else:
                self._inputs[node.id] = hidden_SM
        return CycleOutput(logits_V, tuple(states), num_layers)

    def rollback(self, length: int) -> None:
        """Forgets everything in flight, and every cached token from position `length` on."""
        for cache in self._caches:
            cache.rollback(length)
        self._inputs.clear()
