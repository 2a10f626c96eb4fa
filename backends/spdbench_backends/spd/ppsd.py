"""`ppsd`: an early exit after the first stage drafts, while the later stages verify earlier tokens.

    cycle by cycle:
        every stage moves its token one stage on
        the exit head reads stage 0's output and drafts that token's successor, while all stages wait
        verdict, rollback and refill are those of `spd`

A re-implementation from the paper's abstract and its reviews (arXiv 2509.19368).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from spdbench.types import GenerationRequest
from spdbench_backends.spd.pipelined import Pipelined

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.models.decoder import Decoder
    from spdbench_backends.spd.drafter import PipelineDrafter


class PPSD(Pipelined):
    """PPSD (re-implementation): a pipeline whose first stage's output drafts."""

    method = "ppsd"
    _head: Decoder | None = None
    _drafts_last = True

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench_backends.spd.exit_formats import build_exit, random_exit, read_exit

        file = self._find_head(choice, read_exit, random_exit)
        if file is not None:
            self._head = build_exit(file, self._drafters_target, self._stages)

    def _fits(self, stages: tuple[range, ...]) -> bool:
        """An exit head reads the first stage's output."""
        return self._head is None or stages[0] == self._stages[0]

    def _time_draft(self, threads: int) -> float:
        from spdbench.pipeline.profiling import measured_times

        layers_s, head_s = measured_times(self._loaded(self._head), threads)
        return sum(layers_s) + head_s

    def _anchors(self) -> Collection[int]:
        return () if self._head is None else (self._stages[0].stop,)

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench_backends.spd.drafter import ExitDrafter, SyntheticPipelineDrafter

        if self._head is not None:
            return ExitDrafter(self._head, self._stages[0].stop)
        return SyntheticPipelineDrafter(self._drafts(request), reads_this_cycle=True)
