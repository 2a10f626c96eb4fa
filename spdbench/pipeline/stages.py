"""Stage workers as the controller holds them: started, spoken to, watched, ended.

Every wait has a limit, and whoever dies, hangs or fails is named with its traceback. Must not know schedules, tokens
or drafts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Self

from torch.multiprocessing import get_context

from spdbench.errors import BackendLostError
from spdbench.pipeline.messages import Header, Kind, pack, unpack
from spdbench.pipeline.worker import StagePipes, StageSpec, run_stage

LOAD_TIMEOUT_S = 600.0
LAST_WORDS_S = 2.0
"""How long a failing stage may take to say why, and its neighbours to notice."""


_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Held:
    """One worker, and the controller's ends of its pipes."""

    spec: StageSpec
    process: SpawnProcess
    report: Connection
    news: Connection
    stacks: Connection
    waiter: select.poll

    @property
    def name(self) -> str:
        layers = self.spec.layers
        where = f"layers {layers.start} to {layers.stop - 1}, process {self.process.pid}"
        return f"stage {self.spec.index} of {self.spec.num_stages} ({where})"


class StageWorkers:
    """The processes of a pipeline. Use as a context, or call `close`."""

    def __init__(self, specs: Sequence[StageSpec], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._held: list[_Held] = []
        self._first: Connection | None = None
        self._lost: str | None = None
        try:
            self._start(specs)
            self._wait_until_ready(specs)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        return [held.process.pid or 0 for held in self._held]

    def send(self, header: Header, payload: bytes = b"") -> None:
        """To stage 0, and by way of it to those behind it."""
        self._require_life()
        assert self._first is not None
        try:
            self._first.send_bytes(pack(header, payload))
        except OSError:
            self._fail()

    def spread(self, epoch: int) -> None:
        """Tells every stage that nodes of older epochs are stale."""
        self._require_life()
        news = epoch.to_bytes(8, "little")
        for held in self._held:
            try:
                held.news.send_bytes(news)
            except OSError:
                self._fail()

    def receive(self, stage: int, timeout_s: float | None = None) -> tuple[Header, bytes]:
        """The next report of a stage.

        Raises:
            BackendLostError: a stage died, failed, or did not answer in time.
        """
        self._require_life()
        held = self._held[stage]
        limit = self._timeout_s if timeout_s is None else timeout_s
        if not held.waiter.poll(limit * 1e3):
            self._fail_hanging(limit)
        try:
            header, payload = unpack(held.report.recv_bytes())
        except (EOFError, OSError):
            self._fail()
        if header.kind == Kind.FAILED:
            self._fail_with(f"{held.name} failed:\n{payload.decode(errors='replace')}")
        return header, payload

    def close(self) -> None:
        """Ends all workers, politely where they listen. May be called twice."""
        if self._first is not None and self._lost is None:
            with contextlib.suppress(OSError):
                self._first.send_bytes(pack(Header(Kind.STOP)))
            _join([held.process for held in self._held], LAST_WORDS_S)
        self._kill()

    def _start(self, specs: Sequence[StageSpec]) -> None:
        context = get_context("spawn")
        inboxes = [context.Pipe(duplex=False) for _ in specs]  # (read, write)
        self._first = inboxes[0][1]
        parent = os.getpid()
        given: list[Connection] = []
        try:
            for spec in specs:
                report, news, stacks = (context.Pipe(duplex=False) for _ in range(3))
                outbox = None if spec.is_last else inboxes[spec.index + 1][1]
                pipes = StagePipes(inboxes[spec.index][0], outbox, report[1], news[0], stacks[1])
                given += [pipes.inbox, pipes.report, pipes.news, pipes.stacks, *([outbox] if outbox else [])]
                process = context.Process(
                    target=run_stage, args=(spec, pipes, parent), name=f"spdbench-stage-{spec.index}", daemon=True
                )
                with _signals_wait():
                    process.start()
                waiter = select.poll()
                waiter.register(report[0], select.POLLIN)
                self._held.append(_Held(spec, process, report[0], news[1], stacks[0], waiter))
        finally:
            for connection in given:  # else a worker's death would not close its pipes
                connection.close()

    def _wait_until_ready(self, specs: Sequence[StageSpec]) -> None:
        grouped = specs[0].transport != "pipe" and len(specs) > 1
        if grouped:
            port = self.receive(0, LOAD_TIMEOUT_S)[0].value
            for held in self._held[1:]:
                held.news.send_bytes(port.to_bytes(8, "little"))
        for stage in range(len(specs)):
            self.receive(stage, LOAD_TIMEOUT_S)

    def _require_life(self) -> None:
        if self._lost is not None:
            raise BackendLostError(self._lost)

    def _fail(self) -> None:
        """A pipe broke: says whose fault it was, as far as can be known, and ends all others."""
        _join([held.process for held in self._held], LAST_WORDS_S, at_least_one=True)
        for held in self._held:
            if words := _last_words(held.report):
                self._fail_with(f"{held.name} failed:\n{words}")
        for held in self._held:
            code = held.process.exitcode
            if code is not None and code < 0:
                hint = " (the system kills with it when memory runs out)" if -code == signal.SIGKILL else ""
                self._fail_with(f"{held.name} was killed by {signal.Signals(-code).name}{hint}")
        for held in self._held:
            if held.process.exitcode is not None:
                self._fail_with(f"{held.name} ended with exit code {held.process.exitcode}")
        self._fail_with("a stage closed its pipes and lives on")

    def _fail_hanging(self, limit_s: float) -> None:
        """Nobody died, but an answer is overdue: the first stage that is not waiting for a message is at fault."""
        for held in self._held:
            with contextlib.suppress(OSError, TypeError):
                os.kill(held.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
        time.sleep(0.3)
        for held in self._held:
            stack = _drain(held.stacks)
            if "in receive" not in stack:
                at = stack or "  (it does not even answer signals: stopped, or stuck in the kernel)"
                self._fail_with(f"{held.name} gave no answer within {limit_s:g} s (spd.timeout_s). It is at:\n{at}")
        self._fail_with(f"no stage gave an answer within {limit_s:g} s (spd.timeout_s), and all wait for messages")

    def _fail_with(self, why: str) -> None:
        self._lost = why
        self._kill()
        raise BackendLostError(why)

    def _kill(self) -> None:
        for held in self._held:
            if held.process.is_alive():
                held.process.kill()
        _join([held.process for held in self._held], LAST_WORDS_S)
        for held in self._held:
            for connection in (held.report, held.news, held.stacks):
                connection.close()
        if self._first is not None:
            self._first.close()
        self._first = None
        self._held.clear()


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Puts off what Ctrl-C and SIGTERM do: a child whose parent stops while telling it what to be complains loudly."""
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


def _join(processes: Sequence[SpawnProcess], limit_s: float, *, at_least_one: bool = False) -> None:
    """Waits until all have ended, or the first of them has and its neighbours had time to notice."""
    deadline = time.monotonic() + limit_s
    while alive := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        multiprocessing.connection.wait([process.sentinel for process in alive], left)
        if at_least_one and len(alive) < len(processes):
            deadline = min(deadline, time.monotonic() + 0.5)
            at_least_one = False


def _last_words(report: Connection) -> str:
    """The traceback that a stage sent before it ended, if it did."""
    with contextlib.suppress(EOFError, OSError):
        while report.poll(0):
            header, payload = unpack(report.recv_bytes())
            if header.kind == Kind.FAILED:
                return payload.decode(errors="replace")
    return ""


def _drain(stacks: Connection) -> str:
    with contextlib.suppress(EOFError, OSError):
        if stacks.poll(0):
            return os.read(stacks.fileno(), 1 << 16).decode(errors="replace")
    return ""
