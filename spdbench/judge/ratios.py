"""What one run contributes to every metric, as columns of sums, and the metrics as ratios of those columns.

This is METRICS.md's table in code. With each metric a ratio of two sums, its micro value, its mean over runs and its
bootstrap interval come from the same few numbers. Must not know how runs are collected, compared or shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.result import BackendRecord, Run, Steps
from spdbench.judge.stats import divide
from spdbench.types import BackendKind

NS_PER_S = 1e9
ITL_PERCENTS = (50, 95, 99)

COLUMNS = (
    "runs",
    "prompt_tokens",
    "new_tokens",
    "decode_tokens",
    "ttft_s",
    "decode_s",
    "total_s",
    "steps",
    "judged",
    "accepted",
    "forwards",
    "score",
    "scored",
    "decoded",
    "itl_p50_s",
    "itl_p95_s",
    "itl_p99_s",
)
"""One run's numbers. `steps` to `forwards` are sums over decode steps, so without prefill; `scored` and `decoded` are 1
for a run with a score, with decode tokens; the last three are this run's own percentiles."""
COLUMN = {name: index for index, name in enumerate(COLUMNS)}

RATIO_NAMES = (
    "ttft_s",
    "decode_s",
    "total_s",
    "decode_tokens_per_s",
    "tokens_per_s",
    "tpot_s",
    "acceptance_rate",
    "acceptance_length",
    "tokens_per_cycle",
    "equivalent_acceptance_length",
    "ideal_speedup",
    "token_efficiency",
    "device_s_per_token",
    "roofline_share",
    "score",
)
"""Every metric that is a ratio for some kind of backend; METRICS.md, "Steps"."""


