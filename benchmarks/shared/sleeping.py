"""SPD whose stages and drafter mostly sleep, for `benchmarks.validation`: processes that need no core of their own.

A stage of a real model computes, and more stages than cores wait for one another. Here each layer and each draft sleeps
several times as long as it computes, so that any number of stages run as if each had a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from spdbench.backend import BackendContext, parse_options
from spdbench.models.interface import CancelledForwardError
from spdbench.types import GenerationRequest
from spdbench_backends.spd.backend import SPD

if TYPE_CHECKING:
    from spdbench.models.target import Target
    from spdbench_backends.spd.drafter import PipelineDrafter


class _Around:
    """Delegates everything to `inner` that a subclass does not replace."""

    def __init__(self, inner: Any, layer_s: float) -> None:
        self._inner, self._layer_s = inner, layer_s

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle looks these up before `_inner` exists
            raise AttributeError(name)
        return getattr(self._inner, name)


class SleepingTarget(_Around):
    """A target whose layers sleep in the stages' processes; in this one they do not."""

    @property
    def source(self) -> SleepingSource:
        return SleepingSource(self._inner.source, self._layer_s)


class SleepingSource(_Around):
    def load(self, *what: Any) -> SleepingDecoder:
        return SleepingDecoder(self._inner.load(*what), self._layer_s)

    def __reduce__(self) -> tuple[type[SleepingSource], tuple[Any, float]]:
        return SleepingSource, (self._inner, self._layer_s)


class SleepingDecoder(_Around):
    def forward(self, *rows: Any, cancelled: Callable[[], bool] | None = None, **more: Any) -> Any:
        for _ in self._inner.layers:
            if cancelled is not None and cancelled():
                raise CancelledForwardError
            time.sleep(self._layer_s)
        return self._inner.forward(*rows, cancelled=cancelled, **more)


class SleepingSPD(SPD):
    """`draft_s` is the sleep of a draft."""

    draft_s = 0.0

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        return cast("PipelineDrafter", SleepingDrafter(super()._new_drafter(request), self.draft_s))


class SleepingDrafter(_Around):
    def successors(self, *cycle: Any) -> Any:
        if found := self._inner.successors(*cycle):
            time.sleep(self._layer_s)
        return found

    @property
    def reads_this_cycle(self) -> bool:
        return bool(self._inner.reads_this_cycle)


def sleeping_pipeline(target: Target, stages: int, drafter: str, layer_s: float, draft_s: float) -> SleepingSPD:
    """The backend, loaded: `stages` processes."""
    options = parse_options("spd", SPD.Options, {"stages": str(stages), "executor": "process"})
    context = BackendContext("spd", target, drafter, ("cpu",), 1, 0)
    backend = SleepingSPD(options, replace(context, model=cast("Target", SleepingTarget(target, layer_s))))
    backend.draft_s = draft_s
    backend.load()
    return backend
