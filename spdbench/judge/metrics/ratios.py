"""What one run contributes to every metric, as columns of sums, and the metrics as ratios of those columns.

This is METRICS.md's table in code. With each metric a ratio of two sums, its micro value, its mean over runs and its
bootstrap interval come from the same few numbers. Must not know how runs are collected, compared or shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.stats import divide
from spdbench.judge.results.batch import Batch
from spdbench.judge.results.schema import BackendRecord, Run, RunKey, Steps
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
    "energy_j",
    "metered_tokens",
    "told_rounds",
    "told_judged",
    "told_accepted",
)
"""One run's numbers. `steps` to `forwards` are sums over decode steps, so without prefill; `scored` is 1 or 0;
`metered_tokens` are the new tokens of runs whose energy was measured; `told_rounds` and the next two are what an engine
counted itself, NaN for what it does not tell."""
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
    "energy_j_per_token",
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

    @property
    def columns(self) -> set[str]:
        """The columns that it is made of."""
        return {self.numerator, self.denominator, *([self.needs] if self.needs else ())}

    def of(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric for each row of `sums` [..., columns]; NaN where it is null."""
        values = self.plus + self.scale * divide(sums[..., COLUMN[self.numerator]], sums[..., COLUMN[self.denominator]])
        if self.needs is not None:
            values = np.where(sums[..., COLUMN[self.needs]] > 0, values, np.nan)
        return values


def ratios(backend: BackendRecord, read_bandwidth: float | None) -> dict[str, Ratio]:
    """The ratio metrics that are defined for this backend; `read_bandwidth` is in bytes/s. See METRICS.md, "Steps"."""
    found = {
        "ttft_s": Ratio("ttft_s", "runs"),
        "decode_s": Ratio("decode_s", "runs"),
        "total_s": Ratio("total_s", "runs"),
        "decode_tokens_per_s": Ratio("decode_tokens", "decode_s"),
        "tokens_per_s": Ratio("new_tokens", "total_s", needs="decode_tokens"),
        "tpot_s": Ratio("decode_s", "decode_tokens"),
        "token_efficiency": Ratio("decode_tokens", "forwards"),
        "device_s_per_token": Ratio("decode_s", "decode_tokens", scale=backend.num_devices),
        "energy_j_per_token": Ratio("energy_j", "metered_tokens"),
        "score": Ratio("score", "scored"),
        **_RATIOS_OF_KIND[backend.kind](backend, read_bandwidth),
    }
    nulls = {name for unknown in backend.unknown for name in NULL_WITHOUT.get(unknown, ())}
    return {name: ratio for name, ratio in found.items() if name not in nulls}


def _autoregressive(backend: BackendRecord, read_bandwidth: float | None) -> dict[str, Ratio]:
    """Vanilla accepts nothing, so its acceptance length and ideal speed-up are 1 by definition, even for one token."""
    one = Ratio("accepted", "runs", plus=1.0)
    found = {"acceptance_length": one, "ideal_speedup": one}
    if read_bandwidth:
        bytes_per_token = sum(backend.lane_bytes)
        found["roofline_share"] = Ratio("decode_tokens", "decode_s", scale=bytes_per_token / read_bandwidth)
    return found


NULL_WITHOUT = {"forwards": ("token_efficiency",), "devices": ("device_s_per_token",)}
"""Ratios that are null where the backend does not know what they are made of."""


def _draft_verify(backend: BackendRecord, _read_bandwidth: float | None) -> dict[str, Ratio]:
    if "drafts" in backend.unknown:  # then only what the engine counted itself can tell
        tau = Ratio("told_accepted", "told_rounds", plus=1.0)
        return {
            "acceptance_rate": Ratio("told_accepted", "told_judged"),
            "acceptance_length": tau,
            "ideal_speedup": tau,
        }
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


class Timed(Protocol):
    """A run, as far as its speed goes."""

    @property
    def decode_tokens(self) -> int: ...

    @property
    def decode_s(self) -> float: ...


def speeds(runs: Mapping[RunKey, Timed], keys: Sequence[RunKey]) -> NDArray[np.float64]:
    """Decode tokens and seconds of each of the runs `keys`: [keys, 2]."""
    found = [(runs[key].decode_tokens, runs[key].decode_s) for key in keys]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def is_failed(run: Run) -> bool:
    """True for a run that gives no numbers: it ended in an error, or has no first token."""
    return run.finish_reason == "error" or run.num_new_tokens < 1 or run.ttft_s is None


def run_columns(batch: Batch) -> NDArray[np.float64]:
    """Each run's numbers, in the order of `COLUMNS`: [R, columns]."""
    table = np.array([_plain_columns(run) for run in batch.runs], dtype=np.float64).reshape(-1, len(COLUMNS))
    table[:, COLUMN["steps"]] = np.maximum(batch.num_steps - 1, 0)
    for name in ("judged", "accepted", "forwards"):
        column = np.where(batch.decodes, getattr(batch, name), 0)
        if len(batch.prefills):
            table[batch.num_steps > 0, COLUMN[name]] = np.add.reduceat(column, batch.prefills)
    return table


