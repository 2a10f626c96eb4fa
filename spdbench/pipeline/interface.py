"""The interface between a decoding loop and a pipeline, wherever its stages run.

Implemented by `inline.InlinePipeline`, which steps all stages in this process, `streams.StreamsPipeline`, whose stages
share one GPU, and `process.ProcessPipeline`, whose stages are processes. A pipeline knows neither drafters nor how
tokens are verified.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.models.interface import TargetDecoder
from spdbench.pipeline.schedule import Cycle, Node
from spdbench.types import Span

States = Mapping[int, Tensor]
"""Hidden states by index k, each `[S, M]`."""


class Pipeline(ABC):
    """Stages that serve one request after the other. A cycle is `begin`, then `finish`; what the caller does in between
    overlaps with the stages' work where these have processes of their own. `decoder` embeds; the hidden states
    `hidden_indices` are reported."""

    def __init__(self, decoder: TargetDecoder, hidden_indices: Collection[int]) -> None:
        self._decoder = decoder
        self._hidden_indices = frozenset(hidden_indices)
        self._states: list[tuple[int, States]] = []

    @abstractmethod
    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        """Begins a request: the prompt goes through all stages, with new caches of `capacity` tokens. Returns the
        logits of its last row and the hidden states that the pipeline reports."""

    @abstractmethod
    def enter(self, node: Node) -> None:
        """Gives stage 0 its node for the next cycle."""

    def offer(self, token_id: int, position: int) -> None:  # noqa: B027 - it helps only where stage 0 can be free
        """Announces a draft that enters after this cycle unless a verdict drops it: a stage 0 that is free may begin
        with it, and has to stop when it is dropped."""

    @abstractmethod
    def begin(self, cycle: Cycle) -> None:
        """Every busy stage may run once on its own node."""

    @abstractmethod
    def finish(self) -> Logits | None:
        """Waits for the cycle's oldest node; returns its logits if it completed."""

    def states(self) -> Sequence[tuple[int, States]]:
        """New hidden states by position, each `[1, M]`, from the cycle that finished last; each is given once."""
        found, self._states = self._states, []
        return found

    def rollback(self, length: int) -> None:
        """Drops everything in flight, and every token from position `length` on."""
        self._states = [(position, states) for position, states in self._states if position < length]

    def spans(self, final_length: int) -> Sequence[Span]:  # noqa: ARG002 - by default lanes share a thread or a device
        """What each lane did during the last request; kept is what lies before position `final_length` and was never
        rolled back. Empty where lanes have no times of their own."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Frees everything. May be called twice."""

    def _embed(self, node: Node) -> Tensor:
        """The node's hidden state 0, `[1, M]`."""
        return self._decoder.embed(self._decoder.ids((node.token_id,)))
