"""A pipeline's stage processes as the controller sees them: started, sent messages, watched, ended.

Every wait has a limit, and a stage that dies, hangs or fails is named with its traceback (`stage_faults`).

While the controller waits for one stage it reads what all of them report: a stage whose report is not read, such as the
logits of a token that was dropped meanwhile, would block on a full pipe, and with it every stage that has rows for it.
Such reports are kept in order until they are asked for.
"""

from __future__ import annotations

import contextlib
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import NoReturn, Protocol

from spdbench.errors import BackendLostError
from spdbench.pipeline.processes.children import child_process
from spdbench.pipeline.processes.messages import Header, Kind, pack, unpack
from spdbench.pipeline.processes.stage_faults import (
    LAST_REPORT_S,
    FailureReport,
    LocalProcess,
    Progress,
    StageHandle,
    describe_failure,
    describe_hang,
    join_processes,
)
from spdbench.pipeline.processes.transport import StagePipes
from spdbench.pipeline.processes.worker import LOAD_TIMEOUT_S, StageSpec, run_stage

PIPE_BUFFER_BYTES = 16384
"""Bytes that an empty pipe takes at once on any system."""
LOOK_EVERY_S = 0.5
"""How often loading stages are looked at."""

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


class StartStages(Protocol):
    """Starts the processes of all stages, and appends each to `handles` at once, so that a failure leaves none behind.
    Returns the connection to stage 0."""

    def __call__(self, specs: Sequence[StageSpec], label: str, handles: list[StageHandle]) -> Connection: ...


class StageWorkers:
    """The processes of a pipeline, whose owner is called `label`. Its owner calls `close`."""

    def __init__(
        self, specs: Sequence[StageSpec], timeout_s: float, label: str, start: StartStages | None = None
    ) -> None:
        self._timeout_s = timeout_s
        self._label = label
        self._stages: list[StageHandle] = []
        self._poll = select.poll()
        self._to_first: Connection | None = None
        self._lost: str | None = None
        try:
            self._to_first = (start or start_processes)(specs, label, self._stages)
            for stage in self._stages:
                self._poll.register(stage.reports.fileno(), select.POLLIN)
                self._poll.register(stage.process.sentinel, select.POLLIN)  # any death ends the wait for any stage
            self._wait_until_ready(specs)
        except BaseException:
            self._kill()
            raise

    has_local_stage = False
    """True if stage 0 is no process, but the controller's (`local_stage`)."""

    @property
    def process_ids(self) -> list[int]:
        return [stage.process.pid or 0 for stage in self._stages]

    def send(self, header: Header, payload: bytes = b"") -> None:
        """To stage 0, which passes on what concerns the others."""
        self._require_alive()
        assert self._to_first is not None
        message = pack(header, payload)
        if len(message) > PIPE_BUFFER_BYTES:
            self._send_long(self._to_first, message)
            return
        try:
            self._to_first.send_bytes(message)
        except OSError:
            self._fail()

    def _send_long(self, first: Connection, message: bytes) -> None:
        """In a thread: the pipe may not take all of it before stage 0 reads, and stage 0 may hang."""
        broken = threading.Event()

        def write() -> None:
            try:
                first.send_bytes(message)
            except (OSError, TypeError):  # its reader has gone, or it was closed meanwhile
                broken.set()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(self._timeout_s)
        if broken.is_set():
            self._fail()
        if writer.is_alive():
            self._fail_hanging()

    def announce_root(self, root: int) -> None:
        """Tells every stage that nodes that do not descend from this one are stale."""
        self._require_alive()
        self._send_number(self._stages, root)

    def receive(self, stage: int) -> tuple[Header, bytes]:
        """The next report of a stage.

        Raises:
            BackendLostError: a stage died, failed, or did not answer in time.
        """
        self._require_alive()
        handle, deadline = self._stages[stage], time.monotonic() + self._timeout_s
        while not handle.unread:
            if not self._read_reports(handle, deadline - time.monotonic()):
                self._fail_hanging()
        return handle.unread.popleft()

    def _receive_from_loading(self, stage: int, progress: Progress) -> tuple[Header, bytes]:
        """As `receive`, but without a limit of `timeout_s` as long as some stage makes progress with loading."""
        handle, deadline = self._stages[stage], time.monotonic() + LOAD_TIMEOUT_S
        while not handle.unread:
            if self._read_reports(handle, LOOK_EVERY_S):
                continue
            if progress.silence_s > self._timeout_s:
                self._fail_hanging("; it was loading")
            if time.monotonic() > deadline:
                self._fail_with(describe_hang(self._stages, LOAD_TIMEOUT_S, "the limit for loading"))
        return handle.unread.popleft()

    def _read_reports(self, awaited: StageHandle, limit_s: float) -> bool:
        """Waits for a report of any stage and reads those that are there; False if none comes within `limit_s`."""
        ready = dict(self._poll.poll(max(0.0, limit_s) * 1e3))
        reporting = [stage for stage in self._stages if stage.reports.fileno() in ready]
        if awaited not in reporting and any(stage.process.sentinel in ready for stage in self._stages):
            self._fail()
        for stage in reporting:
            stage.unread.append(self._read_report(stage))
        return bool(ready)

    def _read_report(self, stage: StageHandle) -> tuple[Header, bytes]:
        try:
            header, payload = unpack(stage.reports.recv_bytes())
        except (EOFError, OSError):
            self._fail()
        if header.kind == Kind.FAILED:
            self._fail({stage.spec.index: FailureReport.of(header, payload)})
        return header, payload

    def close(self) -> None:
        """Asks all workers to end, and kills those that do not. May be called twice."""
        if self._to_first is not None and self._lost is None:
            with contextlib.suppress(OSError):
                self._to_first.send_bytes(pack(Header(Kind.STOP)))
            join_processes([stage.process for stage in self._stages], LAST_REPORT_S)
        self._kill()

    def _wait_until_ready(self, specs: Sequence[StageSpec]) -> None:
        grouped = specs[0].transport != "pipe" and len(specs) > 1
        progress = Progress(stage.process for stage in self._stages)
        if grouped:
            port = self._receive_from_loading(0, progress)[0].value
            self._send_number(self._stages[1:], port)
        for stage in range(len(specs)):
            self._receive_from_loading(stage, progress)

    def _send_number(self, stages: Sequence[StageHandle], number: int) -> None:
        for stage in stages:
            try:
                stage.control.send_bytes(number.to_bytes(8, "little"))
            except OSError:
                self._fail()

    def _require_alive(self) -> None:
        if self._lost is not None:
            raise BackendLostError(self._lost)

    def _fail(self, received: Mapping[int, FailureReport] = MappingProxyType({})) -> NoReturn:
        self._fail_with(describe_failure(self._stages, received))

    def _fail_hanging(self, when: str = "") -> NoReturn:
        self._fail_with(describe_hang(self._stages, self._timeout_s, f"{self._label}.timeout_s{when}"))

    def _fail_with(self, reason: str) -> NoReturn:
        """Ends all stages. `reason` is also what every later call is refused with."""
        self._lost = reason
        self._kill()
        raise BackendLostError(reason)

    def _kill(self) -> None:
        for stage in self._stages:
            stage.process.kill()
        join_processes([stage.process for stage in self._stages], LAST_REPORT_S)
        for stage in self._stages:
            for part in (stage.reports, stage.control, stage.process):
                part.close()
        if self._to_first is not None:
            self._to_first.close()
        self._to_first = None
        self._stages.clear()


