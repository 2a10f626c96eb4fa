"""Stage workers as the controller holds them: started, spoken to, watched, ended.

Every wait has a limit, and whoever dies, hangs or fails is named with its traceback. Must not know schedules, tokens
or drafts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import MappingProxyType
from typing import NamedTuple, NoReturn, Self

from torch.multiprocessing import get_context

from spdbench.errors import BackendLostError
from spdbench.pipeline.messages import Header, Kind, pack, unpack
from spdbench.pipeline.progress import Progress
from spdbench.pipeline.worker import LOAD_TIMEOUT_S, StagePipes, StageSpec, run_stage

SURELY_FITS = 16384
"""Bytes that an empty pipe takes at once on any system."""
LAST_WORDS_S = 2.0
"""How long a failing stage may take to say why, and its neighbours to notice."""


WAITS = re.compile(r'(transport\.py", line \d+ in (receive|rows|send|_write)|worker\.py", line \d+ in _join_group)\n')
"""A stack in whose midst a stage waits for a neighbour."""
LOOK_EVERY_S = 0.5
"""How often loading stages are looked at."""

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Held:
    """One worker, whose pipeline is `label`'s, and the controller's ends of its pipes. `unread` are reports that came
    while another stage's was awaited."""

    label: str
    spec: StageSpec
    process: SpawnProcess
    report: Connection
    news: Connection
    stacks: Connection
    unread: deque[tuple[Header, bytes]]

    @property
    def name(self) -> str:
        layers = self.spec.layers
        where = f"layers {layers.start} to {layers.stop - 1}, process {self.process.pid}"
        return f"stage {self.spec.index} of {self.spec.num_stages} of {self.label} ({where})"


class _Words(NamedTuple):
    """A failing stage's traceback; `of_neighbour`: of what became of the rows that it exchanges with another."""

    text: str
    of_neighbour: bool


