"""What lanes did with a request's decode time, as a result file has it: shares of time, and a pipeline's cycles."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spdbench.judge.results.machine_load import Seconds

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
SHARE_TOLERANCE = 1e-6
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Difference = Annotated[float, Field(ge=-1e10, le=1e10, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BubbleParts(_Record):
    """Shares of lanes x decode time; see docs/metrics.md: useful + wasted + the rest = 1."""

    useful: Share
    wasted: Share
    fill: Share
    verify: Share
    draft: Share
    imbalance: Share
    host: Share
    unattributed: Share

    @model_validator(mode="after")
    def _parts_make_a_whole(self) -> Self:
        total = sum(value for _, value in self)
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"the shares add up to {total:.6g}, not to 1")
        return self


class FullCycles(_Record):
    """A pipeline's cycles with every stage at work: their number, their slowest stages' time, and their duration."""

    num: Annotated[int, Field(ge=1, le=2**31 - 1)]
    stage_s: Seconds
    wall_s: Seconds


class CyclesByFill(_Record):
    """A pipeline's cycles by how many stages were at work: entry k of each column is for cycles with k stages, from 0
    to n."""

    num: list[Number]
    wall_s: list[Seconds] = Field(description="their duration")
    stage_s: list[Seconds] = Field(description="time of the slowest lane of each, at work on the target")
    drafts: list[Number] = Field(description="how many of them made a draft")
    slack_s: list[Difference] = Field(
        description="in these, by how much the slowest lane took longer than the drafter's lane: the draft, and what "
        "else of the target that lane computes; below 0 where drafting took longer"
    )

    @model_validator(mode="after")
    def _columns_fit_together(self) -> Self:
        lengths = {name: len(column) for name, column in self}
        if len(set(lengths.values())) > 1 or not self.num:
            raise ValueError(f"columns of different length, or empty: {lengths}")
        if any(drafts > num for drafts, num in zip(self.drafts, self.num, strict=True)):
            raise ValueError("more drafts than cycles")
        return self


class PartTime(_Record):
    """How often a part of the work was done in the decode window, and its seconds in all."""

    num: Number
    s: Seconds


class PartTimes(_Record):
    """A request's spans by the part of the work that they are; null for a part of which there are none.

    `layer` counts single layers of the target, over kept tokens of a pipeline or over rounds; it includes the output
    head where there are no `head` spans.
    """

    layer: PartTime | None = None
    head: PartTime | None = None
    draft: PartTime | None = None
    verify: PartTime | None = None
