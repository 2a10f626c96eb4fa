"""Functions captured once and replayed: as CUDA graphs on a GPU; on a CPU the same function is called again.

A captured function reads and writes tensors that stay in place, and never waits for the host: no `.item()`, no boolean
indexing, no shape that depends on values, no tensor made of host numbers. What it needs anew at every call is copied
into its inputs before. A CPU thus rehearses everything but the capture itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], None]
Tensors = tuple[Tensor, ...]

WARM_UPS = 2
"""Runs before a capture, in which libraries choose their algorithms and allocate what they keep."""

MIN_BUCKET = 256


def buckets(capacity: int, at_least: int = 1) -> tuple[int, ...]:
    """Numbers of cache slots that attention is captured for: powers of two and the capacity, from `at_least` on."""
    sizes, size = [], MIN_BUCKET
    while size < capacity:
        sizes.append(size)
        size *= 2
    return tuple(size for size in (*sizes, capacity) if size >= at_least)


def bucket_for(length: int, sizes: Collection[int]) -> int:
    """The smallest bucket that holds `length` slots."""
    return min(size for size in sizes if size >= length)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    """A CUDA event with timing disabled."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class CudaGraphs:
    """Captures work for one device. All its graphs share one memory pool, so no two of them may run at the same time,
    and results that must outlive a replay belong into tensors that were made outside the capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = device.type == "cuda"
        self._side_streams: list[torch.cuda.Stream] = []
        if self.captures:
            self._stream = new_stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> Work:
        """A replay of `work`. The work runs a few times during the capture, on the values its tensors hold then."""
        if not self.captures:
            work()
            return work
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

    def side_by_side(self, works: Sequence[Work]) -> None:
        """Runs works that touch no common tensors, each on a stream of its own, and joins them. To be called from
        within captured work; on a CPU they run one after the other."""
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


class CapturedFunction:
    """`function(bucket, *inputs)`, captured for every bucket of `lengths` over the static tensors `inputs`.

    A call copies the tensors it is given into the inputs, replays the smallest bucket that holds `length` slots, and
    returns the function's results in `outputs`, which all buckets share and which hold until the next call. Results are
    therefore of one shape for all buckets.
    """

    def __init__(
        self,
        graphs: CudaGraphs,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor] = (),
        lengths: Sequence[int] = (0,),
    ) -> None:
        self.inputs = tuple(inputs)
        self._function = function
        with torch.inference_mode():
            # Made outside the graphs: their own memory is overwritten by the next replay of any graph of the pool.
            self.outputs = tuple(result.clone() for result in function(lengths[0], *inputs))
            self._replays = {length: graphs.capture(partial(self._run, length)) for length in lengths}

    def __call__(self, *inputs: Tensor, length: int = 0) -> Tensors:
        """Without `inputs` the static ones are used with the values they hold."""
        for static, given in zip(self.inputs, inputs, strict=bool(inputs)):
            static.copy_(given)
        self._replays[bucket_for(length, self._replays)]()
        return self.outputs

    def _run(self, bucket: int) -> None:
        for output, result in zip(self.outputs, self._function(bucket, *self.inputs), strict=True):
            output.copy_(result)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stops garbage collection: freeing a graph or an event in the middle of a capture breaks the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _PinnedCopies:
    """`COPIES` host tensors used in turn, each with the event of the last copy from or to it; on a CPU without events.
    One copy would make the host wait for the device at every use."""

    COPIES = 4

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._hosts = [torch.zeros(count, dtype=dtype, pin_memory=on_gpu) for _ in range(self.COPIES)]
        self._events = [new_event() for _ in self._hosts] if on_gpu else []
        self._next = 0

    def _copy(self, index: int, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)
        if self._events:
            self._events[index].record(torch.cuda.current_stream(self._device))

    def _take_next(self) -> int:
        index, self._next = self._next, (self._next + 1) % self.COPIES
        return index


class Upload(_PinnedCopies):
    """Host numbers sent to the device, into the tensor `words`, which stays in place. The host does not wait, unless
    the device has not yet read what was sent `COPIES` calls ago."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(count, dtype, device)
        self.words = torch.zeros(count, dtype=dtype, device=device)
        self._views = [host.numpy() for host in self._hosts]

    def send(self, numbers: Sequence[int] | Sequence[float]) -> None:
        """Puts `numbers` into `words`, after the work that was launched so far."""
        index = self._take_next()
        if self._events and not self._events[index].query():  # type: ignore[no-untyped-call]
            self._events[index].synchronize()
        self._views[index][:] = np.asarray(numbers)
        self._copy(index, self.words, self._hosts[index])


class Readback(_PinnedCopies):
    """Device numbers (int64) read by the host. `start` requests a copy, after the work that was launched so far, and
    returns its index; `read` waits for that copy, not for work launched since. The last `COPIES` copies are valid."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__(count, torch.long, device)

    def start(self, numbers: Tensor) -> int:
        copy_index = self._take_next()
        self._copy(copy_index, self._hosts[copy_index], numbers)
        return copy_index

    def read(self, copy_index: int) -> list[int]:
        if self._events:
            self._events[copy_index].synchronize()
        found: list[int] = self._hosts[copy_index].tolist()
        return found
