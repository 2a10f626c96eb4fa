"""Which stage of a pipeline is at fault when no answer comes, and what it was doing.

A stage can fail in three ways, and each shows at its neighbours as well, often before it shows at the stage itself.

- It raises: it sends FAILED with its traceback and ends. Its neighbours, whose pipes and process groups break, may send
  FAILED first; such a report says that a neighbour seems to be at fault, and counts only if no other cause is found.
- It is killed: its process ends with a signal's negative exit code and sends nothing. So before a stage is
  reported as failed, the controller waits until one stage has ended and the others had time to notice.
- It hangs: no process ends, and all stages behind it wait as well. Each stage prints its stack on SIGUSR1, from C and
  without Python's lock, and the first whose stack is not in the middle of waiting for a neighbour is at fault.

While stages load, silence is no sign of a fault: layers may come slowly from disk. There, `Progress` looks at what the
processes use of processor and disk instead.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, Protocol

from spdbench.pipeline.processes.messages import Header, Kind, unpack
from spdbench.pipeline.processes.worker import StageSpec

LAST_REPORT_S = 2.0
"""How long a failing stage may take to report why, and its neighbours to notice."""
NOTICE_S = 0.5
"""How long neighbours may take to notice once a stage has ended."""
STACK_S = 0.3
"""How long stages may take to print their stacks."""

WAITS = re.compile(
    r'(transport\.py", line \d+ in (receive|rows|send|_write)|'
    r'worker\.py", line \d+ in (_join_group|_living_within_reach))\n'
)
"""A stack in the middle of which a stage waits for a neighbour, or for a verdict on what a later stage has to give."""


class FailureReport(NamedTuple):
    """A failing stage's traceback; `blames_neighbour` if it failed while it exchanged rows with another stage."""

    traceback: str
    blames_neighbour: bool

    @classmethod
    def of(cls, header: Header, payload: bytes) -> FailureReport:
        """The report in a FAILED message."""
        return cls(payload.decode(errors="replace"), bool(header.flag))


class StageProcess(Protocol):
    """A stage's process, on this machine or on another one. `sentinel` becomes readable when it has ended."""

    @property
    def pid(self) -> int | None: ...

    @property
    def place(self) -> str:
        """Where it runs, as part of a name; empty for this machine."""

    @property
    def sentinel(self) -> int: ...

    @property
    def exitcode(self) -> int | None:
        """As `multiprocessing` has it: None while it runs, negative if a signal ended it."""

    @property
    def is_lost(self) -> bool:
        """True if it ended, or cannot be reached any more, and nothing is left that knows its exit code."""

    def kill(self) -> None: ...

    def print_stack(self) -> None:
        """Asks for its stack; does not wait."""

    def read_stack(self) -> str:
        """The stack that was asked for, or why there is none."""

    def usage(self) -> tuple[str, ...]:
        """What it has used so far of processor and disk; two that are equal mean no progress."""

    def close(self) -> None:
        """Frees what is kept of it here."""


class LocalProcess:
    """A stage's process that this process started; it prints stacks to a pipe that is read from `stacks`."""

    place = ""
    is_lost = False

    def __init__(self, process: BaseProcess, stacks: Connection) -> None:
        self._process = process
        self._stacks = stacks

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sentinel(self) -> int:
        return self._process.sentinel

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()

    def print_stack(self) -> None:
        with contextlib.suppress(OSError, TypeError):
            os.kill(self.pid, signal.SIGUSR1)  # type: ignore[arg-type]

    def read_stack(self) -> str:
        with contextlib.suppress(EOFError, OSError):
            if self._stacks.poll(0):
                return os.read(self._stacks.fileno(), 1 << 16).decode(errors="replace")
        return "  (it does not even answer signals: stopped, or stuck in the kernel)"

    def usage(self) -> tuple[str, ...]:
        return _usage_of(self.pid or 0)

    def close(self) -> None:
        self._stacks.close()


@dataclass(frozen=True)
class StageHandle:
    """One stage of the pipeline of `label`, and the controller's ends of its connections. `unread` are reports that
    came while another stage's was awaited."""

    label: str
    spec: StageSpec
    process: StageProcess
    reports: Connection
    control: Connection
    unread: deque[tuple[Header, bytes]]

    @property
    def name(self) -> str:
        layers = self.spec.layers
        where = f"layers {layers.start} to {layers.stop - 1}, {self.process.place}process {self.process.pid}"
        return f"stage {self.spec.index} of {self.spec.num_stages} of {self.label} ({where})"


