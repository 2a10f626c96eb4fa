"""Runs side by side: each column of their steps end to end in one array, so that many runs are counted at once.

Must not know where runs come from, nor what is computed from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from spdbench.judge.results.schema import Run

MAX_RUNS = 256
"""Runs in a batch: enough that a call of numpy's costs next to nothing a run, and few enough to hold at once."""


@dataclass(frozen=True, eq=False)
class Batch:
    """R runs with S steps in all.

    `runs` tell what is one value a run; their own columns may be stand-ins. `outputs` are each run's ids in decimal
    digits, joined by commas. `num_steps` [R] says how many entries of the step columns [S] are each run's.
    """

    runs: Sequence[Run]
    outputs: Sequence[bytes]
    num_steps: NDArray[np.int64]
    t_ns: NDArray[np.int64]
    emitted: NDArray[np.int64]
    drafted: NDArray[np.int64]
    judged: NDArray[np.int64]
    accepted: NDArray[np.int64]
    forwards: NDArray[np.float64]

    @cached_property
    def run_of_step(self) -> NDArray[np.int64]:
        """Which run each step belongs to: [S]."""
        return np.repeat(np.arange(len(self.num_steps)), self.num_steps)

    @cached_property
    def prefills(self) -> NDArray[np.int64]:
        """Where each run's first step is; none for a run without steps."""
        return (np.cumsum(self.num_steps) - self.num_steps)[self.num_steps > 0]

    @cached_property
    def decodes(self) -> NDArray[np.bool_]:
        """True for every step but prefill: [S]."""
        found = np.ones(len(self.t_ns), dtype=np.bool_)
        found[self.prefills] = False
        return found

    def only(self, chosen: Sequence[bool]) -> Batch:
        """The runs that are `chosen` [R]."""
        if all(chosen):
            return self
        steps = np.asarray(chosen, dtype=np.bool_)[self.run_of_step]
        return Batch(
            [run for run, keep in zip(self.runs, chosen, strict=True) if keep],
            [text for text, keep in zip(self.outputs, chosen, strict=True) if keep],
            self.num_steps[list(chosen)],
            self.t_ns[steps],
            self.emitted[steps],
            self.drafted[steps],
            self.judged[steps],
            self.accepted[steps],
            self.forwards[steps],
        )


def batch_of(runs: Sequence[Run]) -> Batch:
    """`runs` with columns of their own as one batch."""
    steps = [run.steps for run in runs]
    return Batch(
        runs,
        [",".join(map(str, run.output_ids)).encode() for run in runs],
        np.array([len(columns.t_ns) for columns in steps], dtype=np.int64),
        np.fromiter(chain.from_iterable(columns.t_ns for columns in steps), np.int64),
        np.fromiter(chain.from_iterable(columns.emitted for columns in steps), np.int64),
        np.fromiter(chain.from_iterable(columns.drafted for columns in steps), np.int64),
        np.fromiter(chain.from_iterable(columns.judged for columns in steps), np.int64),
        np.fromiter(chain.from_iterable(columns.accepted for columns in steps), np.int64),
        np.fromiter(chain.from_iterable(columns.forwards for columns in steps), np.float64),
    )


def batches_of(runs: Iterable[Run]) -> Iterator[Batch]:
    """`runs`, a limited number at a time."""
    source = iter(runs)
    while chosen := list(islice(source, MAX_RUNS)):
        yield batch_of(chosen)
