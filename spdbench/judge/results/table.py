"""The runs of one result in columns: the one form in memory that metrics, comparisons, gates and reports work on.

What is one number a run is a row of `sums`. Steps are kept too, end to end and in the narrowest integers that hold
them: some 8 bytes a step, so that 10,000 runs of 256 steps take about 30 MB.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.results.lanes import BubbleParts, CyclesByFill, PartTimes
from spdbench.judge.results.machine_load import PARTS as LOAD_PARTS
from spdbench.judge.results.schema import Drafts, Run, RunKey

PARTS = tuple(BubbleParts.model_fields)
"""`useful` and `wasted`, then the causes of idle time in the order in which they are charged."""
COLUMNS = (
    *("runs", "prompt_tokens", "new_tokens", "decode_tokens", "ttft_s", "decode_s", "total_s"),
    *("steps", "judged", "accepted", "forwards", "score", "scored", "energy_j", "metered_tokens"),
    *("reported_rounds", "reported_judged", "reported_accepted"),
    *("truncated", "degenerate", "contradicted", "peak_memory_bytes"),
    *("measured_s", "bubble_s", *PARTS, "cycles", "stage_s", "control_s", "wall_s"),
    *("full_drafts", "slack_s"),
    *(f"{part}_{what}" for part in PartTimes.model_fields for what in ("num", "part_s")),
    *("watched_core_s", *(f"{name}_core_s" for name in LOAD_PARTS), "clock_mhz", "disturbed", "set_aside"),
)
"""One run's numbers; all 0 for a run that failed.

