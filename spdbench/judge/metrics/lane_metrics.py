"""The metrics that come from spans, as ratios of columns: METRICS.md, "Bubble ratio".

Kept apart from the columns of `ratios.py`, since most results have no spans and pay nothing for these. Each run weighs
by its decode time; one without spans has only zeros. Must not know how runs are collected, compared or shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.ratios import Ratio
from spdbench.judge.metrics.stats import divide
from spdbench.judge.results.schema import BubbleParts, Run

PARTS = tuple(BubbleParts.model_fields)
"""`useful` and `wasted`, then the causes of idle time in the order in which they are charged."""
CAUSES = PARTS[2:]

LANE_COLUMNS = ("measured_s", "bubble_s", *PARTS, "cycles", "stage_s", "control_s", "wall_s")
"""One run's numbers: decode time with spans, then what of it each part is; full cycles, their slowest stages' time, the
rest of them, and all of them."""
LANE_COLUMN = {name: index for index, name in enumerate(LANE_COLUMNS)}
NOT_MEASURED = (0.0,) * len(LANE_COLUMNS)


@dataclass(frozen=True)
class LaneRatio(Ratio):
    """A metric as the ratio of two lane columns; null without spans."""

    def of(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return divide(sums[..., LANE_COLUMN[self.numerator]], sums[..., LANE_COLUMN[self.denominator]])


LANE_RATIOS = {
    "bubble_ratio": LaneRatio("bubble_s", "measured_s"),
    **{name: LaneRatio(name, "measured_s") for name in PARTS},
    "cycle_efficiency": LaneRatio("stage_s", "wall_s"),
    "control_s_per_cycle": LaneRatio("control_s", "cycles"),
}


def lane_columns(run: Run) -> tuple[float, ...]:
    """One run's numbers, in the order of `LANE_COLUMNS`."""
    if run.bubble is None or not run.decode_s:
        return NOT_MEASURED
    shares = [run.decode_s * share for _, share in run.bubble]
    bubble_s = run.decode_s * (1 - (run.bubble.useful + run.bubble.wasted))
    cycles = run.full_cycles
    full = (cycles.num, cycles.stage_s, cycles.wall_s - cycles.stage_s, cycles.wall_s) if cycles else (0.0,) * 4
    return (run.decode_s, bubble_s, *shares, *full)
