"""What a decoding loop may ask of a pipeline, wherever its stages run.

Two classes fit: `inline.InlinePipeline`, stepped in this process, and `process.ProcessPipeline`, whose stages are
processes. This module must know neither, nor who drafts, nor how tokens are judged.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.pipeline.schedule import Cycle, Node
from spdbench.types import Span

States = Mapping[int, Tensor]
"""Hidden states by index k, each `[S, M]`."""


class Pipeline(Protocol):
    """Stages at work on one request after the other. A cycle is `begin`, then `finish`; what lies between them overlaps
    with the stages' work where these have processes of their own."""

    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        """A new request: the prompt through all stages, with fresh caches of `capacity` tokens. Logits of its last row,
        and the hidden states that the pipeline was told to report."""

    def enter(self, node: Node) -> None:
        """Puts a node before stage 0, for the next cycle."""

    def offer(self, token_id: int, position: int) -> None:
        """A draft that enters once this cycle is over, unless a verdict drops it: a stage 0 that is free may begin with
        it, and has to stop when it is dropped."""

    def begin(self, cycle: Cycle) -> None:
        """Every busy stage may run once on its own node."""

    def finish(self) -> Logits | None:
        """Waits for the cycle's oldest node: the logits behind it if it completed."""

    def states(self) -> Sequence[tuple[int, States]]:
        """New hidden states by position, each `[1, M]`, from the cycle that finished last; each is given once."""

    def rollback(self, length: int) -> None:
        """Forgets everything in flight, and every token from position `length` on."""

    def spans(self, final_length: int) -> Sequence[Span]:
        """The last request's work on its lanes; kept is what lies before position `final_length` and was never rolled
        back. Empty where no clock could tell lanes apart."""

    def close(self) -> None:
        """Frees everything. May be called twice."""
