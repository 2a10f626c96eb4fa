"""Backends that are worse than `spd` on purpose, for `benchmarks.gate` to be caught; no part of spdbench.

`gate.py` announces them to spdbench as a stranger's package would, by entry points in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from spdbench.backend import BackendOptions
from spdbench.types import GenerationRequest, Step
from spdbench_backends.spd.backend import SPD
from spdbench_backends.spd.pipelined import PipelineOptions

if TYPE_CHECKING:
    from spdbench.decoding.sampling import Logits
    from spdbench.decoding.verify import Draft, Verdict
    from spdbench_backends.spd.drafter import PipelineDrafter

ENTRY_POINTS = """[spdbench.backends]
slower_spd = benchmarks.gate_backends:SlowerSPD
rejecting_spd = benchmarks.gate_backends:RejectingSPD
"""


class SlowerOptions(PipelineOptions):
    slower_by: float = Field(0.1, ge=0, description="share of each step's time that is added to it")


class SlowerSPD(SPD):
    """spd with steps that take longer, by work that comes to nothing."""

    Options: ClassVar[type[BackendOptions]] = SlowerOptions

    def _decode(self, request: GenerationRequest, drafter: PipelineDrafter) -> Iterator[Step]:
        return slowed(super()._decode(request, drafter), cast(SlowerOptions, self._options).slower_by)


def slowed(steps: Iterator[Step], share: float) -> Iterator[Step]:
    """The same steps, each after a busy wait of so much of the time it took."""
    with closing(steps):  # type: ignore[type-var]
        began = perf_counter_ns()
        for step in steps:
            now = perf_counter_ns()
            until = now + share * (now - began)
            while perf_counter_ns() < until:
                pass
            yield step
            began = perf_counter_ns()


class RejectingOptions(PipelineOptions):
    every: int = Field(50, ge=1, description="accepted drafts of which one is rejected")
    first: int = Field(50, ge=1, description="the first accepted draft that is rejected")


class RejectingSPD(SPD):
    """spd that takes an accepted draft in so many for a rejected one: the same ids, in more cycles."""

    Options: ClassVar[type[BackendOptions]] = RejectingOptions
    _accepted = 0

    def _decode(self, request: GenerationRequest, drafter: PipelineDrafter) -> Iterator[Step]:
        steps = super()._decode(request, drafter)
        decoding = self._decoding
        assert decoding is not None
        decoding._judge = self._rejecting(decoding._judge)  # type: ignore[method-assign, assignment]
        return steps

    def _rejecting(
        self, judge: Callable[[Logits, Draft | None, int], Verdict]
    ) -> Callable[[Logits, Draft | None, int], Verdict]:
        options = cast(RejectingOptions, self._options)

        def judge_falsely(logits: Logits, draft: Draft | None, position: int) -> Verdict:
            verdict = judge(logits, draft, position)
            if verdict.accepted:
                self._accepted += 1
                late = self._accepted - options.first
                if late >= 0 and late % options.every == 0:
                    return replace(verdict, accepted=False)
            return verdict

        return judge_falsely
