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
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from spdbench.backend import BackendOptions
from spdbench.types import GenerationRequest
from spdbench_backends.spd.pipelined import Pipelined, PipelineOptions

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.pipeline.streams import CoDrafter
    from spdbench_backends.spd.captured import CapturedDraftModule
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.grouped import GroupedWeights
    from spdbench_backends.spd.head import HeadWeights


class SPDOptions(PipelineOptions):
    """Options of `spd`."""

    last_anchor: Literal["plain", "normed_prompt", "normed"] = Field(
        "plain",
        description="how a head reads the last layer's output: before the final norm; after it in the prompt, as "
        "the reference code decodes; or always after it, for heads trained with that",
    )


class SPD(Pipelined):
    """Speculative pipeline decoding: n stages work on n tokens of one sequence."""

    Options: ClassVar[type[BackendOptions]] = SPDOptions
    method = "spd"
    _options: SPDOptions
    _head: HeadWeights | GroupedWeights | None = None
    _module: CapturedDraftModule | None = None

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench_backends.spd.formats import build_head, random_head, read_head
        from spdbench_backends.spd.head import HeadWeights

        file = self._find_head(choice, read_head, random_head)
        if file is None:
            return
        self._head = build_head(file, self._drafters_target, self._stages, self._options.last_anchor)
        if self._options.stage_layers == "auto" and isinstance(self._head, HeadWeights):
            self._head = self._rebalanced(self._head)

    def _anchors(self) -> Collection[int]:
        return () if self._head is None else self._head.plan.anchors

    def _rebalanced(self, head: HeadWeights) -> HeadWeights:
        """The head for stages balanced with its own drafting time, if its row types fit them."""
        from spdbench_backends.spd.plan import FeaturePlan

        count = len(self._stages)
        stages = self._balanced(count, self._drafting_s(head, self._drafters_threads))
        plan = FeaturePlan(head.plan.anchors, stages)
        if plan.row_types != head.plan.row_types:
            return head
        self._stages = stages
        return replace(head, plan=plan)

    def measure_costs(self) -> None:
        """Measures a draft with all threads, for `spdbench profile`."""
        from spdbench_backends.spd.head import HeadWeights

        if isinstance(self._head, HeadWeights):
            self._drafting_s(self._head, self._context.threads)

    def _drafting_s(self, head: HeadWeights, threads: int) -> float:
        """Seconds of a draft in a full pipeline."""
        from spdbench.profiles.profile import make_key
        from spdbench_backends.spd.head import drafting_seconds

        info = self._loaded(self._info)
        fields = {"method": info.method, "drafter": (info.sha256 or info.id)[:12]}
        key = make_key("draft", **fields, stages=len(self._stages), threads=threads)
        return self._stored.seconds([key], lambda: [drafting_seconds(head, threads)])[0]

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench_backends.spd.drafter import HeadDrafter, SyntheticPipelineDrafter
        from spdbench_backends.spd.head import HeadWeights

        if isinstance(self._head, HeadWeights) and self._module is not None:
            from spdbench.pipeline.streams import StreamsPipeline
            from spdbench_backends.spd.captured import CapturedHeadDrafter

            assert isinstance(self._pipeline, StreamsPipeline)
            return CapturedHeadDrafter(self._head, self._module, self._pipeline.drafted)
        if self._head is not None:
            return HeadDrafter(self._head)
        return SyntheticPipelineDrafter(self._drafts(request))

    def _co_drafter(self, capacity: int) -> CoDrafter | None:
        """None for heads that read rows as if all stages were level, or normed states: these draft outside of the
        captured cycle."""
        from spdbench_backends.spd.captured import CapturedDraftModule
        from spdbench_backends.spd.head import HeadWeights

        head = self._head
        if isinstance(head, HeadWeights) and head.use_deepest and head.last_anchor != "normed":
            self._module = CapturedDraftModule(head, capacity)
        return self._module
