"""A stage in a process of its own: receive, forward, send, until told to stop.

Loads its own layers and nothing else of the model. Knows its place in the chain; must not know who drafts, how tokens
are judged, or which of its work will be kept.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from spdbench.models.cpu.argmax import argmax
from spdbench.models.cpu.memory import return_freed_memory
from spdbench.models.cuda.captured_decoder import captured_on_gpu
from spdbench.models.interface import CancelledForwardError, TargetCache, TargetDecoder
from spdbench.models.target import LayerSource
from spdbench.pipeline.messages import Header, Kind, pack, to_bytes
from spdbench.pipeline.transport import (
    DistributedLink,
    Link,
    LinkClosedError,
    PipeLink,
    RowTransport,
    find_store,
    host_store,
    join_group,
)

LOAD_TIMEOUT_S = 600.0
WARM_UP_ROWS = 72
"""More than compiled steps take at once, so that both ways of computing are used, where the model has positions."""

TARGET, HEAD, HOST = range(3)
SPAN_KINDS = ("target", "head", "host")
SPAN_COLUMNS = 6
"""Kind, start, end, position, epoch, cycle: one row of int64 a span."""


@dataclass(frozen=True)
class StageSpec:
    """All that a stage has to know, as plain data. `hidden_indices` are the hidden states that it reports, `cores` the
    processors that it may use, None for all."""

    index: int
    num_stages: int
    layers: range
    source: LayerSource
    device: str
    threads: int
    cores: frozenset[int] | None
    hidden_indices: tuple[int, ...]
    transport: RowTransport
    timeout_s: float

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


@dataclass(frozen=True)
class StagePipes:
    """A stage's ends: messages in and out, reports to the controller, news of epochs from it, a way out for stacks.

    `outbox` is None for the last stage.
    """

    inbox: Connection
    outbox: Connection | None
    report: Connection
    news: Connection
    stacks: Connection


def run_stage(spec: StageSpec, pipes: StagePipes, parent: int) -> None:
    """The life of a stage's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the controller ends its stages
    die_with(parent)
    faulthandler.register(signal.SIGUSR1, file=pipes.stacks.fileno(), all_threads=False)
    try:
        if spec.cores is not None:
            os.sched_setaffinity(0, spec.cores)
        torch.set_num_threads(spec.threads)
        _Stage(spec, pipes).serve()
    except LinkClosedError as error:  # another process has gone; the controller knows which
        if error.__cause__ is not None:
            with contextlib.suppress(OSError):
                pipes.report.send_bytes(pack(Header(Kind.FAILED, flag=1), traceback.format_exc().encode()))
        sys.exit(0)
    except BaseException:
        pipes.report.send_bytes(pack(Header(Kind.FAILED), traceback.format_exc().encode()))
        sys.exit(1)