def _plain_columns(run: Run) -> tuple[float, ...]:
    """One run's numbers but for those that its steps add up to."""
    ttft_s, decode_s, tokens = run.ttft_s or 0.0, run.decode_s or 0.0, run.num_new_tokens
    times = (ttft_s, decode_s, ttft_s + decode_s)
    scored = (run.score or 0.0, run.score is not None)
    metered = (run.energy_j or 0.0, tokens if run.energy_j else 0)
    return (1, run.num_prompt_tokens, tokens, tokens - 1, *times, 0, 0, 0, 0, *scored, *metered, *told_columns(run))


def told_columns(run: Run) -> tuple[float, float, float]:
    """Rounds, and drafts judged and accepted, that the engine counted itself: `told_rounds` and the next two columns.
    All 0 where it counted nothing."""
    if run.drafts is None:
        return 0.0, 0.0, 0.0
    judged = run.drafts.judged
    return float(run.drafts.rounds), math.nan if judged is None else float(judged), float(run.drafts.accepted)


def token_intervals(steps: Steps) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Time between tokens, in seconds, and how many tokens it holds for; one entry a chunk after the first token.

    A chunk of k ids that comes dt after the chunk before it counts k times dt / k. Steps that commit nothing (a pipe
    that fills) belong to the chunk that follows them.
    """
    emitted, t_ns = np.asarray(steps.emitted, dtype=np.int64), np.asarray(steps.t_ns, dtype=np.int64)
    return _intervals(t_ns, emitted, np.zeros(len(emitted), dtype=np.int64))[:2]


def batch_intervals(batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """The runs' `token_intervals` end to end, and the run [K] that each of the K entries belongs to."""
    return _intervals(batch.t_ns, batch.emitted, batch.run_of_step)


def _intervals(
    t_ns: NDArray[np.int64], emitted: NDArray[np.int64], run_of_step: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    chunks = np.flatnonzero(emitted)
    run_of_chunk = run_of_step[chunks]
    later = run_of_chunk[1:] == run_of_chunk[:-1]
    tokens = emitted[chunks[1:]][later]
    seconds = np.diff(t_ns[chunks])[later] / NS_PER_S
    return seconds / tokens, tokens, run_of_chunk[1:][later]


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


def percentiles_by_run(
    values: NDArray[np.floating], weights: NDArray[np.integer], counts: NDArray[np.integer], percents: Sequence[int]
) -> NDArray[np.float64]:
    """`weighted_percentiles` of each run by itself, NaN where it has no values: [R, percents].

    The runs' `values` and `weights` [K] lie end to end, `counts` [R] of each.
    """
    found = np.full((len(counts), len(percents)), np.nan)
    has = np.flatnonzero(counts)
    run_of_value = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((values, run_of_value))
    covered = np.cumsum(weights[order].astype(np.int64))
    ends = covered[np.cumsum(counts[has]) - 1]
    before = np.concatenate(([0], ends[:-1]))
    for column, percent in enumerate(percents):
        ranks = before + -(-percent * (ends - before) // 100)
        found[has, column] = values[order[np.searchsorted(covered, ranks)]]
    return found


def verdicts(batch: Batch, kind: BackendKind, groups: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drafts judged, and drafts accepted, by group and position: [G, K] each, position 1 first.

    A draft's position is its depth; in a pipeline, the number of verdicts since the last flush. `groups` [R] says which
    group a run belongs to, from 0 up.
    """
    num_groups = int(groups.max(initial=-1)) + 1
    if kind == "pipeline":
        return _verdicts_since_flush(batch, groups, num_groups)
    if kind == "draft_verify":
        group_of_step = groups[batch.run_of_step[batch.decodes]]
        judged, accepted = batch.judged[batch.decodes], batch.accepted[batch.decodes]
        shape = num_groups, int(judged.max(initial=0)) + 1
        return _reaching(group_of_step, judged, shape), _reaching(group_of_step, accepted, shape)
    nothing = np.zeros((num_groups, 0), dtype=np.int64)
    return nothing, nothing


def _verdicts_since_flush(
    batch: Batch, groups: NDArray[np.int64], num_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    given = np.flatnonzero(batch.decodes & (batch.judged > 0))
    run, accepted, place = batch.run_of_step[given], batch.accepted[given], np.arange(len(given))
    after_flush = np.ones(len(given), dtype=np.bool_)
    after_flush[1:] = (run[1:] != run[:-1]) | (accepted[:-1] == 0)
    position = place - np.maximum.accumulate(np.where(after_flush, place, 0))
    shape = num_groups, int(position.max(initial=-1)) + 1
    judged_at, accepted_at = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    np.add.at(judged_at, (groups[run], position), 1)
    np.add.at(accepted_at, (groups[run], position), accepted)
    return judged_at, accepted_at


def _reaching(group: NDArray[np.int64], depths: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    """How many of each group's `depths` are at least 1, at least 2, ...; `shape` is groups x depths, 0 included."""
    counts = np.bincount(group * shape[1] + depths, minlength=shape[0] * shape[1]).reshape(shape)
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, 1:]