def start_processes(specs: Sequence[StageSpec], label: str, handles: list[StageHandle]) -> Connection:
    """`StartStages` on this machine: children of this process, and pipes between them. `specs` may be those of the last
    stages only."""
    inboxes = [Pipe(duplex=False) for _ in specs]  # (read, write)
    given: list[Connection] = []
    try:
        for place, spec in enumerate(specs):
            reports, control = (Pipe(duplex=False) for _ in range(2))
            inbox, outbox = inboxes[place][0], None if spec.is_last else inboxes[place + 1][1]
            given += [inbox, reports[1], control[0], *([outbox] if outbox else [])]
            process = spawn_stage(spec, inbox, outbox, reports[1], control[0])
            handles.append(StageHandle(label, spec, process, reports[0], control[1], deque()))
    finally:
        for connection in given:  # else a worker's death would not close its pipes
            connection.close()
    return inboxes[0][1]


def spawn_stage(
    spec: StageSpec, inbox: Connection, outbox: Connection | None, reports: Connection, control: Connection
) -> LocalProcess:
    """A stage's process, with its ends of these connections; the caller closes its own copies of them."""
    stacks, printed = Pipe(duplex=False)
    pipes = StagePipes(inbox, outbox, reports, control, printed)
    process = child_process(run_stage, spec, pipes, name=f"spdbench-stage-{spec.index}")
    with printed, _signals_wait():
        process.start()
    return LocalProcess(process, stacks)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Delays what Ctrl-C and SIGTERM do: a child whose parent ends while it sends the child its arguments prints a long
    traceback."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals anyway
        yield
        return
    came: list[int] = []
    before = {kind: signal.signal(kind, lambda number, _: came.append(number)) for kind in _ENDINGS}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        for number in came:
            signal.raise_signal(number)