`steps` to `forwards` are sums over decode steps, so without prefill. `scored`, `truncated`, `degenerate` and
`contradicted` are 1 or 0.
`metered_tokens` are the new tokens of runs whose energy was measured. `reported_*` is what an engine counted itself,
NaN for what it does not report. From `measured_s` on come the columns made of spans, 0 for a run without: decode time
with spans and its parts, then the number of full cycles, their slowest stages' time, the rest of them, and all of them;
then how many cycles with all stages at work made a draft, and by how much the slowest lane took longer in them;
then how often each part of the work was done, and its time.
From `watched_core_s` on come processor time of the machine while it was watched, and what of it was taken from the
request; then a clock rate, 1 for a request that was disturbed, and how many measurements of it do not count.
"""
COLUMN = {name: index for index, name in enumerate(COLUMNS)}
STEP_COLUMNS = ("emitted", "drafted", "judged", "accepted")
MAX_CYCLE = 32
"""The longest cycle of which two fit into the tail that is looked at."""
MIN_IDS = 16
"""Shorter outputs are too short to decide."""
TAIL_TOKENS = 64


class StepArrays(NamedTuple):
    """The steps of some runs as a file has them, end to end: [S] each. The first step of a run is prefill."""

    t_ns: NDArray[np.int64]
    emitted: NDArray[np.int64]
    drafted: NDArray[np.int64]
    judged: NDArray[np.int64]
    accepted: NDArray[np.int64]
    forwards: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunTable:
    """R runs with S steps in all, in the order of the file, failed ones included.

    `errors` are the messages of failed runs, `disturbed_by` the processes that took most time from each run. `outputs`
    are each run's ids in decimal digits joined by commas, `texts` the answers of engines that give text; None where
    they are only compared, for which `output_sha256` is enough: of the ids, or of the text where no ids are known.
    `drafts` are what engines counted themselves, `by_fill` are a pipeline's cycles. `sums` is [R, len(COLUMNS)].
    `num_steps` [R] says how many entries of `gaps_ns` [S] and `steps` [len(STEP_COLUMNS), S] are each run's; a gap is
    the time since the step before, for the first step since the request's start.
    """

    keys: list[RunKey]
    categories: list[str]
    prompt_sha256: list[str]
    errors: list[str | None]
    disturbed_by: list[list[str]]
    output_sha256: list[bytes]
    outputs: list[bytes] | None
    texts: list[str | None] | None
    drafts: list[Drafts | None]
    by_fill: list[CyclesByFill | None]
    failed: NDArray[np.bool_]
    sums: NDArray[np.float64]
    num_steps: NDArray[np.int64]
    gaps_ns: NDArray[np.integer]
    steps: NDArray[np.integer]

    @cached_property
    def row_of(self) -> dict[RunKey, int]:
        """Where each run is."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def asked(self) -> list[tuple[RunKey, str]]:
        """Each run's key, and the hash of its prompt: both are equal of runs that pair."""
        return list(zip(self.keys, self.prompt_sha256, strict=True))

    @cached_property
    def answered(self) -> list[RunKey]:
        """The runs that did not fail."""
        return [key for key, failed in zip(self.keys, self.failed, strict=True) if not failed]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where each run's steps end: [R]."""
        return np.cumsum(self.num_steps)

    def prompt_of(self, key: RunKey) -> str:
        """The sha256 of what was fed in."""
        return self.prompt_sha256[self.row_of[key]]

    def output_of(self, key: RunKey) -> list[bytes]:
        """One run's ids in decimal digits; none where they were not kept."""
        return self.outputs[self.row_of[key]].split(b",") if self.outputs is not None else []

    def steps_of(self, key: RunKey) -> NDArray[np.integer]:
        """One run's steps: [len(STEP_COLUMNS), steps]."""
        row = self.row_of[key]
        return self.steps[:, self.ends[row] - self.num_steps[row] : self.ends[row]]

    def rates(self, keys: Sequence[RunKey]) -> NDArray[np.float64]:
        """Decode tokens and seconds of each of the runs `keys`: [keys, 2]."""
        return self.columns(keys, "decode_tokens", "decode_s")

    def columns(self, keys: Sequence[RunKey], *names: str) -> NDArray[np.float64]:
        """Columns of each of the runs `keys`: [keys, names]."""
        rows = [self.row_of[key] for key in keys]
        return self.sums[rows][:, [COLUMN[name] for name in names]]

    def total(self, keys: Sequence[RunKey]) -> NDArray[np.float64]:
        """The sum of each column over the runs `keys`."""
        total: NDArray[np.float64] = self.sums[[self.row_of[key] for key in keys]].sum(axis=0)
        return total

    def part(self, category: str) -> RunTable:
        """The runs of one category."""
        rows = np.array([name == category for name in self.categories], dtype=np.bool_)
        steps = np.repeat(rows, self.num_steps)
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, column in found.items():
            if isinstance(column, list):
                found[name] = [value for value, chosen in zip(column, rows, strict=True) if chosen]
            elif name == "steps":
                found[name] = column[:, steps]
            elif column is not None:
                found[name] = column[steps if name == "gaps_ns" else rows]
        return RunTable(**found)


def table_from(runs: Sequence[Run], *, keep_ids: bool = False) -> RunTable:
    """`runs` in columns; `keep_ids` keeps their ids and not only hashes of them."""
    steps = [run.steps for run in runs]
    arrays: dict[str, Any] = {}
    for name in StepArrays._fields:
        column = chain.from_iterable(getattr(each, name) for each in steps)
        arrays[name] = np.fromiter(column, np.float64 if name == "forwards" else np.int64)
    return build_table(
        runs,
        [",".join(map(str, run.output_ids)).encode() for run in runs],
        np.array([len(each.t_ns) for each in steps], dtype=np.int64),
        StepArrays(**arrays),
        keep_ids=keep_ids,
    )


