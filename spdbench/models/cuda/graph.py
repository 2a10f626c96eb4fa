"""Work that is recorded once and replayed: a CUDA graph on a GPU, and on a CPU the very same function, called again.

Work takes no arguments and returns nothing: it reads and writes tensors that stay where they are, and what it needs
anew each time is put into these before. On a CPU that is a rehearsal: all but the capture itself happens as on a GPU.
Must not know what the work computes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], None]

WARM_UPS = 2
"""Runs before a capture, in which libraries choose their algorithms and allocate what they keep."""


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    """One that takes no time and no times."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class GraphRunner:
    """Records work for one device. All its graphs share their memory, so that none may run beside another; what is to
    outlive a replay belongs into tensors that were made outside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = device.type == "cuda"
        self._side_streams: list[torch.cuda.Stream] = []
        if self.captures:
            self._stream = new_stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """A replay of `work`, which runs a few times meanwhile with whatever its tensors hold."""
        if not self.captures:
            work()
            return work
        return self._captured(work)

    def side_by_side(self, works: Sequence[Work]) -> None:
        """Runs works that do not touch each other's tensors, each on a stream of its own, and joins them. To be called
        from within recorded work; on a CPU they run one after the other."""
        if not self.captures:
            for work in works:
                work()
            return
        here = torch.cuda.current_stream(self.device)
        while len(self._side_streams) < len(works) - 1:
            self._side_streams.append(new_stream(self.device))
        fork, joins = new_event(), []
        fork.record(here)
        for stream, work in zip(self._side_streams, works[1:], strict=False):
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                work()
            join = new_event()
            join.record(stream)
            joins.append(join)
        for work in works[:1]:
            work()
        for join in joins:
            here.wait_event(join)

    def _captured(self, work: Work) -> Work:
        with torch.cuda.device(self.device):
            # Warmed up on the stream of the capture, since libraries keep a workspace for each stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                except BaseException:
                    with suppress(RuntimeError):  # it only says that the capture is no longer valid
                        graph.capture_end()
                    raise
                graph.capture_end()
            torch.cuda.synchronize()
        return graph.replay


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: freeing a graph or an event in the middle of a capture breaks it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Upload:
    """Numbers on their way to the device, into one tensor `words` that stays in place. Nobody waits: the host's copies
    take turns, and one is written again when the device has read it."""

    COPIES = 4

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.words = torch.zeros(count, dtype=dtype, device=device)
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._hosts = [torch.zeros(count, dtype=dtype, pin_memory=self._on_gpu) for _ in range(self.COPIES)]
        self._views = [host.numpy() for host in self._hosts]
        self._events = [new_event() for _ in self._hosts] if self._on_gpu else []
        self._next = 0

    def send(self, numbers: Sequence[int] | Sequence[float]) -> None:
        """Puts `numbers` into `words`, behind the work that was launched so far."""
        turn, self._next = self._next, (self._next + 1) % self.COPIES
        if self._on_gpu and not self._events[turn].query():  # type: ignore[no-untyped-call]
            self._events[turn].synchronize()
        self._views[turn][:] = np.asarray(numbers)
        self.words.copy_(self._hosts[turn], non_blocking=True)
        if self._on_gpu:
            self._events[turn].record(torch.cuda.current_stream(self._device))


class Readback:
    """Numbers on their way to the host. `start` asks for them behind the work that was launched so far and returns a
    ticket; `read` waits for this ticket alone, not for what was launched since. Of the newest tickets `COPIES` hold."""

    COPIES = 4

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._hosts = [torch.zeros(count, dtype=torch.long, pin_memory=self._on_gpu) for _ in range(self.COPIES)]
        self._events = [new_event() for _ in self._hosts] if self._on_gpu else []
        self._next = 0

    def start(self, numbers: Tensor) -> int:
        """`numbers` are int64, as many as were announced."""
        ticket, self._next = self._next, (self._next + 1) % self.COPIES
        self._hosts[ticket].copy_(numbers, non_blocking=True)
        if self._on_gpu:
            self._events[ticket].record(torch.cuda.current_stream(self._device))
        return ticket

    def read(self, ticket: int) -> list[int]:
        if self._on_gpu:
            self._events[ticket].synchronize()
        found: list[int] = self._hosts[ticket].tolist()
        return found
