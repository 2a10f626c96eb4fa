"""Splits a model's layers into pipeline stages: evenly, by given counts, or by cost; and estimates what a cycle takes,
by where the drafter and the output head run. Uses numbers only, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from spdbench.errors import InputError

DraftingPlace = Literal["own", "first_stage"]
HeadPlace = Literal["last_stage", "drafter", "split"]
DRAFTERS_SHARE: dict[HeadPlace, float] = {"last_stage": 0.0, "drafter": 1.0, "split": 0.5}
"""Of the head's work."""
ALIKE = 1.02
"""Estimates that differ by less are no reason to prefer the layout that needs more devices or messages."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a pipeline run that are no layers: the drafter, by itself or in the first stage's process; and
    the output head, with the last stage, with the drafter, or half of the vocabulary with each."""

    drafting: DraftingPlace = "own"
    head: HeadPlace = "last_stage"

    @property
    def words(self) -> str:
        where = {"own": "drafter by itself", "first_stage": "drafter with the first stage"}[self.drafting]
        head = {"last_stage": "with the last stage", "drafter": "with the drafter", "split": "half with each"}[
            self.head
        ]
        return f"{where}, head {head}"


@dataclass(frozen=True)
class PieceTimes:
    """Seconds of each layer, of the head and of a draft. `drafts_last`: drafts are made after the stages have moved,
    not in parallel. `has_lane`: the drafter has a device or processors of its own."""

    layers_s: Sequence[float]
    head_s: float
    draft_s: float
    drafts_last: bool
    has_lane: bool

    def extras_s(self, layout: Layout, num_stages: int) -> list[float]:
        """What each stage does in a cycle in addition to its layers. A drafter without a lane of its own takes its time
        from the first stage."""
        found = [0.0] * num_stages
        found[-1] += self.head_s * (1 - DRAFTERS_SHARE[layout.head])
        if layout.drafting == "first_stage" or not self.has_lane:
            found[0] += self._drafters_s(layout)
        return found

    def cycle_s(self, layout: Layout, stages: Sequence[range]) -> float:
        """What a cycle with all stages at work takes at least."""
        layers_s = [sum(self.layers_s[layer] for layer in stage) for stage in stages]
        drafter_s, last_share = self._drafters_s(layout), 1 - DRAFTERS_SHARE[layout.head]
        layers_s[-1] += self.head_s * last_share
        if self.drafts_last:
            return max(layers_s) + drafter_s
        if layout.drafting == "first_stage":
            return max(layers_s[0] + drafter_s, *layers_s[1:], 0.0)
        even_s = 0.0 if self.has_lane else (sum(layers_s) + drafter_s) / len(stages)  # the system moves processes
        return max(*layers_s, drafter_s, even_s)

    def _drafters_s(self, layout: Layout) -> float:
        return self.draft_s + self.head_s * DRAFTERS_SHARE[layout.head]


def best_layout(cycles_s: dict[Layout, float]) -> Layout:
    """The first layout, of those by their estimates, that is about as fast as the fastest."""
    fastest_s = min(cycles_s.values())
    return next(layout for layout, cycle_s in cycles_s.items() if cycle_s <= ALIKE * fastest_s)


def split_evenly(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """`num_stages` contiguous ranges of equal length.

    Raises:
        InputError: the layers cannot be split evenly; names the numbers of stages that are possible.
    """
    if not 1 <= num_stages <= num_layers or num_layers % num_stages:
        even = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise InputError(
            f"stages={num_stages}: {num_layers} layers cannot be split into {num_stages} equal stages. "
            f"Allowed: {', '.join(even)}; or give stage_layers, e.g. {_uneven_example(num_layers)}."
        )
    return split_by_counts(num_layers, [num_layers // num_stages] * num_stages)


def split_by_counts(num_layers: int, counts: Sequence[int]) -> tuple[range, ...]:
    """Contiguous ranges with the given numbers of layers.

    Raises:
        InputError: a stage would be empty, or the counts do not add up to `num_layers`.
    """
    written = ",".join(map(str, counts))
    if not counts or min(counts) < 1:
        raise InputError(f"stage_layers={written}: every stage needs at least one layer.")
    if sum(counts) != num_layers:
        raise InputError(f"stage_layers={written}: adds up to {sum(counts)} layers, but the model has {num_layers}.")
    stages, start = [], 0
    for count in counts:
        stages.append(range(start, start + count))
        start += count
    return tuple(stages)


def split_by_cost(layer_costs: Sequence[float], extras: Sequence[float]) -> tuple[range, ...]:
    """Contiguous ranges whose most expensive one is as cheap as possible; of equally good ones the more even.
    `extras[s]` is the cost of what stage s does in addition to its layers, such as the head in the last.

    Raises:
        InputError: there are fewer layers than stages.
    """
    num_layers, num_stages = len(layer_costs), len(extras)
    if not 1 <= num_stages <= num_layers:
        raise InputError(f"stages={num_stages}: the model has {num_layers} layers. Allowed: 1 to {num_layers}.")
    sums = list(accumulate(layer_costs, initial=0.0))
    # By number of layers that the stages so far have: the heaviest stage, the squares of all, and minus their layers,
    # so that the earlier of two alike stages gets more.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for extra in extras:
        longer: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (heaviest, squares, counts) in best.items():
            for stop in range(start + 1, num_layers + 1):
                cost = sums[stop] - sums[start] + extra
                found = (max(heaviest, cost), squares + cost * cost, (*counts, start - stop))
                longer[stop] = min(found, longer.get(stop, found))
        best = longer
    return split_by_counts(num_layers, [-count for count in best[num_layers][2]])


def _uneven_example(num_layers: int) -> str:
    half = (num_layers + 1) // 2
    return f"{half},{num_layers - half}" if num_layers > 1 else "1"


def usual_stages(num_layers: int) -> int:
    """Three stages if they divide the layers, else the fewest that do."""
    if num_layers % 3 == 0:
        return 3
    return next((n for n in range(2, num_layers + 1) if num_layers % n == 0), 1)