def build_table(
    runs: Sequence[Run], outputs: list[bytes], num_steps: NDArray[np.int64], steps: StepArrays, *, keep_ids: bool
) -> RunTable:
    """A table of `runs`, whose ids and steps are in `outputs` and `steps`; their own may be stand-ins."""
    has_steps = num_steps > 0
    first = (np.cumsum(num_steps) - num_steps)[has_steps]
    sums = np.array([_numbers(run) for run in runs], dtype=np.float64).reshape(-1, len(COLUMNS))
    sums[:, COLUMN["steps"]] = np.maximum(num_steps - 1, 0)
    sums[:, COLUMN["degenerate"]] = degenerate(outputs)
    for name in ("judged", "accepted", "forwards") if len(first) else ():
        column = getattr(steps, name).copy()
        column[first] = 0
        sums[has_steps, COLUMN[name]] = np.add.reduceat(column, first)
    failed = np.array([is_failed(run) for run in runs], dtype=np.bool_)
    sums[failed] = 0
    gaps_ns = np.diff(steps.t_ns, prepend=0)
    gaps_ns[first] = steps.t_ns[first]
    return RunTable(
        keys=[run.key for run in runs],
        categories=[run.category for run in runs],
        prompt_sha256=[run.prompt_sha256 for run in runs],
        errors=[run.error for run in runs],
        disturbed_by=[run.machine.who if run.machine else [] for run in runs],
        output_sha256=[
            hashlib.sha256(ids or (run.text or "").encode(errors="replace")).digest()
            for ids, run in zip(outputs, runs, strict=True)
        ],
        outputs=outputs if keep_ids else None,
        texts=[run.text for run in runs] if keep_ids else None,
        drafts=[run.drafts for run in runs],
        by_fill=[run.cycles_by_fill for run in runs],
        failed=failed,
        sums=sums,
        num_steps=num_steps,
        gaps_ns=_narrow(gaps_ns),
        steps=_narrow(np.stack([getattr(steps, name) for name in STEP_COLUMNS])),
    )


def join_tables(tables: Iterable[RunTable]) -> RunTable:
    """The runs of all `tables`, end to end. Column by column, so that what an iterator yields is not held twice."""
    names = [field.name for field in fields(RunTable)]
    parts: dict[str, list[Any]] = {name: [] for name in names}
    for table in tables:
        for name in names:
            parts[name].append(getattr(table, name))
    if not parts["keys"]:
        return table_from([])
    del table
    return RunTable(**{name: _join(name, parts.pop(name)) for name in names})


def _join(name: str, columns: list[Any]) -> Any:
    if columns[0] is None:
        return None
    if isinstance(columns[0], list):
        return list(chain(*columns))
    return np.concatenate(columns, axis=0 if name == "sums" else -1)


def is_failed(run: Run) -> bool:
    """True for a run that gives no numbers: it ended in an error, or has no first token."""
    return run.finish_reason == "error" or run.num_new_tokens < 1 or run.ttft_s is None


def _numbers(run: Run) -> tuple[float, ...]:
    """One run's row of `COLUMNS`, but for what its steps and ids say."""
    ttft_s, decode_s, tokens = run.ttft_s or 0.0, run.decode_s or 0.0, run.num_new_tokens
    return (
        *(1, run.num_prompt_tokens, tokens, tokens - 1, ttft_s, decode_s, ttft_s + decode_s),
        *(0, 0, 0, 0, run.score or 0.0, run.score is not None, run.energy_j or 0.0, tokens if run.energy_j else 0),
        *_reported(run),
        *(run.finish_reason == "length", 0, run.contradiction is not None, run.peak_memory_bytes or 0),
        *_lane_numbers(run),
        *_load_numbers(run),
    )


def _reported(run: Run) -> tuple[float, float, float]:
    """Rounds, and drafts judged and accepted, as the engine counted them; all 0 where it counted nothing."""
    if run.drafts is None:
        return 0.0, 0.0, 0.0
    judged = math.nan if run.drafts.judged is None else run.drafts.judged
    return run.drafts.rounds, judged, run.drafts.accepted


