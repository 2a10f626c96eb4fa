"""The metrics that are sums of a run table's columns, or ratios of such sums: metrics.md, "Steps" and "Bubble ratio".

A ratio's overall value (micro), its mean over runs (macro) and its 95 % interval all come from its row here; what
computes them is `metrics.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.stats import divide
from spdbench.judge.results.schema import BackendRecord
from spdbench.judge.results.table import COLUMN, PARTS
from spdbench.types import MeasurementKind

Steps = Literal["autoregressive", "draft_verify", "reported", "pipeline"]
"""What a backend's steps are: single tokens, verify steps, a server's chunks (only its own counts cover drafts), or
cycles."""
ALL: tuple[Steps, ...] = ("autoregressive", "draft_verify", "reported", "pipeline")
Scale = Callable[[BackendRecord, float | None], float | None]
"""Backend and read bandwidth in bytes/s -> a factor; None where the metric is not defined."""


def by_layers(backend: BackendRecord, _read_bandwidth: float | None = None) -> float | None:
    """What a cycle costs in vanilla's time, by layers: SPD, arXiv 2605.30852."""
    layers = backend.stage_layers
    return sum(layers) / max(layers) if any(layers) else None


def by_bytes(backend: BackendRecord, _read_bandwidth: float | None = None) -> float | None:
    """What a cycle costs in vanilla's time, by the bytes that each lane reads."""
    return sum(backend.lane_bytes) / max(backend.lane_bytes) if any(backend.lane_bytes) else None


def _by_devices(backend: BackendRecord, _read_bandwidth: float | None) -> float | None:
    return backend.num_devices


def requests_at_once(backend: BackendRecord, _read_bandwidth: float | None = None) -> int:
    """How many requests were under way at once; only servers are measured with more than one."""
    at_once = backend.options.get("concurrency")
    return at_once if isinstance(at_once, int) and at_once > 0 else 1  # a package may have an option of that name


def _share_of_bandwidth(backend: BackendRecord, read_bandwidth: float | None) -> float | None:
    return sum(backend.lane_bytes) / read_bandwidth if read_bandwidth and any(backend.lane_bytes) else None


