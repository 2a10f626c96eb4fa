"""Two results side by side: which of their runs belong together, how their speed compares, whether the ids agree.

Must not know tables, baselines' names or printing. METRICS.md, "Pairing" and "Intervals".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from spdbench.judge.metrics import stats
from spdbench.judge.metrics.flags import MADE_FROM_ONE_RESULT, flags_for
from spdbench.judge.metrics.metrics import Tally
from spdbench.judge.metrics.ratios import is_failed, speeds
from spdbench.judge.results.batch import Batch, batches_of
from spdbench.judge.results.json_columns import NotPlain
from spdbench.judge.results.process_map import share_out
from spdbench.judge.results.reader import reading
from spdbench.judge.results.schema import BackendRecord, Result, Run, RunKey, Summary, read_result

MOST_BYTES_PER_S = 1e18
"""A read bandwidth above this is a damaged file's."""


class RunFacts(NamedTuple):
    """What comparing needs of a run; `output_digest` stands for its ids."""

    category: str
    prompt_sha256: str
    decode_tokens: int
    decode_s: float
    output_digest: bytes


@dataclass(frozen=True, eq=False)
class Entry:
    """One result to compare: the file's `head` (no runs; summary and flags made anew) and a little of each run.

    `num_begun` conversations have a run in the file, failed ones included.
    """

    file: str
    head: Result
    runs: dict[RunKey, RunFacts]
    num_begun: int

    @property
    def label(self) -> str:
        return self.head.backend.label


@dataclass(frozen=True)
class Speedup:
    """Ratio of decode tokens/s to the baseline's over `num_paired` runs; the interval is None if it cannot be told."""

    value: float | None
    interval: tuple[float, float] | None
    num_paired: int

    @property
    def difference_shown(self) -> bool | None:
        """False if the interval holds 1.0; None without an interval."""
        if self.interval is None:
            return None
        return not self.interval[0] <= 1.0 <= self.interval[1]


@dataclass(frozen=True)
class Outputs:
    """How many of `num_compared` runs gave the baseline's ids, token for token."""

    num_compared: int
    num_identical: int


@dataclass(frozen=True)
class Pairing:
    """Runs of two results that answer the same prompt, by key. `num_dropped` runs, of either, have no partner.

    `first_prompts_differ` is true if a conversation begins differently in the two, or nothing pairs at all; a later
    turn may differ without fault, when the answers before it did.
    """

    baseline: Entry
    candidate: Entry
    keys: tuple[RunKey, ...]
    num_dropped: int
    first_prompts_differ: bool

    def speedup(self, category: str | None = None) -> Speedup:
        """The candidate's speed-up, of one `category` or all."""
        keys = list(self._keys(category))
        base, mine = (speeds(entry.runs, keys) for entry in (self.baseline, self.candidate))
        if not (base.sum(axis=0).all() and mine.sum(axis=0).all()):
            return Speedup(None, None, len(keys))
        base_tokens, base_s, mine_tokens, mine_s = np.hstack([base, mine]).sum(axis=0)
        interval = stats.paired_ratio_interval([key[0] for key in keys], [key[2] for key in keys], base, mine)
        return Speedup(float(mine_tokens / mine_s / (base_tokens / base_s)), interval, len(keys))

    def outputs(self, category: str | None = None) -> Outputs:
        keys = list(self._keys(category))
        mine, base = self.candidate.runs, self.baseline.runs
        return Outputs(len(keys), sum(mine[key].output_digest == base[key].output_digest for key in keys))

    def _keys(self, category: str | None) -> Iterator[RunKey]:
        return (key for key in self.keys if category is None or self.candidate.runs[key].category == category)


def pair(baseline: Entry, candidate: Entry) -> Pairing:
    """Pairs runs with the same prompt id, turn and repeat whose `prompt_sha256` agree."""
    both = [key for key in candidate.runs if key in baseline.runs]
    can_pair = bool(baseline.runs and candidate.runs)
    keys = [key for key in both if candidate.runs[key].prompt_sha256 == baseline.runs[key].prompt_sha256]
    first_turn = min((turn for _, turn, _ in both), default=0)
    paired = set(keys)
    return Pairing(
        baseline=baseline,
        candidate=candidate,
        keys=tuple(keys),
        num_dropped=len(baseline.runs.keys() | candidate.runs.keys()) - len(keys),
        first_prompts_differ=can_pair and (not keys or any(key[1] == first_turn and key not in paired for key in both)),
    )


class Collector:
    """Takes runs batch by batch and keeps what it needs to judge them and to compare them: an `Entry` at the end."""

    def __init__(self, backend: BackendRecord) -> None:
        self.tally = Tally(backend)
        self._facts: dict[RunKey, RunFacts] = {}
        self._begun: set[str] = set()

    def add(self, batch: Batch) -> None:
        self.tally.add(batch)
        for run, output in zip(batch.runs, batch.outputs, strict=True):
            self._begun.add(run.prompt_id)
            if not is_failed(run):
                self._facts[run.key] = _facts(run, output)

    def entry(self, head: Result, file: str) -> Entry:
        """All runs so far under `head`, whose metrics and flags are judged anew, whatever it says."""
        bandwidth = head.environment.get("read_bandwidth_bytes_per_s")
        sane = isinstance(bandwidth, int | float) and 1 <= bandwidth <= MOST_BYTES_PER_S
        overall, by_category = self.tally.metrics(bandwidth if sane else None)
        summary = Summary.model_construct(overall=cast("dict[str, Any]", overall), by_category=cast("Any", by_category))
        kept = [flag for flag in head.flags if flag.name not in MADE_FROM_ONE_RESULT]
        flags = flags_for(overall, head.backend, head.drafter, head.divergence) + kept
        head = head.model_copy(update={"runs": [], "summary": summary, "flags": flags})
        return Entry(file, head, self._facts, len(self._begun))


def entry_from(result: Result, file: str) -> Entry:
    """`result` ready to compare."""
    collector = Collector(result.backend)
    for batch in batches_of(result.runs):
        collector.add(batch)
    return collector.entry(result, file)


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """The results in `paths`, a few runs at a time in memory; a file that is named twice is read once.

    Raises:
        InputError: a file cannot be read, or is not a result.
    """
    return share_out(_read_entry, paths)


def _read_entry(path: Path) -> Entry:
    try:
        with reading(path) as file:
            collector = Collector(file.start.backend)
            for batch in file.batches:
                collector.add(batch)
            return collector.entry(file.head(), str(path))
    except NotPlain:
        return entry_from(read_result(path), str(path))


def _facts(run: Run, output: bytes) -> RunFacts:
    return RunFacts(
        category=run.category,
        prompt_sha256=run.prompt_sha256,
        decode_tokens=run.num_new_tokens - 1,
        decode_s=run.decode_s or 0.0,
        output_digest=hashlib.sha256(output).digest(),
    )
