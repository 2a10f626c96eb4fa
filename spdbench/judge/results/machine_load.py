"""What else the machine did while a request was timed: the record, and when it counts as a disturbance.

docs/metrics.md, "Flags": `busy_machine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

BUSY_SHARE = 0.05
"""Of the time; what is below does not change a speed-up by more than the default gate allows."""
MIN_LOST_S = 0.04
"""Processor time below which a request's share is chance: the system counts idle time in ticks of 10 ms."""
SLOW_CLOCK = 0.8
"""Of the highest clock rate of a run; below it a processor counts as slowed."""
MAX_NAMES = 3

Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=64)]
Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]


class MachineLoad(BaseModel):
    """From just before a request to just after it: shares of `wall_s` times `cores`, or of `wall_s`.

    Null is what the system does not show.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    wall_s: Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)]
    cores: Annotated[int, Field(ge=1, le=2**20)] = Field(description="processors that spdbench may use")
    others: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] | None = Field(
        None,
        description="processor time of other processes and of the kernel; it may be a little below 0, since idle time "
        "moves in ticks of 10 ms",
    )
    steal: Part | None = Field(None, description="processor time that the hypervisor gave to others")
    throttled: Part | None = Field(None, description="processor time withheld as the control group's quota was used up")
    hot: Part | None = Field(None, description="time in which a processor was slowed for its temperature")
    memory: Part | None = Field(None, description="time in which something on the machine waited for memory (PSI)")
    gpu: Part | None = Field(None, description="other processes' use of the busiest GPU of the backend")
    major_faults: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        None, description="pages that spdbench had to read from the disk: swapping, or a model's file"
    )
    clock_mhz: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = Field(
        None, description="the highest clock rate of the first processors"
    )
    who: Annotated[list[Name], Field(max_length=MAX_NAMES)] = Field(
        default_factory=list, description="the other processes that took most processor time; only where disturbed"
    )

    @property
    def taken(self) -> float:
        """The share of the time that the request could not use."""
        return sum(self.parts.values())

    @property
    def parts(self) -> Mapping[str, float]:
        """The shares by their names; 0 for what is not shown."""
        return {name: getattr(self, name) or 0.0 for name in PARTS}

    @property
    def disturbed(self) -> bool:
        return is_busy(self.taken, self.wall_s * self.cores)


PARTS = {
    "others": "other processes",
    "steal": "the hypervisor (steal)",
    "throttled": "the quota of the container (throttling)",
    "hot": "throttling for temperature",
    "memory": "waiting for memory",
    "gpu": "other programs on the GPU",
}
"""What can take time from a request, and the words for it."""


def is_busy(share: float, core_s: float) -> bool:
    """True where `share` of `core_s` seconds of processor time is too much to ignore, and no chance of the counters."""
    return share > BUSY_SHARE and share * core_s > MIN_LOST_S


class SetAside(BaseModel):
    """A measurement of a request that the machine disturbed, in place of which another one counts (`--remeasure`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: Seconds | None
    decode_s: Seconds | None
    machine: MachineLoad
