"""Flags: what a reader must know before believing a number, each with one line of why and one of what to do.

Pure functions from counts and records. Must not know how results are measured, paired or shown. METRICS.md, "Flags", is
the list; those that need two results are made in `compare.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.results.schema import BackendRecord, Divergence, DrafterRecord, Flag

DISQUALIFYING = frozenset(
    {
        "lossy",
        "diverged",
        "synthetic_drafter",
        "untrained_drafter",
        "hardware_mismatch",
        "prompt_mismatch",
        "template_mismatch",
        "unattributed",
        "other_model",
    }
)
"""A row with one of these is never shown as best."""

MADE_FROM_ONE_RESULT = frozenset(
    {
        "lossy",
        "diverged",
        "synthetic_drafter",
        "untrained_drafter",
        "degenerate",
        "truncated",
        "few_prompts",
        "noisy",
        "slow_baseline",
        "unattributed",
        "drift",
        "outliers",
        "other_model",
    }
)
"""What `flags_for` can tell, and so tells anew whenever a file is read."""

MAX_CYCLE = 8
TAIL_TOKENS = 64
FEW_PROMPTS = 8
NOISY_SHARE = 0.10
SLOW_ROOFLINE_SHARE = 0.4
SLOW_KERNELS = frozenset({"transformers"})
UNATTRIBUTED_SHARE = 0.10
DRIFT_SHARE = 0.05
DRIFT_P_VALUE = 0.01
MAX_NAMED = 3


def is_degenerate(output_ids: Sequence[int] | NDArray[np.int64]) -> bool:
    """True if over half of the last 64 ids lie in one stretch that repeats a cycle of at most 8 ids.

    A cycle counts once it has come round twice. Outputs shorter than two cycles of 8 are too short to tell.
    """
    tail = np.asarray(output_ids[-TAIL_TOKENS:])
    if len(tail) < 2 * MAX_CYCLE:
        return False
    for period in range(1, MAX_CYCLE + 1):
        repeated = _longest_stretch(tail[period:] == tail[:-period])
        if repeated >= period and 2 * (repeated + period) > len(tail):
            return True
    return False


def degenerate(outputs: Sequence[bytes]) -> NDArray[np.bool_]:
    """`is_degenerate` of each of `outputs` [R], which are ids in decimal digits joined by commas."""
    tails = [text.rsplit(b",", TAIL_TOKENS)[-TAIL_TOKENS:] if text else [] for text in outputs]
    lengths = np.array([len(tail) for tail in tails], dtype=np.int64)
    numbers = b",".join(b",".join(tail) for tail in tails if tail)
    real = np.arange(TAIL_TOKENS) >= TAIL_TOKENS - lengths[:, None]  # shorter ones stand at the right
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.fromstring(numbers, dtype=np.int64, sep=",") if numbers else ()
    suspect = np.zeros(len(outputs), dtype=np.bool_)
    for period in range(1, MAX_CYCLE + 1):
        repeated = ((ids[:, period:] == ids[:, :-period]) & real[:, :-period]).sum(axis=1)
        suspect |= 2 * (repeated + period) > lengths
    for row in np.flatnonzero(suspect):  # enough ids come again; whether in one stretch is left to see
        suspect[row] = is_degenerate(ids[row, real[row]])
    return suspect


def _longest_stretch(holds: NDArray[np.bool_]) -> int:
    """Length of the longest unbroken stretch of True."""
    breaks = np.flatnonzero(~np.concatenate(([False], holds, [False])))
    return int(np.diff(breaks).max()) - 1


def interval_is_noisy(value: float | None, interval: Sequence[float] | None) -> bool:
    """True if a 95 % `interval` is wider than +-10 % of its `value`."""
    return bool(value and interval and (interval[1] - interval[0]) / 2 > NOISY_SHARE * value)


def disqualifies(flags: Sequence[Flag]) -> bool:
    return any(flag.name in DISQUALIFYING for flag in flags)


def flags_for(
    overall: Mapping[str, Any], backend: BackendRecord, drafter: DrafterRecord | None, divergence: Divergence | None
) -> list[Flag]:
    """The flags that one result shows by itself; `overall` is `Summary.overall`."""
    return [
        *_output_flags(backend, divergence),
        *_drafter_flags(drafter),
        *_sample_flags(overall),
        *_speed_flags(overall, backend),
        *_lane_flags(overall),
        *_steadiness_flags(overall),
    ]


def _output_flags(backend: BackendRecord, divergence: Divergence | None) -> Iterator[Flag]:
    if backend.other_model is not None:
        yield Flag(
            name="other_model",
            reason=f"it runs {backend.other_model}, whose weights, precision and place need not be vanilla's",
            remedy="Read its speed as what one would use instead: a speed-up may be that of its weights or its machine",
        )
    if backend.lossy:
        yield Flag(
            name="lossy",
            reason="its outputs are not the target model's own, by design",
            remedy="Choose a lossless acceptance rule, or judge the answers by their score",
        )
    elif divergence is not None and (divergence.real or divergence.unclassified):
        yield diverged(
            divergence.real + divergence.unclassified,
            divergence.identical + divergence.ties + divergence.near_ties + divergence.real + divergence.unclassified,
            classified=not divergence.unclassified,
        )


def diverged(num_different: int, num_compared: int, *, classified: bool) -> Flag:
    """The flag for outputs that are not vanilla's; `classified` if each first difference was traced to the logits."""
    why = "by more than a tie in the logits explains" if classified else "and not every difference is shown to be a tie"
    return Flag(
        name="diverged",
        reason=f"{num_different} of {num_compared} outputs differ from vanilla's, {why}",
        remedy="Run in float32 on the CPU, where no difference has an excuse",
    )


