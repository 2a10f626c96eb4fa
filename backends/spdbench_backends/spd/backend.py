"""`spd`: speculative pipeline decoding. n stages work on n tokens of one sequence.

    prefill, then cycle by cycle:
        draft a successor of the newest token, from the features that exist before the step
        every stage moves its token one stage on
        the logits of the token that leaves the last stage verify its successor
            accepted: the successor is emitted, and the new draft enters stage 0
            rejected: all tokens in flight are dropped, the target's own token enters stage 0, and the next n - 1
                      cycles give no verdict

Source: arXiv 2605.30852 and the code published with it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.processors import usable_cores
from spdbench.types import GenerationRequest
from spdbench_backends.spd.pipelined import Pipelined
from spdbench_backends.spd.placement import PipelineOptions

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.pipeline.streams import CoDrafter
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.head import CapturedDraftModule, GroupedWeights, HeadWeights


USUAL_MAX_ROWS = 8
"""Of a stage with branches: so many rows cost little more than one on most devices."""
USUAL_TOP_K = 4
"""Drafts after a token where nothing is asked for and branches pay: measured on CPUs, greedy, in `benchmarks.branches`.
At a temperature a picked draft is accepted less often than a drawn one, and branches win nothing."""
MAX_SHARING_STAGES = 3
"""As many stages win by branches where they share cores: with 5 on 2 cores, further rows cost more than they win."""


class SPDOptions(PipelineOptions):
    """Options of `spd`."""

    last_anchor: Literal["plain", "normed_prompt", "normed"] = Field(
        "plain",
        description="how a head reads the last layer's output: before the final norm; after it in the prompt, as "
        "the reference code decodes; or always after it, for heads trained with that",
    )
    draft_top_k: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto",
        description="drafts after each of the newest tokens; more than 1: branches, a few rows a stage; auto: 4 for "
        "greedy requests on CPUs, in up to 3 stages or one a core, with a trained head and a model that allow it, "
        "else 1",
    )
    redraft: bool = Field(
        False,
        description="true: a row that has become deeper drafts again, and another token enters as a branch at once; "
        "needs a head, best one trained with -o all_depths; synthetic drafters never draft another token",
    )
    max_rows: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="with branches: the most rows that a stage computes in a cycle; default: one, one more for each "
        "stage and further draft, at most 8",
    )


class SPD(Pipelined):
    """Speculative pipeline decoding: n stages work on n tokens of one sequence."""

    Options: ClassVar[type[BackendOptions]] = SPDOptions
    method = "spd"
    _options: SPDOptions
    _head: HeadWeights | GroupedWeights | None = None
    _module: CapturedDraftModule | None = None
    _top_k: int = 1

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench_backends.spd.formats import build_head, random_head, read_head

        options = self._options
        if options.draft_top_k != "auto":
            self._top_k = options.draft_top_k
        if self._has_branches:
            self._require_branches(self._target_without_branches())
        file = self._find_head(choice, read_head, random_head)
        if file is not None:
            self._head = build_head(file, self._drafters_target, self._stages, options.last_anchor)
            if self._has_branches:
                self._require_branches(self._head_without_branches())
        if options.draft_top_k == "auto" and choice.kind in ("path", "auto") and self._branches_pay:
            self._top_k = USUAL_TOP_K
        if options.max_rows is not None and not self._has_branches:
            raise self._option_error("max_rows", "is used with draft_top_k above 1 or redraft=true only")

    @property
    def _has_branches(self) -> bool:
        return self._top_k > 1 or self._options.redraft

    @property
    def _branches_pay(self) -> bool:
        """True where several drafts are possible and were measured to win more than their rows cost."""
        on_cpu = all(device == "cpu" for device in self._context.devices)
        possible = not (self._target_without_branches() or self._head_without_branches())
        few = 1 < len(self._stages) <= max(MAX_SHARING_STAGES, usable_cores())
        return on_cpu and possible and self._executor != "streams" and few

    @property
    def _max_rows(self) -> int:
        options = self._options
        if not self._has_branches:
            return 1
        usual = 1 + len(self._stages) * (self._top_k - 1 + int(options.redraft))
        return options.max_rows or min(usual, USUAL_MAX_ROWS)

    def _target_without_branches(self) -> str | None:
        """Why this model has no branches; None if it can have them."""
        options = self._options
        own = self._context.target.own_decoder if self._context.target.unsupported_reason is None else None
        if own is None:
            return "this model runs on transformers' layers, which take no trees"
        if not own.takes_trees:
            return "this model has recurrent layers, which take no trees"
        count = 2 * (options.asked_stages or own.config.num_layers)
        if any(window is not None and window < count for window in own.config.windows):
            return f"this model has layers that see fewer than {count} tokens, not all in flight"
        return None

    def _head_without_branches(self) -> str | None:
        """Why this head has no branches; None if it can have them."""
        from spdbench_backends.spd.head import HeadWeights

        if isinstance(self._head, HeadWeights) and self._head.use_deepest:
            return None
        return "this head reads rows as if all stages were level; branches need one that was trained with use_deepest"

    def _require_branches(self, why_not: str | None) -> None:
        """Raises `InputError` where branches are asked for and cannot be."""
        options = self._options
        if options.executor == "streams":
            raise self._option_error("executor", "runs one row a stage, no branches. Allowed: process, inline")
        if why_not is None:
            return
        if self._top_k > 1:
            raise self._option_error("draft_top_k", f"{why_not}; use {self._context.label}.draft_top_k=1")
        raise self._option_error("redraft", f"{why_not}; use {self._context.label}.redraft=false")

    def describe(self) -> BackendInfo:
        info = super().describe()
        if not self._has_branches:
            return info
        chosen = {**info.chosen, "max_rows": str(self._max_rows)}
        if self._options.draft_top_k == "auto":
            chosen["draft_top_k"] = f"{self._top_k}" if self._top_k == 1 else f"{self._top_k}, 1 when sampling"
        return replace(info, chosen=chosen)

    def _anchors(self) -> Collection[int]:
        return () if self._head is None else self._head.plan.anchors

    def _fits(self, stages: tuple[range, ...]) -> bool:
        """A head fits stages that give the same row types."""
        from spdbench_backends.spd.head import HeadWeights

        if not isinstance(self._head, HeadWeights):
            return self._head is None or stages == self._stages
        return self._head.plan.fits(stages)

    def _use_cut(self, stages: tuple[range, ...]) -> None:
        from spdbench_backends.spd.head import HeadWeights

        if isinstance(self._head, HeadWeights):
            self._head = replace(self._head, plan=replace(self._head.plan, stages=stages))
        super()._use_cut(stages)

    def _time_draft(self, threads: int) -> float:
        from spdbench_backends.spd.head import drafting_seconds

        return drafting_seconds(self._loaded(self._head), threads, self._decoder)

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench_backends.spd.drafter import CapturedHeadDrafter, HeadDrafter, SyntheticPipelineDrafter
        from spdbench_backends.spd.head import HeadWeights

        if isinstance(self._head, HeadWeights) and self._module is not None:
            from spdbench.pipeline.streams import StreamsPipeline

            assert isinstance(self._pipeline, StreamsPipeline)
            return CapturedHeadDrafter(self._head, self._module, self._pipeline.drafted)
        options = self._options
        top_k = 1 if options.draft_top_k == "auto" and not request.sampling.greedy else self._top_k
        if isinstance(self._head, HeadWeights) and (top_k > 1 or options.redraft):
            from spdbench_backends.spd.branches import BranchingDrafter

            return BranchingDrafter(self._head, top_k, self._max_rows, redraft=options.redraft)
        if self._head is not None:
            return HeadDrafter(self._head)
        return SyntheticPipelineDrafter(self._drafts(request), top_k=top_k, max_rows=self._max_rows)

    def _co_drafter(self, capacity: int) -> CoDrafter | None:
        """None for heads that read rows as if all stages were level, or normed states: these draft outside of the
        captured cycle."""
        from spdbench_backends.spd.head import CapturedDraftModule, HeadWeights

        head = self._head
        if isinstance(head, HeadWeights) and head.use_deepest and head.last_anchor != "normed":
            self._module = CapturedDraftModule(head, capacity)
        return self._module
