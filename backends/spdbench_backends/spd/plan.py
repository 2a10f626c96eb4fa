"""Which features of which positions the draft module reads: anchors, row types, and the rows of a cycle.

Numbers only, no tensors. Depth d of a token is the number of stages it has finished. Anchors are hidden-state indices
b_0 = 0 < b_1 < ...; a row of type i reads anchors b_0 to b_i. Source: as in `head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FeaturePlan:
    """The anchors of a head and the stages it drafts for. A head for `any_stages` has row types by layers passed,
    whatever the cut, so that a pipeline of few stages may never reach some of them."""

    anchors: tuple[int, ...]
    stages: tuple[range, ...]
    any_stages: bool = False

    def __post_init__(self) -> None:
        num_layers, most = self.stages[-1].stop, len(self.stages) + 1
        if not self.anchors or self.anchors[0] != 0 or list(self.anchors) != sorted(set(self.anchors)):
            raise ValueError(f"anchors {list(self.anchors)} must begin with 0 and increase")
        if self.anchors[-1] > num_layers:
            raise ValueError(f"anchor {self.anchors[-1]} lies beyond the model's {num_layers} layers")
        if len(self.anchors) > most and not self.any_stages:
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
        """f(d) for every depth."""
        return tuple(self.row_type(depth) for depth in range(self.full_depth + 1))

    def fits(self, stages: tuple[range, ...]) -> bool:
        """True if the head can draft for another cut: one that gives the same row types, or any."""
        return self.any_stages or replace(self, stages=stages).row_types == self.row_types


@dataclass(frozen=True)
class GroupPlan:
    """What version 10 reads in place of anchors: `groups[d - 1]` are the hidden states of a row of depth d, for d from
    1 to n; a row of depth 0 reads hidden state 0."""

    groups: tuple[tuple[int, ...], ...]
    stages: tuple[range, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.stages):
            raise ValueError(f"{len(self.groups)} groups do not fit {len(self.stages)} stages")
        for depth, (group, layers) in enumerate(zip(self.groups, self.stages, strict=True), 1):
            if not group or min(group) < 0 or max(group) > layers.stop:
                raise ValueError(
                    f"group {list(group)} of tokens that have passed {depth} stages must hold hidden states from 0 to "
                    f"{layers.stop}"
                )

    @property
    def anchors(self) -> tuple[int, ...]:
        """All hidden states that are read."""
        return tuple(sorted({0, *(index for group in self.groups for index in group)}))

    @property
    def full_depth(self) -> int:
        return len(self.stages)


def default_groups(num_layers: int, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """The published groups for even stages: the ends of one or two stages, then thirds of what a token has passed."""
    per_stage, most = num_layers // num_stages, max(num_layers - 2, 0)
    groups = []
    for depth in range(1, num_stages + 1):
        third = depth * per_stage // 3
        chosen = (0, third, 2 * third, depth * per_stage) if depth > 2 else range(0, depth * per_stage + 1, per_stage)
        groups.append(tuple(min(index, most) for index in chosen))
    return tuple(groups)


def default_anchors(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The published rule for even stages, thinned from the deep end where it yields more than n + 1 anchors."""
    per_stage = num_layers // num_stages
    chosen = sorted({min(num_layers, x) for x in (0, per_stage, 3 * per_stage, 6 * per_stage, num_layers - 1)})
    while len(chosen) > num_stages + 1:
        del chosen[-2]
    return tuple(chosen)


@dataclass(frozen=True)
class Row:
    """One row of the draft module: a position read at a depth. `slot` is where its features are kept, by default that
    of its position, of which a chain has one token."""

    position: int
    depth: int
    slot: int | None = None

    @property
    def key(self) -> int:
        return self.position if self.slot is None else self.slot


class DeepestRows:
    """Each row is read at the depth that its token has reached, and a completed row is computed once.

    The result equals that of rewriting the newest n + 1 rows every cycle, with fewer rows: those in flight and those
    that completed since the last cycle.
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

    def __init__(self, plan: FeaturePlan | GroupPlan) -> None:
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