def is_untrained(drafter: DrafterRecord) -> bool:
    """True for a head with random weights."""
    return drafter.id == "random" or (drafter.trained_tokens == 0 and not drafter.synthetic)


def _drafter_flags(drafter: DrafterRecord | None) -> Iterator[Flag]:
    if drafter is None:
        return
    if drafter.synthetic:
        yield Flag(
            name="synthetic_drafter",
            reason=f"the drafts come from {drafter.id}, which is told the answers: its acceptance was set, not earned",
            remedy="Read it as a what-if; use a trained drafter to learn what the method does",
        )
    if is_untrained(drafter):
        yield Flag(
            name="untrained_drafter",
            reason="the drafter has random weights, so next to nothing is accepted",
            remedy="Name a trained one with --drafter",
        )


def _sample_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    num_runs, num_prompts = overall["num_runs"], overall["num_prompts"]
    if overall["num_degenerate"]:
        rest = overall.get("acceptance_rate_without_degenerate")
        without = "" if rest is None else f" (without them {rest:.1%} of the drafts are accepted)"
        yield Flag(
            name="degenerate",
            reason=f"{overall['num_degenerate']} of {num_runs} outputs end in a loop, which is easy to draft{without}",
            remedy="Use a model that suits the prompts; NAME_without_degenerate in CSV and JSON leaves them out",
        )
    if 2 * overall["num_truncated"] > num_runs:
        yield Flag(
            name="truncated",
            reason=f"{overall['num_truncated']} of {num_runs} outputs were cut by the token limit",
            remedy="Raise --max-new-tokens if answers of full length matter",
        )
    if num_prompts < FEW_PROMPTS:
        yield Flag(
            name="few_prompts",
            reason=f"only {num_prompts} prompt{'' if num_prompts == 1 else 's'} with an answer",
            remedy=f"Measure at least {FEW_PROMPTS} (--limit)",
        )


def _speed_flags(overall: Mapping[str, Any], backend: BackendRecord) -> Iterator[Flag]:
    if interval_is_noisy(overall["decode_tokens_per_s"], overall["decode_tokens_per_s_ci"]):
        yield noisy("tokens/s", overall["decode_tokens_per_s"], overall["decode_tokens_per_s_ci"])
    share = overall["roofline_share"]
    if share is None and backend.kind == "autoregressive" and backend.kernels in SLOW_KERNELS:
        yield Flag(
            name="slow_baseline",
            reason="vanilla runs on transformers' layers, as spdbench's own do not know this model, and what the "
            "machine allows was not measured",
            remedy="Read its speed-ups as those over a slow baseline, or use a model that our layers know",
        )
    if share is not None and share < SLOW_ROOFLINE_SHARE:
        yield Flag(
            name="slow_baseline",
            reason=f"vanilla reaches {share:.0%} of what memory bandwidth allows, which flatters every speed-up",
            remedy="Give it more --threads, another --dtype, or an idle machine",
        )


def _lane_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    share = overall["unattributed"]
    if share is not None and share > UNATTRIBUTED_SHARE:
        yield Flag(
            name="unattributed",
            reason=f"{share:.0%} of the lanes' decode time is idle for reasons that its spans do not tell",
            remedy="Leave the machine idle; where it persists, the backend lacks spans",
        )


def _steadiness_flags(overall: Mapping[str, Any]) -> Iterator[Flag]:
    drift = overall["drift"]
    if drift is not None and abs(drift) > DRIFT_SHARE and overall["drift_p_value"] < DRIFT_P_VALUE:
        yield Flag(
            name="drift",
            reason=f"the time a step {'rose' if drift > 0 else 'fell'} by {abs(drift):.0%} from the first request to "
            "the last, which is neither chance nor the prompts' length",
            remedy="Trust speed-ups within one run, whose backends took turns, and not tokens/s across runs; let the "
            "machine warm up or cool down, leave it idle, and measure again",
        )
    if outliers := overall["outliers"]:
        names = list(dict.fromkeys(outliers))
        named = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else "")
        yield Flag(
            name="outliers",
            reason=f"{len(outliers)} of {overall['num_runs']} requests took far more or far less time a step than the "
            f"others ({named})",
            remedy="Leave the machine idle and measure again; --repeats shows whether it is the prompt",
        )


def noisy(name: str, value: float, interval: Sequence[float]) -> Flag:
    half_width = (interval[1] - interval[0]) / 2 / value
    return Flag(
        name="noisy",
        reason=f"the 95 % interval of {name} is +-{half_width:.0%}",
        remedy="Add prompts (--limit) or --repeats, and leave the machine idle",
    )
