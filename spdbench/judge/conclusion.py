"""The answer of a comparison, label by label: does it pay, by how much, how sure is it, and what casts doubt on it.

Data only; `render/notes.py` puts it into a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spdbench.errors import InputError
from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.definitions import shares_devices
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.metrics.stats import Interval, prompts_to_show
from spdbench.judge.projection.project import OwnDevices, with_own_devices
from spdbench.judge.projection.recorded import has_steps

SpeedupOutcome = Literal["baseline", "pays", "slower", "no difference shown", "no interval", "no pair", "no baseline"]
"""`pays` and `slower`: the interval of the speed-up lies above 1, or below. `no interval`: a speed-up over one prompt.
`no pair`: no run pairs with one of the baseline's. `no baseline`: the table has none."""
EFFECT = 0.05
"""The speed-up that `num_prompts_to_show` is about."""
OF_BASELINE = frozenset({"busy_machine", "outliers", "slow_baseline"})
"""Warnings of the baseline that make every speed-up over it provisional. `drift` is none: labels of a run take turns,
so that they drift together, and their ratio stays."""
DOUBTS = OF_BASELINE | {"few_prompts", "degenerate", "no_template", "apart", "noisy"}
"""Warnings that make a speed-up provisional: few prompts, answers that are not typical, a doubtful timing."""


@dataclass(frozen=True)
class Conclusion:
    """What a comparison says of one label over all its prompts.

    `speedup` is relative to the table's baseline, with its 95 % `interval`, on the same `num_prompts` conversations.
    `num_prompts_to_show` is the number that would show a speed-up of `EFFECT`, where no difference is shown.
    `speedup_per_device` is None with one device. `devices_of_all` is in the baseline's conclusion: how many devices
    every label used, the same number; None where they differ, are unknown, or there is no other label.
    `disqualified_by` and `doubts` are names of flags: the former, of the row, take it out of any ranking; the latter,
    of the row or of the baseline, make its verdict provisional.
    """

    label: str
    outcome: SpeedupOutcome
    tokens_per_s: float | None
    speedup: float | None
    interval: Interval | None
    num_prompts: int
    num_prompts_to_show: int | None
    num_devices: int
    speedup_per_device: float | None
    devices_of_all: int | None
    own_devices: OwnDevices | None
    disqualified_by: tuple[str, ...]
    doubts: tuple[str, ...]


def conclusions(table: Table) -> tuple[Conclusion, ...]:
    """One conclusion for each label of `table`, in its order."""
    rows = [row for row in table.rows if row.category is None]
    baseline = next((row for row in rows if row.is_baseline), None)
    used = {None if row.result.known_devices is None else row.head.backend.num_devices for row in rows}
    of_all = used.pop() if len(used) == 1 and len(rows) > 1 else None
    rounds = [row.result for row in rows if row.head.backend.kind == "draft_verify" and _fits(row)]
    return tuple(_conclude(row, baseline, of_all, rounds) for row in rows)


def _conclude(row: Row, baseline: Row | None, devices_of_all: int | None, rounds: Sequence[LoadedResult]) -> Conclusion:
    metrics, names = row.metrics, dict.fromkeys(flag.name for flag in row.flags)
    of_baseline = [flag.name for flag in baseline.flags if flag.name in OF_BASELINE] if baseline is not None else []
    outcome, interval, num_prompts = (
        outcome_of(row, has_baseline=baseline is not None),
        metrics["speedup_ci"],
        metrics["num_paired_prompts"] or 0,
    )
    to_show = None
    if outcome == "no difference shown" and metrics["speedup_spread"] is not None:
        to_show = prompts_to_show(EFFECT, metrics["speedup_spread"])
    devices = row.head.backend.num_devices
    return Conclusion(
        label=row.label,
        outcome=outcome,
        tokens_per_s=metrics["decode_tokens_per_s"],
        speedup=metrics["speedup"],
        interval=None if interval is None else (interval[0], interval[1]),
        num_prompts=num_prompts,
        num_prompts_to_show=to_show,
        num_devices=devices,
        speedup_per_device=metrics["speedup_per_device"] if devices > 1 else None,
        devices_of_all=devices_of_all if row.is_baseline else None,
        own_devices=None if baseline is None or metrics["speedup"] is None else _own_devices(row, baseline, rounds),
        disqualified_by=tuple(name for name in names if name in DISQUALIFYING),
        doubts=tuple(name for name in dict.fromkeys([*names, *of_baseline]) if name in DOUBTS),
    )


def outcome_of(row: Row, *, has_baseline: bool = True) -> SpeedupOutcome:
    """What a row's speed-up says; `has_baseline` is false where its table has none."""
    if row.is_baseline or not has_baseline:
        return "baseline" if row.is_baseline else "no baseline"
    if row.metrics["speedup"] is None:
        return "no pair"
    if row.difference_shown is None:
        return "no interval"
    if not row.difference_shown:
        return "no difference shown"
    return "pays" if row.metrics["speedup"] > 1 else "slower"


def _own_devices(row: Row, baseline: Row, rounds: Sequence[LoadedResult]) -> OwnDevices | None:
    """None unless the row is a pipeline whose stages shared devices, the baseline plain decoding by the same engine on
    the same machine, and both recorded what a projection needs."""
    if not shares_devices(row.head.backend) or not _fits(row) or baseline.head.backend.name != "vanilla":
        return None
    assert row.pairing is not None  # `_fits`
    try:
        return with_own_devices(baseline.result, row.result, rounds, {*row.pairing.keys})
    except InputError:
        return None


def _fits(row: Row) -> bool:
    """True if a row's steps and times can stand next to the baseline's in a projection."""
    return row.pairing is not None and row.pairing.same_machine and bool(row.pairing.keys) and has_steps(row.result)