def _lane_numbers(run: Run) -> tuple[float, ...]:
    """The columns made of spans. Each run weighs by its decode time."""
    if run.bubble is None or not run.decode_s:
        return (0.0,) * (len(PARTS) + 8 + 2 * len(PartTimes.model_fields))
    shares = [run.decode_s * share for _, share in run.bubble]
    bubble_s = run.decode_s * (1 - (run.bubble.useful + run.bubble.wasted))
    cycles = run.full_cycles
    full = (cycles.num, cycles.stage_s, cycles.wall_s - cycles.stage_s, cycles.wall_s) if cycles else (0.0,) * 4
    fill = run.cycles_by_fill
    drafting = (fill.drafts[-1], fill.slack_s[-1]) if fill else (0.0, 0.0)
    times = [part for _, part in run.parts] if run.parts else [None] * len(PartTimes.model_fields)
    parts = chain.from_iterable((part.num, part.s) if part else (0.0, 0.0) for part in times)
    return run.decode_s, bubble_s, *shares, *full, *drafting, *parts


def _load_numbers(run: Run) -> tuple[float, ...]:
    """The columns of the watched machine."""
    load = run.machine
    if load is None:
        return (0.0,) * (len(LOAD_PARTS) + 4)
    core_s = load.wall_s * load.cores
    taken = [share * core_s for share in load.parts.values()]
    return core_s, *taken, load.clock_mhz or 0.0, load.disturbed, len(run.set_aside)


def _narrow(values: NDArray[np.int64]) -> NDArray[np.integer]:
    """`values`, none of them negative, in the narrowest type that holds them."""
    most = values.max(initial=0)
    types = (np.uint8, np.uint16, np.uint32)
    return values.astype(next((each for each in types if most <= np.iinfo(each).max), np.int64))


def is_degenerate(output_ids: Sequence[int]) -> bool:
    """True if over half of the last 64 ids lie in one stretch that repeats a cycle of at most 32 ids.

    A cycle counts once it occurred twice. Outputs of fewer than 16 ids are too short to decide.
    """
    tail = np.asarray(output_ids[-TAIL_TOKENS:], dtype=np.int64)[None]
    return bool(_end_in_loops(tail, np.ones(tail.shape, dtype=np.bool_))[0])


def degenerate(outputs: Sequence[bytes]) -> NDArray[np.bool_]:
    """`is_degenerate` of each of `outputs` [R], which are ids in decimal digits joined by commas."""
    tails = [text.rsplit(b",", TAIL_TOKENS)[-TAIL_TOKENS:] if text else [] for text in outputs]
    lengths = np.array([len(tail) for tail in tails], dtype=np.int64)
    numbers = b",".join(b",".join(tail) for tail in tails if tail)
    real = np.arange(TAIL_TOKENS) >= TAIL_TOKENS - lengths[:, None]  # shorter outputs are aligned at the right
    ids = np.zeros(real.shape, dtype=np.int64)
    ids[real] = np.fromstring(numbers, dtype=np.int64, sep=",") if numbers else ()
    return _end_in_loops(ids, real)


def _end_in_loops(ids: NDArray[np.int64], real: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows of `ids` [R, T] are degenerate; the ids of a row are where `real` [R, T] is true, at its end."""
    lengths = real.sum(axis=1)
    found = np.zeros(len(ids), dtype=np.bool_)
    for period in range(1, MAX_CYCLE + 1):
        repeats = (ids[:, period:] == ids[:, :-period]) & real[:, :-period]
        # Most rows repeat too few ids, wherever they are; only in the others it matters whether in one stretch.
        rows = np.flatnonzero((2 * (repeats.sum(axis=1) + period) > lengths) & (lengths >= MIN_IDS))
        place = np.arange(1, repeats.shape[1] + 1)
        last_break = np.maximum.accumulate(np.where(repeats[rows], 0, place), axis=1)
        stretch = (place - last_break).max(axis=1, initial=0)
        found[rows] |= (stretch >= period) & (2 * (stretch + period) > lengths[rows])
    return found
