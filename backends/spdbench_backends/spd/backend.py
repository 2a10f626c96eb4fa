"""`spd`: speculative pipeline decoding. n stages work on n tokens of one sequence.

    prefill, then cycle by cycle:
        draft a successor of the newest token, from the features that exist before the step
        every stage moves its token one stage on
        the logits of the token that leaves the last stage verify its successor
            accepted: the successor is emitted, and the new draft enters stage 0
            rejected: all tokens in flight are dropped, the target's own token enters stage 0, and the next n - 1
                      cycles give no verdict

Source: arXiv 2605.30852; SPD.md section 4, without the faults of its section 11.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from spdbench.types import GenerationRequest
from spdbench_backends.spd.pipelined import Pipelined

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice
    from spdbench.pipeline.streams import CoDrafter
    from spdbench_backends.spd.captured import CapturedDraftModule
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.head import HeadWeights


class SPD(Pipelined):
    """Speculative pipeline decoding: n stages work on n tokens of one sequence."""

    method = "spd"
    _head: HeadWeights | None = None
    _module: CapturedDraftModule | None = None

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench_backends.spd.formats import build_head, random_head, read_head

        file = self._find_head(choice, read_head, random_head)
        if file is None:
            return
        self._head = build_head(file, self._drafters_target, self._stages)
        if self._options.stage_layers == "auto":
            self._head = self._rebalanced(self._head)

    def _anchors(self) -> Collection[int]:
        return () if self._head is None else self._head.plan.anchors

    def _rebalanced(self, head: HeadWeights) -> HeadWeights:
        """The head for stages balanced with its own drafting time, if its row types fit them."""
        from spdbench_backends.spd.head import drafting_seconds
        from spdbench_backends.spd.plan import FeaturePlan

        count = len(self._stages)
        stages = self._balanced(count, drafting_seconds(head, self._drafters_threads))
        plan = FeaturePlan(head.plan.anchors, stages)
        if plan.row_types != head.plan.row_types:
            return head
        self._stages = stages
        return replace(head, plan=plan)

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench_backends.spd.drafter import HeadDrafter, SyntheticPipelineDrafter

        if self._head is not None and self._module is not None:
            from spdbench.pipeline.streams import StreamsPipeline
            from spdbench_backends.spd.captured import CapturedHeadDrafter

            assert isinstance(self._pipeline, StreamsPipeline)
            return CapturedHeadDrafter(self._head, self._module, self._pipeline.drafted)
        if self._head is not None:
            return HeadDrafter(self._head)
        return SyntheticPipelineDrafter(self._drafts(request))

    def _co_drafter(self, capacity: int) -> CoDrafter | None:
        """None for heads that read rows as if all stages were level: these draft outside of the captured cycle."""
        from spdbench_backends.spd.captured import CapturedDraftModule

        if self._head is not None and self._head.use_deepest:
            self._module = CapturedDraftModule(self._head, capacity)
        return self._module
