"""A result with what a gate needs of each run: its ids and its steps, in compact columns.

`pairing.Entry` keeps less, for tables of many files; a gate has to tell where two runs part. Must not know verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.metrics.ratios import is_failed, told_columns
from spdbench.judge.results.batch import Batch, batches_of
from spdbench.judge.results.json_columns import NotPlain
from spdbench.judge.results.process_map import share_out
from spdbench.judge.results.reader import reading
from spdbench.judge.results.schema import Result, RunKey, read_result

STEP_COLUMNS = ("emitted", "drafted", "judged", "accepted")


class RunTrace(NamedTuple):
    """One run. `output` are its ids in decimal digits, joined by commas; `steps` is [len(STEP_COLUMNS), steps], prefill
    first; `told` is what an engine counted itself, as `told_columns` gives it. A failed run says why in `error` and
    counts for nothing else."""

    category: str
    prompt_sha256: str
    failed: bool
    error: str | None
    decode_tokens: int
    decode_s: float
    output: bytes
    steps: NDArray[np.int32]
    told: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Recording:
    """One result: the file's `head` (no runs, its metrics as they stand there) and the trace of each run."""

    file: str
    head: Result
    runs: Mapping[RunKey, RunTrace]

    @property
    def label(self) -> str:
        return self.head.backend.label


def recording_from(result: Result, file: str) -> Recording:
    """`result` ready for a gate."""
    return _record(batches_of(result.runs), lambda: result.model_copy(update={"runs": []}), file)


def read_recordings(paths: Sequence[Path]) -> list[Recording]:
    """The results in `paths`; a file that is named twice is read once.

    Raises:
        InputError: a file cannot be read, or is not a result.
    """
    return share_out(_read, paths)


def _read(path: Path) -> Recording:
    try:
        with reading(path) as file:
            return _record(file.batches, file.head, str(path))
    except NotPlain:
        return recording_from(read_result(path), str(path))


def _record(batches: Iterable[Batch], head: Callable[[], Result], file: str) -> Recording:
    """Goes through `batches` before it asks for the `head`."""
    runs: dict[RunKey, RunTrace] = {}
    for batch in batches:
        table = np.stack([getattr(batch, name) for name in STEP_COLUMNS]).astype(np.int32)
        ends = np.cumsum(batch.num_steps)
        for run, output, end, size in zip(batch.runs, batch.outputs, ends, batch.num_steps, strict=True):
            runs[run.key] = RunTrace(
                category=run.category,
                prompt_sha256=run.prompt_sha256,
                failed=is_failed(run),
                error=run.error,
                decode_tokens=run.num_new_tokens - 1,
                decode_s=run.decode_s or 0.0,
                output=output,
                steps=table[:, end - size : end],
                told=told_columns(run),
            )
    return Recording(file, head(), runs)