def describe_failure(stages: Sequence[StageHandle], received: Mapping[int, FailureReport]) -> str:
    """Whose fault it is that a pipe broke or a stage failed, as far as that can be known. `received` are failure
    reports by stage that were read already."""
    if all(report.blames_neighbour for report in received.values()):
        join_processes([stage.process for stage in stages], LAST_REPORT_S, at_least_one=True)
    found = {**{stage.spec.index: _last_report(stage.reports) for stage in stages}, **received}
    reports = [(stage, report) for stage in stages if (report := found[stage.spec.index])]
    for stage, report in reports:
        if not report.blames_neighbour:
            return f"{stage.name} failed:\n{report.traceback}"
    for stage in stages:
        if stage.process.is_lost:
            return f"{stage.name} is lost: its rank or its node ended, or the network between them did"
    for stage in stages:
        code = stage.process.exitcode
        if code is not None and code < 0:
            hint = " (the system kills with it when memory runs out)" if -code == signal.SIGKILL else ""
            return f"{stage.name} was killed by {signal.Signals(-code).name}{hint}"
    for stage, report in reports:
        return f"{stage.name} failed:\n{report.traceback}"
    for stage in stages:
        if stage.process.exitcode is not None:
            return f"{stage.name} ended with exit code {stage.process.exitcode}"
    return "a stage closed its pipes but is still running"


def describe_hang(stages: Sequence[StageHandle], limit_s: float, limit_name: str) -> str:
    """Which stage is at fault when no process ended but an answer is overdue, and where it is: the first that waits
    neither for a message nor for its successor to take one."""
    for stage in stages:
        stage.process.print_stack()
    time.sleep(STACK_S)
    for stage in stages:
        stack = stage.process.read_stack()
        if not WAITS.search(stack):
            return f"{stage.name} gave no answer within {limit_s:g} s ({limit_name}). It is at:\n{stack}"
    return f"no stage gave an answer within {limit_s:g} s ({limit_name}), and all wait for messages"


def join_processes(processes: Sequence[StageProcess], limit_s: float, *, at_least_one: bool = False) -> None:
    """Waits until all have ended; or, if `at_least_one`, until one has and its neighbours had time to notice."""
    deadline = time.monotonic() + limit_s
    while alive := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if at_least_one and len(alive) < len(processes):
            left, at_least_one = min(left, NOTICE_S), False
            deadline = time.monotonic() + left
        multiprocessing.connection.wait([process.sentinel for process in alive], left)


def _last_report(reports: Connection) -> FailureReport | None:
    """What a stage reported before it ended, if it did."""
    with contextlib.suppress(EOFError, OSError):
        while reports.poll(0):
            header, payload = unpack(reports.recv_bytes())
            if header.kind == Kind.FAILED:
                return FailureReport.of(header, payload)
    return None


class Progress:
    """Whether some processes make progress, by processor time and by what they read from disk (Linux: proc(5), `stat`
    and `io`; elsewhere they are always taken to).

    Only the main thread's time counts, since other threads may poll: gloo's do, in a process that only waits.
    """

    def __init__(self, processes: Iterable[StageProcess]) -> None:
        self._processes = tuple(processes)
        self._seen = self._usage()
        self._at = time.monotonic()

    @property
    def silence_s(self) -> float:
        """Seconds since one of the processes was last seen to have made progress."""
        now, used = time.monotonic(), self._usage()
        if used != self._seen or sys.platform != "linux":
            self._seen, self._at = used, now
        return now - self._at

    def _usage(self) -> list[tuple[str, ...]]:
        return [process.usage() for process in self._processes]


def _usage_of(process_id: int) -> tuple[str, ...]:
    """The main thread's ticks in user and system mode, and bytes read from storage; empty where they are unknown."""
    folder = Path(f"/proc/{process_id}")
    try:
        after_name = (folder / "task" / str(process_id) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        read = [line for line in (folder / "io").read_text().splitlines() if line.startswith("read_bytes")]
    except OSError:
        return ()
    return (after_name[11], after_name[12], *read)
