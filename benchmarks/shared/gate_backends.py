"""Backends that are worse than `spd` on purpose, for `benchmarks.gate`; not part of spdbench.

`gate.py` registers them as a third-party package would, by entry points in a separate folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from pydantic import Field

from spdbench.backend import BackendOptions
from spdbench.types import GenerationRequest, Step
from spdbench_backends.spd.backend import SPD, SPDOptions

if TYPE_CHECKING:
    from torch import Tensor

    from spdbench.decoding.sampling import Logits
    from spdbench.decoding.verify import Draft, DraftVerdict
    from spdbench.models.target import Target
    from spdbench_backends.spd.drafter import PipelineDrafter

T = TypeVar("T")
ENTRY_POINTS = """[spdbench.backends]
slower_spd = benchmarks.shared.gate_backends:SlowerSPD
rejecting_spd = benchmarks.shared.gate_backends:RejectingSPD
"""


class SlowerOptions(SPDOptions):
    slower_by: float = Field(0.1, ge=0, description="share of each stage's time that is added to it")


class SlowerSPD(SPD):
    """spd whose stages wait busily. The delay is in the stages, not between the steps, where it would overlap with the
    stages' work on the next step."""

    Options: ClassVar[type[BackendOptions]] = SlowerOptions

    def load(self) -> None:
        share = cast(SlowerOptions, self._options).slower_by
        target = cast("Target", SlowTarget(self._context.target, share))
        self._context = replace(self._context, model=target)
        super().load()


class _Slow:
    """Delegates everything to `inner` that a subclass does not replace."""

    def __init__(self, inner: Any, share: float) -> None:
        self._inner, self._share = inner, share

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle looks these up before `_inner` exists
            raise AttributeError(name)
        return getattr(self._inner, name)


class SlowTarget(_Slow):
    """A target whose stages are slow, in this process and in others; its `own_decoder`, for drafting, is not."""

    @cached_property
    def decoder(self) -> SlowDecoder:
        return SlowDecoder(self._inner.decoder, self._share)

    @property
    def source(self) -> SlowSource:
        return SlowSource(self._inner.source, self._share)


class SlowSource(_Slow):
    def load(self, layers: range, device: str, head_ids: range | None = None) -> SlowDecoder:
        return SlowDecoder(self._inner.load(layers, device, head_ids), self._share)

    def __reduce__(self) -> tuple[type[SlowSource], tuple[Any, float]]:
        return SlowSource, (self._inner, self._share)


class SlowDecoder(_Slow):
    def forward(self, *rows: Any, **more: Any) -> Any:
        return slowed(lambda: self._inner.forward(*rows, **more), self._share)

    def logits(self, hidden_SM: Tensor) -> Any:
        return slowed(lambda: self._inner.logits(hidden_SM), self._share)


def slowed(work: Callable[[], T], share: float) -> T:
    """The result of `work`, after a busy wait for `share` of the time that it took."""
    began = perf_counter_ns()
    found = work()
    now = perf_counter_ns()
    while perf_counter_ns() < now + share * (now - began):
        pass
    return found


class RejectingOptions(SPDOptions):
    every: int = Field(50, ge=1, description="accepted drafts of which one is rejected")
    first: int = Field(50, ge=1, description="the first accepted draft that is rejected")


class RejectingSPD(SPD):
    """spd that treats one in `every` accepted drafts as rejected: the same ids, in more cycles."""

    Options: ClassVar[type[BackendOptions]] = RejectingOptions
    _accepted = 0

    def _decode(self, request: GenerationRequest, drafter: PipelineDrafter) -> Iterator[Step]:
        steps = super()._decode(request, drafter)
        decoding = self._decoding
        assert decoding is not None
        decoding._verify = self._rejecting(decoding._verify)  # type: ignore[method-assign, assignment]
        return steps

    def _rejecting(
        self, verify: Callable[[Logits, Sequence[Draft]], DraftVerdict]
    ) -> Callable[[Logits, Sequence[Draft]], DraftVerdict]:
        options = cast(RejectingOptions, self._options)

        def reject_some(logits: Logits, drafts: Sequence[Draft]) -> DraftVerdict:
            verdict = verify(logits, drafts)
            if verdict.accepted:
                self._accepted += 1
                late = self._accepted - options.first
                if late >= 0 and late % options.every == 0:
                    return replace(verdict, accepted=False)
            return verdict

        return reject_some
