"""Which features of which positions the draft module reads: anchors, row types, and the rows of a cycle.

Numbers only, no tensors. Depth d of a token is the number of stages it has finished. Anchors are hidden-state indices
b_0 = 0 < b_1 < ...; a row of type i reads anchors b_0 to b_i. Source: SPD.md, sections 1 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FeaturePlan:
    """The anchors of a head and the stages it drafts for."""

    anchors: tuple[int, ...]
    stages: tuple[range, ...]

    def __post_init__(self) -> None:
        num_layers, most = self.stages[-1].stop, len(self.stages) + 1
        if not self.anchors or self.anchors[0] != 0 or list(self.anchors) != sorted(set(self.anchors)):
            raise ValueError(f"anchors {list(self.anchors)} must begin with 0 and increase")
        if self.anchors[-1] > num_layers:
            raise ValueError(f"anchor {self.anchors[-1]} lies beyond the model's {num_layers} layers")
        if len(self.anchors) > most:
            raise ValueError(f"{len(self.anchors)} anchors are too many for {len(self.stages)} stages: at most {most}")

    @property
    def full_depth(self) -> int:
        return len(self.stages)

    def row_type(self, depth: int) -> int:
        """f(d): the last anchor that a token of this depth has reached."""
        layers_done = self.stages[depth - 1].stop if depth else 0
        return max(index for index, anchor in enumerate(self.anchors) if anchor <= layers_done)

    @property
    def row_types(self) -> tuple[int, ...]:
        """f(d) for every depth. A head fits every cut that gives the same."""
        return tuple(self.row_type(depth) for depth in range(self.full_depth + 1))


def default_anchors(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The published rule for even stages, thinned from the deep end where it yields more than n + 1 anchors."""
    per_stage = num_layers // num_stages
    chosen = sorted({min(num_layers, x) for x in (0, per_stage, 3 * per_stage, 6 * per_stage, num_layers - 1)})
    while len(chosen) > num_stages + 1:
        del chosen[-2]
    return tuple(chosen)


@dataclass(frozen=True)
class Row:
    """One row of the draft module: a position read at a depth."""

    position: int
    depth: int


class DeepestRows:
    """Each row is read at the depth that its token has reached, and a completed row is computed once.

    The result equals that of rewriting the newest n + 1 rows every cycle, with fewer rows: those in flight and those
    that completed since the last cycle (SPD.md, section 4, "Distributed rows differ").
    """

    def __init__(self, plan: FeaturePlan) -> None:
        self._plan = plan
        self._done = 0

    def start(self, prompt_length: int) -> list[Row]:
        self._done = prompt_length
        return [Row(position, self._plan.full_depth) for position in range(prompt_length)]

    def next(self, in_flight: Sequence[int], newest: int) -> list[Row]:
        """Rows of this cycle, ascending; `in_flight[s]` is the position in stage s, which has finished s stages.

        The last row is the newest position's, of depth 0.
        """
        depth = {position: stage for stage, position in enumerate(in_flight) if position >= 0}
        rows = [Row(p, depth.get(p, self._plan.full_depth)) for p in range(self._done, newest + 1)]
        self._done = min(depth)
        return rows

    def rollback(self, length: int) -> None:
        self._done = min(self._done, length)


class NominalRows:
    """Row p is read at depth N - p, N being the newest position, whatever deeper features exist.

    For heads trained without `use_deepest`: the newest n rows, and the one that just completed.
    """

    def __init__(self, plan: FeaturePlan) -> None:
        self._plan = plan
        self._evicted = False

    def start(self, prompt_length: int) -> list[Row]:
        self._evicted = False
        depth = self._plan.full_depth
        return [Row(position, depth) for position in range(max(0, prompt_length - depth + 1))]

    def next(self, in_flight: Sequence[int], newest: int) -> list[Row]:
        """Rows of this cycle, ascending. A full pipeline means that the next row down completes next cycle."""
        depth = self._plan.full_depth
        first = newest - depth if self._evicted else newest - depth + 1
        self._evicted = in_flight[-1] >= 0
        return [Row(position, newest - position) for position in range(max(0, first), newest + 1)]

    def rollback(self, length: int) -> None:  # noqa: ARG002 - one protocol with DeepestRows
        self._evicted = False
