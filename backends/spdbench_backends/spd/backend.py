"""`spd`: speculative pipeline decoding, n stages at work on n tokens of one sequence.

    prefill, then cycle by cycle:
        draft a successor for the newest token, from the features that exist before the step
        every stage moves its token one stage on
        the token that leaves the last stage judges its successor
            right: it counts, the new draft enters stage 0
            wrong: all in flight is dropped, the target's own token enters stage 0, and n - 1 cycles give no verdict

Source: arXiv 2605.30852; SPD.md section 4, without the faults of its section 11.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from spdbench.backend import BackendContext, BackendOptions, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import GenerationRequest
from spdbench_backends.spd.pipelined import Pipelined, PipelineOptions

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.formats import HeadFile
    from spdbench_backends.spd.head import HeadWeights


class SPD(Pipelined):
    """Speculative pipeline decoding: n stages work on n tokens of one sequence."""

    class Options(PipelineOptions):
        """Those of every pipeline."""

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        self._head: HeadWeights | None = None

    def close(self) -> None:
        super().close()
        self._head = None

    def _load_drafter(self, choice: DrafterChoice) -> None:
        file = self._find_head(choice)
        self._stages = self._cut(file.config.num_stages if file else None)
        if file is None:
            self._info = DrafterInfo(choice.text, method=choice.kind, synthetic=True)
            return
        from spdbench_backends.spd.formats import build_head

        self._head = build_head(file, self._context.target.own_decoder, self._stages)
        untrained = choice.kind == "random"
        trained = 0 if untrained else file.config.trained_tokens
        self._info = DrafterInfo(
            "random" if untrained else file.path.name, "spd", False, sha256=file.sha256 or None, trained_tokens=trained
        )

    def _anchors(self) -> Collection[int]:
        return () if self._head is None else self._head.plan.anchors

    def _find_head(self, choice: DrafterChoice) -> HeadFile | None:
        """The head that was asked for, still without a place in this model; None for a synthetic drafter."""
        from spdbench.models.drafters import find_drafter
        from spdbench_backends.spd.formats import random_head, read_head

        if choice.kind in ("oracle", "forced"):
            return None
        if unknown := self._context.target.unknown:
            raise InputError(
                f"--drafter {choice.text}: SPD heads are made of spdbench's own layers, which do not know this model "
                f"({unknown}). Give oracle:P or forced:P."
            )
        if choice.kind == "path":
            return read_head(choice.path)
        if choice.kind == "random":
            return random_head(self._context.target.own_decoder, self._cut(None), self._context.seed)
        return read_head(find_drafter(self._context.target.files, "spd", self._wanted_stages()))

    def _wanted_stages(self) -> int | None:
        counts = self._options.stage_layers
        return len(counts) if isinstance(counts, tuple) else self._options.stages

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench.decoding.synthetic import synthetic_drafts
        from spdbench_backends.spd.drafter import HeadDrafter, SyntheticDrafter

        if self._choice is None:
            raise RuntimeError("spd is not loaded")
        decoder = self._context.target.decoder
        if self._head is not None:
            return HeadDrafter(self._head, decoder.config.vocab_size)
        return SyntheticDrafter(synthetic_drafts(self._choice, self._context.seed, decoder, request))