def die_with(parent: int) -> None:
    """This process is to end with its parent, however that ends (Linux: prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Stage:
    def __init__(self, spec: StageSpec, pipes: StagePipes) -> None:
        self._spec = spec
        self._pipes = pipes
        self._news = select.poll()
        self._news.register(pipes.news, select.POLLIN)
        self._epoch = 0
        self._greedy = False
        self._spans: list[tuple[int, ...]] = []
        self._free_ns = 0
        self._cache: TargetCache | None = None
        self._decoder: TargetDecoder = captured_on_gpu(
            spec.source.load(spec.layers, spec.device), (1,), spec.hidden_indices
        )
        self._on_gpu = self._decoder.device.type == "cuda"
        self._warm_up()
        self._inbox, self._outbox = self._links()

    @torch.inference_mode()
    def serve(self) -> None:
        """Answers messages in order; returns when it is told to stop."""
        self._report(Header(Kind.READY))
        while True:
            header, payload = self._inbox.receive()
            kind = header.kind
            if kind == Kind.NODE:
                self._run_node(header, payload)
            elif kind == Kind.PROMPT:
                self._run_prompt(header, payload)
            else:
                if self._outbox is not None:
                    self._outbox.send(header)
                if kind == Kind.STOP:
                    return
                self._report_spans()
            self._free_ns = time.perf_counter_ns()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """A few rows and one row, so that what a first use compiles or allocates counts as loading."""
        decoder, spec = self._decoder, self._spec
        width = decoder.config.hidden_size
        num_rows = max(1, min(WARM_UP_ROWS, decoder.config.max_positions - 1))
        rows_SM = torch.zeros(num_rows, width, dtype=decoder.dtype, device=decoder.device)
        cache = decoder.new_cache(num_rows + 1, spec.layers)
        for some_SM in (rows_SM, rows_SM[:1]):
            hidden_SM, _ = decoder.forward(some_SM, cache.length, cache, spec.layers, spec.hidden_indices)
        if spec.is_last:
            decoder.logits(hidden_SM)
        self._wait_for_device()
        return_freed_memory()

    def _links(self) -> tuple[Link, Link | None]:
        spec, pipes, decoder = self._spec, self._pipes, self._decoder
        sizes = decoder.config.hidden_size, decoder.dtype, decoder.device
        if spec.transport == "pipe" or spec.num_stages == 1:
            return PipeLink(pipes.inbox, *sizes), PipeLink(pipes.outbox, *sizes) if pipes.outbox else None
        self._join_group()
        host = spec.transport == "gloo"
        inbox: Link = PipeLink(pipes.inbox, *sizes)
        if not spec.is_first:
            inbox = DistributedLink(pipes.inbox, *sizes, spec.index - 1, host=host)
        outbox = DistributedLink(pipes.outbox, *sizes, spec.index + 1, host=host) if pipes.outbox else None
        return inbox, outbox

    def _join_group(self) -> None:
        """Stage 0 holds the group's store and tells the controller its port, who tells all others."""
        spec = self._spec
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self._on_gpu:
            torch.cuda.set_device(self._decoder.device)
        if spec.is_first:
            store = host_store(spec.num_stages)
            self._report(Header(Kind.READY, value=store.port))
        else:
            port = int.from_bytes(self._pipes.news.recv_bytes(), "little")
            store = find_store(port, spec.num_stages)
        patience_s = LOAD_TIMEOUT_S + spec.timeout_s  # more than the controller's, which knows who is at fault
        join_group(store, spec.transport, spec.index, spec.num_stages, patience_s)

    def _run_prompt(self, header: Header, payload: bytes) -> None:
        spec, decoder = self._spec, self._decoder
        self._read_news()  # answers of one token bring news and no nodes: their pipe must not fill up
        self._spans.clear()
        self._epoch, self._greedy = header.epoch, bool(header.flag)
        self._cache = decoder.new_cache(header.value, spec.layers)
        if spec.is_first:
            rows_SM = decoder.embed(decoder.ids(np.frombuffer(payload, np.int64).tolist()))
        else:
            rows_SM = self._inbox.rows(header, payload)
        rows_SM, states = decoder.forward(rows_SM, 0, self._cache, spec.layers, spec.hidden_indices)
        if self._outbox is not None:
            self._outbox.send(header._replace(num_rows=len(rows_SM)), rows_SM)
        self._answer(header, states, self._logits(rows_SM[-1:]) if spec.is_last else None)

    def _run_node(self, header: Header, payload: bytes) -> None:
        spec, decoder, cache = self._spec, self._decoder, self._cache
        assert cache is not None
        if spec.is_first:
            rows_SM = decoder.embed(decoder.ids((header.value,)))
        else:
            rows_SM = self._inbox.rows(header, payload)
        if self._is_stale(header):
            return
        cache.rollback(header.position)
        began = time.perf_counter_ns()
        self._took(HOST, max(header.at_ns, self._free_ns), began, header)
        try:
            rows_SM, states = decoder.forward(
                rows_SM,
                header.position,
                cache,
                spec.layers,
                spec.hidden_indices,
                cancelled=partial(self._is_stale, header),
            )
        except CancelledForwardError:
            self._took(TARGET, began, time.perf_counter_ns(), header)
            return
        self._wait_for_device()
        computed = time.perf_counter_ns()
        self._took(TARGET, began, computed, header)
        if self._outbox is not None:
            passed_on = header._replace(cycle=header.cycle + 1, num_rows=1, value=-1, at_ns=computed)
            self._outbox.send(passed_on, rows_SM)
        logits = None
        if spec.is_last:
            logits = self._logits(rows_SM)
            judged = time.perf_counter_ns()
            self._took(HEAD, computed, judged, header)
            computed = judged
        if spec.is_last or header.flag or spec.hidden_indices:
            self._answer(header, states, logits)
        self._took(HOST, computed, time.perf_counter_ns(), header)

    def _logits(self, rows_1M: Tensor) -> Tensor:
        """Logits `[V]`, or their argmax `[]` where that is enough, once they are there."""
        logits_V = self._decoder.logits(rows_1M)[0]
        if self._greedy:
            return argmax(logits_V).cpu()
        self._wait_for_device()
        return logits_V

    def _answer(self, header: Header, states: dict[int, Tensor], logits: Tensor | None) -> None:
        """RESULT: the states that are wanted, one behind the other, and the logits in float32."""
        now, value = time.perf_counter_ns(), -1
        payload = b"".join(to_bytes(states[index]) for index in self._spec.hidden_indices)
        if logits is not None and self._greedy:
            value = int(logits)
        elif logits is not None:
            payload += to_bytes(logits.float())
        self._report(header._replace(kind=Kind.RESULT, value=value, at_ns=now), payload)

    def _is_stale(self, header: Header) -> bool:
        """True if a verdict has dropped the node meanwhile."""
        self._read_news()
        return header.epoch < self._epoch

    def _read_news(self) -> None:
        while self._news.poll(0):
            try:
                self._epoch = max(self._epoch, int.from_bytes(self._pipes.news.recv_bytes(), "little"))
            except (EOFError, OSError):
                raise LinkClosedError from None

    def _report_spans(self) -> None:
        table = np.array(self._spans, np.int64).reshape(-1, SPAN_COLUMNS)
        self._report(Header(Kind.SPANS), table.tobytes())
        return_freed_memory()  # nobody waits for this stage now

    def _report(self, header: Header, payload: bytes = b"") -> None:
        try:
            self._pipes.report.send_bytes(pack(header, payload))
        except OSError:
            raise LinkClosedError from None

    def _took(self, kind: int, start_ns: int, end_ns: int, header: Header) -> None:
        self._spans.append((kind, start_ns, end_ns, header.position, header.epoch, header.cycle))

    def _wait_for_device(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._decoder.device)