@dataclass(frozen=True)
class Ratio:
    """A metric: plus + scale x sum(numerator) / sum(denominator), null where the column `needs` is 0."""

    numerator: str
    denominator: str
    scale: float = 1.0
    plus: float = 0.0
    needs: str | None = None

    def of(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric for each row of `sums` [..., columns]; NaN where it is null."""
        values = self.plus + self.scale * divide(sums[..., COLUMN[self.numerator]], sums[..., COLUMN[self.denominator]])
        if self.needs is not None:
            values = np.where(sums[..., COLUMN[self.needs]] > 0, values, np.nan)
        return values


def ratios(backend: BackendRecord, read_bandwidth: float | None) -> dict[str, Ratio]:
    """The ratio metrics that are defined for this backend; `read_bandwidth` is in bytes/s. See METRICS.md, "Steps"."""
    return {
        "ttft_s": Ratio("ttft_s", "runs"),
        "decode_s": Ratio("decode_s", "runs"),
        "total_s": Ratio("total_s", "runs"),
        "decode_tokens_per_s": Ratio("decode_tokens", "decode_s"),
        "tokens_per_s": Ratio("new_tokens", "total_s", needs="decode_tokens"),
        "tpot_s": Ratio("decode_s", "decode_tokens"),
        "token_efficiency": Ratio("decode_tokens", "forwards"),
        "device_s_per_token": Ratio("decode_s", "decode_tokens", scale=backend.num_devices),
        "score": Ratio("score", "scored"),
        **_RATIOS_OF_KIND[backend.kind](backend, read_bandwidth),
    }


def _autoregressive(backend: BackendRecord, read_bandwidth: float | None) -> dict[str, Ratio]:
    """Vanilla accepts nothing, so its acceptance length and ideal speed-up are 1 by definition, even for one token."""
    one = Ratio("accepted", "runs", plus=1.0)
    found = {"acceptance_length": one, "ideal_speedup": one}
    if read_bandwidth:
        bytes_per_token = sum(backend.lane_bytes)
        found["roofline_share"] = Ratio("decode_tokens", "decode_s", scale=bytes_per_token / read_bandwidth)
    return found


def _draft_verify(_backend: BackendRecord, _read_bandwidth: float | None) -> dict[str, Ratio]:
    tau = Ratio("accepted", "steps", plus=1.0)
    return {"acceptance_rate": Ratio("accepted", "judged"), "acceptance_length": tau, "ideal_speedup": tau}


def _pipeline(backend: BackendRecord, _read_bandwidth: float | None) -> dict[str, Ratio]:
    """Tokens per cycle, and what a cycle costs in vanilla's time: by layers (SPD, arXiv 2605.30852) and by bytes."""
    found = {
        "acceptance_rate": Ratio("accepted", "judged"),
        "tokens_per_cycle": Ratio("decode_tokens", "steps"),
    }
    if any(backend.stage_layers):
        stages = sum(backend.stage_layers) / max(backend.stage_layers)
        found["equivalent_acceptance_length"] = Ratio("decode_tokens", "steps", scale=stages)
    if any(backend.lane_bytes):
        stages = sum(backend.lane_bytes) / max(backend.lane_bytes)
        found["ideal_speedup"] = Ratio("decode_tokens", "steps", scale=stages)
    return found


_RATIOS_OF_KIND = {"autoregressive": _autoregressive, "draft_verify": _draft_verify, "pipeline": _pipeline}


def is_failed(run: Run) -> bool:
    """True for a run that gives no numbers: it ended in an error, or has no first token."""
    return run.finish_reason == "error" or run.num_new_tokens < 1 or run.ttft_s is None


def run_columns(run: Run, seconds: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, ...]:
    """One run's numbers, in the order of `COLUMNS`; `seconds` and `tokens` are its `token_intervals`."""
    steps, ttft_s, decode_s = run.steps, run.ttft_s or 0.0, run.decode_s or 0.0
    return (
        1,
        run.num_prompt_tokens,
        run.num_new_tokens,
        run.num_new_tokens - 1,
        ttft_s,
        decode_s,
        ttft_s + decode_s,
        len(steps.t_ns[1:]),
        sum(steps.judged[1:]),
        sum(steps.accepted[1:]),
        sum(steps.forwards[1:]),
        run.score or 0.0,
        run.score is not None,
        len(tokens) > 0,
        *(weighted_percentiles(seconds, tokens, ITL_PERCENTS) or (0.0, 0.0, 0.0)),
    )


def token_intervals(steps: Steps) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Time between tokens, in seconds, and how many tokens it holds for; one entry a chunk after the first token.

    A chunk of k ids that comes dt after the chunk before it counts k times dt / k. Steps that commit nothing (a pipe
    that fills) belong to the chunk that follows them.
    """
    emitted = np.asarray(steps.emitted, dtype=np.int64)
    chunks = np.flatnonzero(emitted)
    seconds = np.diff(np.asarray(steps.t_ns, dtype=np.int64)[chunks]) / NS_PER_S
    tokens = emitted[chunks[1:]]
    return seconds / tokens, tokens


def weighted_percentiles(
    values: NDArray[np.floating], weights: NDArray[np.integer], percents: Sequence[int]
) -> tuple[float, ...] | None:
    """Percentiles of `values` [K] as if each stood `weights` [K] times: the smallest that covers the share asked for.

    None for no values. The same as numpy's `inverted_cdf` on the repeated values, without repeating them.
    """
    if not len(values):
        return None
    order = np.argsort(values)
    covered = weights[order].astype(np.int64)
    np.cumsum(covered, out=covered)  # in place: with millions of chunks, copies are what costs memory
    ranks = [-(-percent * int(covered[-1]) // 100) for percent in percents]
    return tuple(float(value) for value in values[order[np.searchsorted(covered, ranks)]])


def verdicts(steps: Steps, kind: BackendKind) -> Iterator[tuple[int, int, int]]:
    """(position k, drafts judged there, drafts accepted there) of a run, k from 1; a position may come up again.

    A draft's position is its depth; in a pipeline, the number of verdicts since the last flush.
    """
    if kind == "pipeline":
        yield from _verdicts_since_flush(steps)
    elif kind == "draft_verify":
        judged, accepted = (_reaching(column[1:]) for column in (steps.judged, steps.accepted))
        accepted += [0] * (len(judged) - len(accepted))
        for position, counts in enumerate(zip(judged, accepted, strict=True), start=1):
            yield position, *counts


def _verdicts_since_flush(steps: Steps) -> Iterator[tuple[int, int, int]]:
    position = 0
    for judged, accepted in zip(steps.judged[1:], steps.accepted[1:], strict=True):
        if judged:
            position += 1
            yield position, 1, accepted
            if not accepted:
                position = 0


def _reaching(depths: Sequence[int]) -> list[int]:
    """How many of `depths` are at least 1, at least 2, ..., up to the deepest."""
    counts = np.bincount(np.asarray(depths, dtype=np.int64), minlength=1)
    return [int(count) for count in np.cumsum(counts[::-1])[::-1][1:]]