class StageWorkers:
    """The processes of a pipeline, whose owner is called `label`. Use as a context, or call `close`."""

    def __init__(self, specs: Sequence[StageSpec], timeout_s: float, label: str = "spd") -> None:
        self._timeout_s = timeout_s
        self._label = label
        self._held: list[_Held] = []
        self._waiter = select.poll()
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
        message = pack(header, payload)
        if len(message) > SURELY_FITS:
            self._send_long(self._first, message)
            return
        try:
            self._first.send_bytes(message)
        except OSError:
            self._fail()

    def _send_long(self, first: Connection, message: bytes) -> None:
        """A pipe may not take it all before stage 0 reads, who may hang."""
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
            self._fail_hanging(self._timeout_s)

    def spread(self, epoch: int) -> None:
        """Tells every stage that nodes of older epochs are stale."""
        self._require_life()
        self._tell(self._held, epoch)

    def receive(self, stage: int) -> tuple[Header, bytes]:
        """The next report of a stage.

        Raises:
            BackendLostError: a stage died, failed, or did not answer in time.
        """
        self._require_life()
        held, deadline = self._held[stage], time.monotonic() + self._timeout_s
        while not held.unread:
            if not self._hear(held, deadline - time.monotonic()):
                self._fail_hanging(self._timeout_s)
        return held.unread.popleft()

    def _receive_from_loading(self, stage: int, progress: Progress) -> tuple[Header, bytes]:
        """As `receive`. Loading takes as long as it takes, while somebody gets on with it."""
        held, deadline = self._held[stage], time.monotonic() + LOAD_TIMEOUT_S
        while not held.unread:
            if self._hear(held, LOOK_EVERY_S):
                continue
            if progress.silence_s > self._timeout_s:
                self._fail_hanging(self._timeout_s, f"{self._label}.timeout_s; it was loading")
            if time.monotonic() > deadline:
                self._fail_hanging(LOAD_TIMEOUT_S, "the limit for loading")
        return held.unread.popleft()

    def _hear(self, wanted: _Held, limit_s: float) -> bool:
        """Reads what stages report, whichever do, within `limit_s`; False if none does. A stage whose report nobody
        took, such as logits of a token that was dropped, would stop, and with it those that have rows for it."""
        ready = dict(self._waiter.poll(max(0.0, limit_s) * 1e3))
        speaking = [held for held in self._held if held.report.fileno() in ready]
        if wanted not in speaking and any(held.process.sentinel in ready for held in self._held):
            self._fail()
        for held in speaking:
            held.unread.append(self._read(held))
        return bool(ready)

    def _read(self, held: _Held) -> tuple[Header, bytes]:
        try:
            header, payload = unpack(held.report.recv_bytes())
        except (EOFError, OSError):
            self._fail()
        if header.kind == Kind.FAILED:
            self._fail({held.spec.index: _Words(payload.decode(errors="replace"), bool(header.flag))})
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
                self._held.append(_Held(self._label, spec, process, report[0], news[1], stacks[0], deque()))
        finally:
            for connection in given:  # else a worker's death would not close its pipes
                connection.close()
        for held in self._held:
            self._waiter.register(held.report.fileno(), select.POLLIN)
            self._waiter.register(held.process.sentinel, select.POLLIN)  # any death ends the wait for any stage

    def _wait_until_ready(self, specs: Sequence[StageSpec]) -> None:
        grouped = specs[0].transport != "pipe" and len(specs) > 1
        progress = Progress(self.process_ids)
        if grouped:
            port = self._receive_from_loading(0, progress)[0].value
            self._tell(self._held[1:], port)
        for stage in range(len(specs)):
            self._receive_from_loading(stage, progress)

    def _tell(self, stages: Sequence[_Held], number: int) -> None:
        for held in stages:
            try:
                held.news.send_bytes(number.to_bytes(8, "little"))
            except OSError:
                self._fail()

    def _require_life(self) -> None:
        if self._lost is not None:
            raise BackendLostError(self._lost)

    def _fail(self, heard: Mapping[int, _Words] = MappingProxyType({})) -> NoReturn:
        """A pipe broke, or a stage failed: says whose fault it was, as far as can be known, and ends all others.
        `heard` are last words that were read already."""
        if all(words.of_neighbour for words in heard.values()):
            _join([held.process for held in self._held], LAST_WORDS_S, at_least_one=True)
        words = {**{held.spec.index: _last_words(held.report) for held in self._held}, **heard}
        for held in self._held:
            if (said := words[held.spec.index]) and not said.of_neighbour:
                self._fail_with(f"{held.name} failed:\n{said.text}")
        for held in self._held:
            code = held.process.exitcode
            if code is not None and code < 0:
                hint = " (the system kills with it when memory runs out)" if -code == signal.SIGKILL else ""
                self._fail_with(f"{held.name} was killed by {signal.Signals(-code).name}{hint}")
        for held in self._held:
            if said := words[held.spec.index]:
                self._fail_with(f"{held.name} failed:\n{said.text}")
        for held in self._held:
            if held.process.exitcode is not None:
                self._fail_with(f"{held.name} ended with exit code {held.process.exitcode}")
        self._fail_with("a stage closed its pipes and lives on")

    def _fail_hanging(self, limit_s: float, which: str | None = None) -> NoReturn:
        """Nobody died, but an answer is overdue: the first stage that waits neither for a message nor for its successor
        to take one is at fault."""
        which = which or f"{self._label}.timeout_s"
        for held in self._held:
            with contextlib.suppress(OSError, TypeError):
                os.kill(held.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
        time.sleep(0.3)
        for held in self._held:
            stack = _drain(held.stacks)
            if not WAITS.search(stack):
                at = stack or "  (it does not even answer signals: stopped, or stuck in the kernel)"
                self._fail_with(f"{held.name} gave no answer within {limit_s:g} s ({which}). It is at:\n{at}")
        self._fail_with(f"no stage gave an answer within {limit_s:g} s ({which}), and all wait for messages")

    def _fail_with(self, why: str) -> NoReturn:
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
        if at_least_one and len(alive) < len(processes):
            left, at_least_one = min(left, 0.5), False
            deadline = time.monotonic() + left
        multiprocessing.connection.wait([process.sentinel for process in alive], left)


def _last_words(report: Connection) -> _Words | None:
    """What a stage sent before it ended, if it did."""
    with contextlib.suppress(EOFError, OSError):
        while report.poll(0):
            header, payload = unpack(report.recv_bytes())
            if header.kind == Kind.FAILED:
                return _Words(payload.decode(errors="replace"), bool(header.flag))
    return None


def _drain(stacks: Connection) -> str:
    with contextlib.suppress(EOFError, OSError):
        if stacks.poll(0):
            return os.read(stacks.fileno(), 1 << 16).decode(errors="replace")
    return ""
