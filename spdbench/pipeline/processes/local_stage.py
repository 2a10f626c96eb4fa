"""The first stage in the controller's own process, where it takes turns with the drafter: n processes for n stages, and
n devices instead of n + 1.

Stage 0 is the same `worker.Stage` as in a process of its own. A message to it is handled at once, what it reports is
kept in memory, and what it passes on goes to stage 1, through a pipe or a connection to another rank. Source: SPD's
version 12 heads, whose first stage is shallow to leave the drafter its time.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import cast

from spdbench.pipeline.processes.messages import Header, unpack
from spdbench.pipeline.processes.stages import PIPE_BUFFER_BYTES, StageWorkers, StartStages
from spdbench.pipeline.processes.transport import StagePipes
from spdbench.pipeline.processes.worker import Stage, StageSpec

LOOK_EVERY_S = 0.05
"""How often reports are read while a long message is on its way to stage 1."""
FIONREAD, TIOCOUTQ = 0x541B, 0x5411
"""ioctl(2) of Linux: bytes in a pipe that were not read yet, and bytes that a socket has not got rid of."""


class StageWorkersWithLocal(StageWorkers):
    """Processes for all stages but the first, which this process runs whenever it gets a message."""

    has_local_stage = True

    def __init__(
        self, specs: Sequence[StageSpec], timeout_s: float, label: str, start: StartStages | None = None
    ) -> None:
        super().__init__(specs[1:], timeout_s, label, start)
        self._unread: deque[tuple[Header, bytes]] = deque()
        self._control: tuple[Connection, ...] = multiprocessing.Pipe(duplex=False)
        try:
            pipes = StagePipes(
                inbox=cast(Connection, None),  # its messages come by `send`
                outbox=cast(Connection, _Sender(self._pass_on)),
                reports=cast(Connection, _Sender(lambda message: self._unread.append(unpack(message)))),
                control=self._control[0],
                stacks=cast(Connection, None),
            )
            self._local = Stage(specs[0], pipes)
        except BaseException:
            self.close()
            raise

    def send(self, header: Header, payload: bytes = b"") -> None:
        self._require_alive()
        self._local.handle(header, payload)

    def announce_root(self, root: int) -> None:
        super().announce_root(root)
        self._control[1].send_bytes(root.to_bytes(8, "little"))

    def receive(self, stage: int) -> tuple[Header, bytes]:
        """As of all workers; stage 0 has reported what it had to before its message was handled."""
        return super().receive(stage - 1) if stage else self._unread.popleft()

    def close(self) -> None:
        super().close()
        for connection in self._control:
            connection.close()

    def _pass_on(self, message: bytes) -> None:
        """From stage 0 to stage 1. Where the pipe may not take it at once, reports are read meanwhile: stage 1 may be
        unable to go on before a report of its own is read."""
        first = self._to_first
        assert first is not None
        if _pending_bytes(first) + len(message) <= PIPE_BUFFER_BYTES:
            try:
                first.send_bytes(message)
            except OSError:
                self._fail()
            return
        writer = threading.Thread(target=_write, args=(first, message), daemon=True)
        writer.start()
        deadline = time.monotonic() + self._timeout_s
        while writer.is_alive():
            if not self._read_reports(self._stages[0], LOOK_EVERY_S) and time.monotonic() > deadline:
                self._fail_hanging()


def _pending_bytes(pipe: Connection) -> int:
    """Bytes in a pipe or connection that were not read yet; more than it takes where the system does not say."""
    count, asked = array("i", [0]), TIOCOUTQ if stat.S_ISSOCK(os.fstat(pipe.fileno()).st_mode) else FIONREAD
    try:
        fcntl.ioctl(pipe.fileno(), asked, count)
    except OSError:
        return PIPE_BUFFER_BYTES + 1
    return count[0]


def _write(pipe: Connection, message: bytes) -> None:
    try:
        pipe.send_bytes(message)
    except (OSError, TypeError):  # its reader has gone, or it was closed meanwhile; the wait for reports finds that out
        return


class _Sender:
    """What a stage uses of the sending end of a pipe."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.send_bytes = write