@dataclass(frozen=True)
class Ratio:
    """`plus` + `factor` x sum(`numerator`) / sum(`denominator`), for backends whose steps are of `steps`.

    Null where the column `positive` sums to 0, where the backend does not know `needs`, and without a denominator.
    """

    name: str
    numerator: str
    denominator: str
    steps: tuple[Steps, ...] = ALL
    plus: float = 0.0
    scale: Scale | None = None
    factor: float = 1.0
    positive: str | None = None
    needs: MeasurementKind | None = None

    @property
    def columns(self) -> set[str]:
        return {self.numerator, self.denominator, *([self.positive] if self.positive else ())}

    def of(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric for each row of `sums` [..., columns]; NaN where it is null."""
        quotient = divide(sums[..., COLUMN[self.numerator]], sums[..., COLUMN[self.denominator]])
        values = self.plus + self.factor * quotient
        if self.positive is not None:
            values = np.where(sums[..., COLUMN[self.positive]] > 0, values, np.nan)
        return values


VERIFY: tuple[Steps, ...] = ("draft_verify",)
REPORTED: tuple[Steps, ...] = ("reported",)
PIPELINE: tuple[Steps, ...] = ("pipeline",)
VANILLA: tuple[Steps, ...] = ("autoregressive",)
RATIOS = (
    Ratio("ttft_s", "ttft_s", "runs"),
    Ratio("decode_s", "decode_s", "runs"),
    Ratio("total_s", "total_s", "runs"),
    Ratio("decode_tokens_per_s", "decode_tokens", "decode_s"),
    Ratio("tokens_per_s", "new_tokens", "total_s", positive="decode_tokens"),
    # Every user of a closed loop always waits for an answer, so that what all get is as many times what one gets.
    Ratio("throughput_tokens_per_s", "new_tokens", "total_s", positive="decode_tokens", scale=requests_at_once),
    Ratio("tpot_s", "decode_s", "decode_tokens"),
    Ratio("acceptance_rate", "accepted", "judged", VERIFY + PIPELINE),
    Ratio("acceptance_rate", "reported_accepted", "reported_judged", REPORTED),
    # Vanilla accepts nothing, so these two are 1 by definition, even for one token.
    Ratio("acceptance_length", "accepted", "runs", VANILLA, plus=1.0),
    Ratio("acceptance_length", "accepted", "steps", VERIFY, plus=1.0),
    Ratio("acceptance_length", "reported_accepted", "reported_rounds", REPORTED, plus=1.0),
    Ratio("tokens_per_cycle", "decode_tokens", "steps", PIPELINE),
    Ratio("equivalent_acceptance_length", "decode_tokens", "steps", PIPELINE, scale=by_layers),
    Ratio("ideal_speedup", "accepted", "runs", VANILLA, plus=1.0),
    Ratio("ideal_speedup", "accepted", "steps", VERIFY, plus=1.0),
    Ratio("ideal_speedup", "reported_accepted", "reported_rounds", REPORTED, plus=1.0),
    Ratio("ideal_speedup", "decode_tokens", "steps", PIPELINE, scale=by_bytes),
    Ratio("token_efficiency", "decode_tokens", "forwards", needs="forwards"),
    Ratio("device_s_per_token", "decode_s", "decode_tokens", scale=_by_devices, needs="devices"),
    Ratio("energy_j_per_token", "energy_j", "metered_tokens"),
    Ratio("roofline_share", "decode_tokens", "decode_s", VANILLA, scale=_share_of_bandwidth),
    Ratio("score", "score", "scored"),
    # Of spans: each run weighs by its decode time, and one without spans has only zeros.
    Ratio("bubble_ratio", "bubble_s", "measured_s"),
    *(Ratio(name, name, "measured_s") for name in PARTS),
    Ratio("cycle_efficiency", "stage_s", "wall_s"),
    Ratio("control_s_per_cycle", "control_s", "cycles"),
    Ratio("draft_slack_s", "slack_s", "full_drafts"),
)
RATIO_NAMES = tuple(dict.fromkeys(ratio.name for ratio in RATIOS))
CAUSES = PARTS[2:]
"""Why lanes are idle."""


@dataclass(frozen=True)
class Count:
    """The sum of a column; null unless the backend's steps are of `steps` and it knows `needs`."""

    name: str
    column: str
    steps: tuple[Steps, ...] = ALL
    needs: MeasurementKind | None = None


COUNTS = (
    Count("num_runs", "runs"),
    Count("num_prompt_tokens", "prompt_tokens"),
    Count("num_new_tokens", "new_tokens"),
    Count("num_steps", "steps", needs="drafts"),
    Count("num_cycles", "steps", PIPELINE),
    Count("num_judged", "judged", needs="drafts"),
    Count("num_accepted", "accepted", needs="drafts"),
    Count("num_scored", "scored"),
)


def steps_of(backend: BackendRecord) -> Steps:
    return "reported" if backend.kind == "draft_verify" and "drafts" in backend.unknown else backend.kind


def shares_devices(backend: BackendRecord) -> bool:
    """True for a pipeline with several lanes on a device."""
    return backend.kind == "pipeline" and backend.num_devices < backend.lanes


def ratios_for(backend: BackendRecord, read_bandwidth: float | None) -> dict[str, Ratio]:
    """The ratios that are defined for this backend, by name; `read_bandwidth` is in bytes/s."""
    found = {}
    for ratio in RATIOS:
        if steps_of(backend) in ratio.steps and ratio.needs not in backend.unknown:
            factor = 1.0 if ratio.scale is None else ratio.scale(backend, read_bandwidth)
            if factor is not None:
                found[ratio.name] = replace(ratio, factor=factor)
    return found
