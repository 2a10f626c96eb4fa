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
from spdbench.pipeline.schedule import Batch, Change, Cycle, Node
from spdbench.types import Span

States = Mapping[int, Tensor]
"""Hidden states by index k, each `[S, M]`: a row for each token or node."""


class Pipeline(ABC):
    """Stages that serve one request after the other. A cycle is `begin`, then `finish`; what the caller does in between
    overlaps with the stages' work where these have processes of their own. `decoder` embeds; the hidden states
    `hidden_indices` are reported."""

    drafts_in_first_stage = False
    """True if this process, which drafts, is also the first stage."""

    def __init__(self, decoder: TargetDecoder, hidden_indices: Collection[int]) -> None:
        self._decoder = decoder
        self._hidden_indices = frozenset(hidden_indices)
        self._states: list[tuple[Node, States]] = []

    @abstractmethod
    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        """Begins a request: the prompt goes through all stages, with new caches of `capacity` tokens. Returns the
        logits of its last row and the hidden states that the pipeline reports."""

    @abstractmethod
    def enter(self, batch: Batch) -> None:
        """Gives stage 0 its nodes for the next cycle."""

    def offer(self, batch: Batch) -> None:  # noqa: B027 - it helps only where stage 0 can be free
        """Announces drafts that enter after this cycle unless a verdict drops them: a stage 0 that is free may begin
        with them, and has to stop with those that are dropped."""

    @abstractmethod
    def begin(self, cycle: Cycle) -> None:
        """Every busy stage may run once on its own batch."""

    @abstractmethod
    def finish(self) -> Logits | None:
        """Waits for the cycle's oldest batch; returns the logits of the node that completes."""

    def states(self) -> Sequence[tuple[Node, States]]:
        """New hidden states by node, each `[1, M]`, from the cycle that finished last; each is given once."""
        found, self._states = self._states, []
        return found

    def drop(self, change: Change) -> None:
        """Drops the nodes that a verdict drops. After a restart nothing else is in flight."""
        dropped = {node.id for node in change.dropped}
        self._states = [(node, states) for node, states in self._states if node.id not in dropped]

    def stop(self) -> None:  # noqa: B027 - it matters only where stages work by themselves
        """Drops everything in flight: the request has ended."""

    def spans(self, final_length: int) -> Sequence[Span]:  # noqa: ARG002 - by default lanes share a thread or a device
        """What each lane did during the last request; kept is what lies before position `final_length` and was not
        dropped. Empty where lanes have no times of their own."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Frees everything. May be called twice."""

    def _embed(self, batch: Batch) -> Tensor:
        """The nodes' hidden states 0, `[S, M]`."""
        return self._decoder.embed(self._decoder.ids([node.token_id for node in batch]))

    def _observe(self, batch: Sequence[Node], states: States) -> None:
        """Keeps hidden states `[S, M]` of a batch until they are asked for."""
        for row, node in enumerate(batch):
            self._states.append((node, {index: state_SM[row : row + 1] for index, state_SM in states.items()}))
