"""Details of a run: its first divergence; on request its spans (`run --trace`) and drafts (`run --keep-drafts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spdbench.types import Drafted, FirstDivergence, Span, SpanKind

MAX_NUMBER = 2**62
Moment = Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Index = Annotated[int, Field(ge=-1, le=2**31 - 1)]


class SpanColumns(BaseModel):
    """`Span`s as columns of equal length, in the order in which the backend reported them. Empty: it records none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lane: list[Number]
    kind: list[SpanKind]
    start_ns: list[Moment] = Field(description="since the request's start, as `end_ns`")
    end_ns: list[Moment]
    position: list[Index]
    kept: list[bool]
    cycle: list[Index]

    @classmethod
    def of(cls, spans: Sequence[Span], request_start_ns: int) -> SpanColumns:
        lane, kind, start, end, position, kept, cycle = map(list, zip(*spans, strict=True)) if spans else ([],) * 7
        return cls.model_construct(
            lane=lane,
            kind=kind,
            start_ns=[at - request_start_ns for at in start],
            end_ns=[at - request_start_ns for at in end],
            position=position,
            kept=kept,
            cycle=cycle,
        )

    def spans(self) -> list[Span]:
        """As the backend reported them, on a clock that counts from the request's start."""
        return [Span(*row) for row in zip(*(getattr(self, name) for name in Span._fields), strict=True)]

    @model_validator(mode="after")
    def _columns_fit_together(self) -> Self:
        lengths = {name: len(column) for name, column in self}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different length: {lengths}")
        for at, (start, end) in enumerate(zip(self.start_ns, self.end_ns, strict=True)):
            if end < start:
                raise ValueError(f"end_ns.{at}: {end} comes before the start, {start}")
        return self


class DraftColumns(BaseModel):
    """The `Drafted` tokens of each step, prefill's first; empty lists for a step without drafts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: list[list[Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]]]
    parents: list[list[Index]] = Field(description="of each id: the index of the one before it; -1: the newest token")

    @classmethod
    def of(cls, steps: Sequence[Drafted | None]) -> DraftColumns:
        found = [step or NOTHING for step in steps]
        return cls.model_construct(
            ids=[list(step.token_ids) for step in found], parents=[list(step.parents) for step in found]
        )

    @model_validator(mode="after")
    def _make_trees(self) -> Self:
        if len(self.ids) != len(self.parents):
            raise ValueError(f"ids of {len(self.ids)} steps, and parents of {len(self.parents)}")
        for step, (ids, parents) in enumerate(zip(self.ids, self.parents, strict=True)):
            if len(ids) != len(parents):
                raise ValueError(f"step {step}: {len(ids)} ids, and {len(parents)} parents")
            if not all(parent < index for index, parent in enumerate(parents)):
                raise ValueError(f"step {step}: a draft comes before its parent")
        return self


NOTHING = Drafted((), ())


class RunDivergence(BaseModel):
    """The first token in which a run differs from vanilla's, and why. Kept without being asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_id: str
    turn: Number
    repeat: Number
    divergence: FirstDivergence
