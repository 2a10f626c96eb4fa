"""Results in memory: the head of a file, its runs as a table, and the metrics and flags computed from them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from spdbench.errors import InputError
from spdbench.judge.metrics.flags import MADE_FROM_ONE_RESULT, flags_for
from spdbench.judge.metrics.metrics import Metrics
from spdbench.judge.results.embedded import is_report, read_report
from spdbench.judge.results.reader import read_detailed_runs, read_runs
from spdbench.judge.results.schema import Flag, Result, Run
from spdbench.judge.results.table import STEP_COLUMNS, RunTable, table_from
from spdbench.judge.timeline import step_tokens
from spdbench.processors import usable_cores

MAX_BYTES_PER_S = 1e18
"""A read bandwidth above this comes from a damaged file."""
WORTHWHILE_BYTES = 24 * 2**20
"""Files of less than this together are read before a second process would have started."""
DRAFTING = ("each response of vLLM", "each response of SGLang", "vLLM's counters")
"""Sources of acceptance that only servers with drafts have, whether or not any request has counts to believe."""
MAX_PROCESSES = 8
FILES_AT_ONCE = 8

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class LoadedResult:
    """One result: the file's `head`, which is all of it but the runs, and the `runs`.

    `metrics` and `flags` are computed anew, whatever summary and flags the head holds. `read_details` reads the runs
    that hold spans or drafted tokens: they are too large to be in memory for every comparison.
    """

    file: str
    head: Result
    runs: RunTable
    read_details: Callable[[], Iterable[Run]] = tuple

    @property
    def label(self) -> str:
        return self.head.backend.label

    def detailed_runs(self) -> Iterator[Run]:
        """The runs that hold spans or drafted tokens, one by one.

        Raises:
            InputError: the drafted tokens of one are not those of its steps.
        """
        for run in self.read_details():
            try:
                step_tokens(run)
            except ValueError as error:
                raise InputError(f"{self.file}: prompt {run.prompt_id}: {error}") from None
            yield run

    @cached_property
    def known_devices(self) -> list[str] | None:
        """What the backend ran on; None if it does not know."""
        backend = self.head.backend
        return None if "devices" in backend.unknown else backend.devices

    @cached_property
    def knows_ids(self) -> bool:
        """False if an engine gave text without ids."""
        return "ids" not in self.head.backend.unknown

    @property
    def is_served(self) -> bool:
        """True if another engine has the only copy of the model: a server."""
        return self.head.backend.other_model is not None and self.known_devices is None

    @cached_property
    def drafts(self) -> bool | None:
        """Whether it drafts, by what was drafted and not by what was accepted of that; None where nothing says it."""
        backend = self.head.backend
        if "drafts" not in backend.unknown:
            return bool(self.runs.steps[[STEP_COLUMNS.index(name) for name in ("drafted", "accepted")]].any())
        counted = [each for each in self.runs.drafts if each is not None and each.rounds]
        if any(each.drafted or each.accepted for each in counted):
            return True
        if counted and all(each.drafted == 0 for each in counted):
            return False
        return backend.chosen.get("acceptance", "").startswith(DRAFTING) or None

    @cached_property
    def num_begun(self) -> int:
        """Conversations with a run in the file, failed ones included."""
        return len({prompt for prompt, _, _ in self.runs.keys})

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.runs, self.head.backend, self.read_bandwidth)

    @property
    def read_bandwidth(self) -> float | None:
        """The machine's, in bytes/s; None where it was not measured, or cannot be true."""
        value = self.head.environment.get("read_bandwidth_bytes_per_s")
        return float(value) if isinstance(value, int | float) and 1 <= value <= MAX_BYTES_PER_S else None

    @cached_property
    def by_category(self) -> dict[str, LoadedResult]:
        """The runs of each category, by its name."""
        return {name: replace(self, runs=self.runs.part(name)) for name in sorted(set(self.runs.categories))}

    def part(self, category: str) -> LoadedResult:
        """The runs of one category; none where it has none of them."""
        return self.by_category.get(category) or replace(self, runs=self.runs.part(category))

    @cached_property
    def flags(self) -> list[Flag]:
        kept = [flag for flag in self.head.flags if flag.name not in MADE_FROM_ONE_RESULT]
        head = self.head
        return flags_for(self.metrics, head.backend, head.model, head.drafter, head.divergence) + kept


def load(result: Result, file: str) -> LoadedResult:
    """A result that is in memory already, with all ids."""
    detailed = [run for run in result.runs if run.spans is not None or run.drafted_tokens is not None]
    table = table_from(result.runs, keep_ids=True)
    return LoadedResult(file, result.model_copy(update={"runs": []}), table, partial(iter, detailed))


def read_results(paths: Sequence[Path], *, keep_ids: bool = False) -> list[LoadedResult]:
    """The results in `paths`, and those that reports among them hold; a file that is named twice is read once.
    `keep_ids` for callers that show ids.

    Raises:
        InputError: a file cannot be read, or is not a result.
    """
    return list(chain.from_iterable(share_out(partial(_read, keep_ids=keep_ids), paths)))


def _read(path: Path, *, keep_ids: bool) -> list[LoadedResult]:
    """One result; as many as it holds from a report."""
    files = [(path / name, raw) for name, raw in read_report(path)] if is_report(path) else [(path, None)]
    found = []
    for name, raw in files:
        head, runs = read_runs(name, keep_ids=keep_ids, raw=raw)
        found.append(LoadedResult(str(name), head, runs, partial(read_detailed_runs, name, raw)))
        if not keep_ids:
            _ = found[-1].flags  # a comparison shows them: computed here, in parallel where there are several processes
    return found


def share_out(work: Callable[[Path], Made], files: Sequence[Path]) -> list[Made]:
    """`work` done on each of `files`, in their order, and once on a file that is named twice; in several processes
    where that pays. Raises what the first of them raises."""
    named: dict[str, Path] = {}
    for file in files:
        named.setdefault(real_path(file), file)
    files = list(named.values())
    processes = _num_processes(files)
    if processes < 2:
        return [work(file) for file in files]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, get_context("fork"), _leave_interrupts_to_the_parent) as pool:
        return list(pool.map(work, files, chunksize=FILES_AT_ONCE))


def real_path(file: Path) -> str:
    """Where `file` leads; of a loop of links, or a name that no file can have, what it is. `Path.resolve` raises."""
    try:
        return os.path.realpath(file)
    except (OSError, ValueError):
        return os.path.abspath(file)


def _num_processes(files: Sequence[Path]) -> int:
    """1 where a second one would not pay, or a fork is not safe."""
    if sys.platform != "linux" or sum(map(_num_bytes, files)) < WORTHWHILE_BYTES:
        return 1
    return min(usable_cores(), len(files) // FILES_AT_ONCE, MAX_PROCESSES)


def _num_bytes(file: Path) -> int:
    """0 for a file that is missing: reading it raises the error."""
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return 0


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
