"""A rank other than 0: it hosts stages for rank 0, and ends with it.

It waits in one place for all that can happen: a new connection, a question of rank 0 about a stage, a stage's end, the
end of rank 0. A stage is a child process that runs `worker.run_stage`, as on one machine; only its pipes are
connections between ranks.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from spdbench.errors import BackendLostError, InputError
from spdbench.pipeline.processes.stage_faults import STACK_S, LocalProcess, join_processes
from spdbench.pipeline.processes.stages import spawn_stage
from spdbench.pipeline.processes.worker import StageSpec
from spdbench.pipeline.ranks.job import (
    JOIN_S,
    Job,
    JobStore,
    Purpose,
    RankPlace,
    accept,
    close_quietly,
    connect,
    listen,
    to_json,
)

TERMINATED = 143
PING = b"?"
GOODBYE = "terminated"
"""What a rank sends that is ended by SIGTERM: not the first to end, so not the one to name."""
END_S = 2.0


@dataclass(frozen=True)
class StartStage:
    """Rank 0's order to start a stage, whose connections are here already but for the one to `next_place`."""

    stage_id: str
    spec: StageSpec
    next_place: RankPlace | None
    next_id: str


class Started(NamedTuple):
    """The answer to an order: a process id, or why there is none."""

    pid: int
    problem: str = ""


class Question(NamedTuple):
    """`stack` or `usage` of a stage; or `end`, which is an order."""

    about: str


class Ended(NamedTuple):
    """A stage's process ended with this exit code."""

    exitcode: int


def serve(job: Job, limit_s: float = JOIN_S) -> int:
    """Hosts stages until rank 0 ends; the exit code of this rank.

    Raises:
        InputError: rank 0's node cannot be reached, or rank 0 does not come.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the job; its end is this rank's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    store = JobStore(job, limit_s)
    listener, place = listen(job)
    with listener:
        store.publish(f"rank/{job.rank}", to_json(place))
        try:
            key = bytes.fromhex(store.read("key", limit_s))
            session = _first_session(listener, key, limit_s)
        except TimeoutError:
            raise InputError(
                f"rank {job.rank} on node {job.node}: rank 0 did not connect within {limit_s:g} s. Its own message "
                f"says why; it has to reach {place.host}:{place.port}."
            ) from None
        return _Host(job, listener, session, key).run()


def _first_session(listener: socket.socket, key: bytes, limit_s: float) -> Connection:
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if wait([listener], left) and (found := accept(listener, key)):
            return found[0]
    raise TimeoutError


class _Host:
    def __init__(self, job: Job, listener: socket.socket, session: Connection, key: bytes) -> None:
        self._job = job
        self._listener = listener
        self._session = session
        self._key = key
        self._arrived: dict[Purpose, Connection] = {}
        self._stages: dict[Connection, LocalProcess | None] = {}  # by the connection on which rank 0 asks about it

    def run(self) -> int:
        """Returns rank 0's exit code when it has ended, so that torchrun on this node ends as on that of rank 0.

        Raises:
            BackendLostError: rank 0 has gone without one.
        """
        try:
            while (code := self._handle_next()) is None:
                pass
            return code
        except SystemExit:  # torchrun ends all ranks of a node after one: only that one may count as lost
            for connection, message in [(self._session, GOODBYE), *((w, Ended(-signal.SIGTERM)) for w in self._stages)]:
                with contextlib.suppress(OSError):
                    connection.send(message)
            raise
        finally:
            for watch in list(self._stages):
                self._end(watch)
            close_quietly(self._session, *self._arrived.values())

    def _handle_next(self) -> int | None:
        """Waits for the next things to happen; rank 0's exit code if it has ended."""
        sentinels = {stage.sentinel: watch for watch, stage in self._stages.items() if stage is not None}
        for ready in wait([self._listener, self._session, *self._stages, *sentinels]):
            if ready is self._session:
                if (code := self._answer_session()) is not None:
                    return code
            elif ready is self._listener:
                self._take_connection()
            elif isinstance(ready, int):
                self._report_end(sentinels[ready])
            elif ready in self._stages:
                self._answer(ready)
        return None

    def _answer_session(self) -> int | None:
        """Answers a ping with this machine's clock; returns the exit code that rank 0 sends at its end."""
        try:
            message = self._session.recv_bytes()
            if message != PING:
                return int(message)
            self._session.send_bytes(b"%d" % time.perf_counter_ns())
        except (EOFError, OSError):
            name = f"rank {self._job.rank} on node {self._job.node}"
            raise BackendLostError(f"{name} lost rank 0: it was killed, or the network to it has gone") from None
        return None

    def _take_connection(self) -> None:
        if (found := accept(self._listener, self._key)) is None:
            return
        connection, purpose = found
        if purpose.kind == "watch":
            self._stages[connection] = None
        else:
            self._arrived[purpose] = connection

    def _answer(self, watch: Connection) -> None:
        """Does what rank 0 asks. Where rank 0 closes the connection, the stage is killed."""
        try:
            asked, stage = watch.recv(), self._stages[watch]
            if isinstance(asked, StartStage):
                watch.send(self._start(asked, watch))
            elif stage is not None and asked.about == "stack":
                stage.print_stack()
                time.sleep(STACK_S)
                watch.send(stage.read_stack())
            elif stage is not None and asked.about == "usage":
                watch.send(stage.usage())
            elif stage is not None:
                stage.kill()  # its end is reported as any other
        except (EOFError, OSError):
            self._end(watch)

    def _start(self, order: StartStage, watch: Connection) -> Started:
        folder = order.spec.source.files.directory
        if not folder.is_dir():
            return Started(
                0,
                f"the model's files are not there ({folder}). Every node needs them at the same path: a shared folder, "
                "or a copy.",
            )
        outbox = None
        try:
            if order.next_place is not None:
                outbox = connect(order.next_place, self._key, Purpose("inbox", order.next_id))
        except OSError as error:
            place = order.next_place
            assert place is not None
            return Started(0, f"cannot reach {place.name} at {place.host}:{place.port} ({error})")
        inbox, reports = (self._arrived.pop(Purpose(kind, order.stage_id)) for kind in ("inbox", "reports"))
        try:
            process = spawn_stage(order.spec, inbox, outbox, reports, reports)
        finally:
            close_quietly(inbox, outbox, reports)
        self._stages[watch] = process
        return Started(process.pid or 0)

    def _report_end(self, watch: Connection) -> None:
        stage = self._stages.pop(watch)
        assert stage is not None
        join_processes([stage], END_S)  # its exit code may come a moment after its end is seen
        with contextlib.suppress(OSError):
            watch.send(Ended(stage.exitcode or 0))
        close_quietly(watch)
        stage.close()

    def _end(self, watch: Connection) -> None:
        if (stage := self._stages.pop(watch, None)) is not None:
            stage.kill()
            join_processes([stage], END_S)
            stage.close()
        close_quietly(watch)
