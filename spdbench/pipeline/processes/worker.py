"""A stage of a pipeline in a process of its own: receive, forward, send, until the controller says stop.

A stage loads its own layers and nothing else of the model. Its inbox delivers messages in order, and it computes each
before it takes the next; there is no barrier between stages.

A node can become stale on its way: when a verdict drops it, the controller sends the id of the new root straight to
every stage, past the inboxes. A stage drops nodes that do not descend from it before it begins with a batch, and the
whole batch before any of its layers if no node is left. A dropped node's rows may already be in the cache, which gives
them up before the next batch (`stage_cache`).

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from spdbench.models.cuda.captured_decoder import captured_on_gpu
from spdbench.models.interface import CancelledForwardError, TargetDecoder
from spdbench.models.layer_ops import next_tokens
from spdbench.models.target import LayerSource
from spdbench.models.torch_utils import return_freed_memory
from spdbench.pipeline.output_head import best_of
from spdbench.pipeline.processes.messages import NODE_BYTES, Header, Kind, pack, pack_nodes, to_bytes, unpack_nodes
from spdbench.pipeline.processes.transport import DistributedLink, Link, LinkClosedError, RowTransport, StagePipes
from spdbench.pipeline.schedule import Node
from spdbench.pipeline.stage_cache import StageCache

LOAD_TIMEOUT_S = 600.0
WARM_UP_ROWS = 72
"""More than the compiled kernels take at once, so that both ways of computing are used, if the model is that long."""

TARGET, HEAD, HOST = range(3)
SPAN_KINDS = ("target", "head", "host")
SPAN_COLUMNS = 5
"""Kind, start, end, batch, cycle: one row of int64 a span."""


@dataclass(frozen=True)
class StageSpec:
    """All that a stage has to know, as plain data. `hidden_indices` are the hidden states that it reports, `cores` the
    processors that it may use, or None for all. `head_ids` are the token ids whose logits the last stage computes, for
    rows that it has reported before; None: of all, and it reports them together with the row's hidden states."""

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
    group_host: str = "127.0.0.1"
    """Where the process group's store is reached: stage 0's machine."""
    clock_offset_ns: int = 0
    """How far the stage's clock is ahead of the controller's; spans and messages carry the controller's time."""
    head_ids: range | None = None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def has_head(self) -> bool:
        return self.is_last and (self.head_ids is None or len(self.head_ids) > 0)


def snapshots_ahead(stage: int, num_stages: int) -> int:
    """How many tokens a stage in a process keeps states to go back by: one more than if all stages moved in step. So it
    may begin with its next token before the verdict; and there it stops, as each verdict lets one token more follow."""
    return num_stages - stage


def run_stage(spec: StageSpec, pipes: StagePipes) -> None:
    """What a stage's process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the controller ends its stages
    faulthandler.register(signal.SIGUSR1, file=pipes.stacks.fileno(), all_threads=False)
    try:
        if spec.cores is not None:
            os.sched_setaffinity(0, spec.cores)
        torch.set_num_threads(spec.threads)
        Stage(spec, pipes).serve()
    except LinkClosedError as error:  # another process has ended; the controller finds out which
        if error.__cause__ is not None:
            with contextlib.suppress(OSError):
                pipes.reports.send_bytes(pack(Header(Kind.FAILED, flag=1), traceback.format_exc().encode()))
        sys.exit(0)
    except BaseException:
        pipes.reports.send_bytes(pack(Header(Kind.FAILED), traceback.format_exc().encode()))
        sys.exit(1)


class Stage:
    """One stage: its layers, the cache of the sequence in work, and its connections."""

    def __init__(self, spec: StageSpec, pipes: StagePipes) -> None:
        self._spec = spec
        self._pipes = pipes
        self._control = select.poll()
        self._control.register(pipes.control, select.POLLIN)
        self._root = 0  # the newest one known here
        self._greedy = False
        self._spans: list[tuple[int, ...]] = []
        self._free_since_ns = 0
        self._cache: StageCache | None = None
        decoder = spec.source.load(spec.layers, spec.device, spec.head_ids)
        self._decoder: TargetDecoder = captured_on_gpu(decoder, (1,), spec.hidden_indices)
        self._on_gpu = self._decoder.device.type == "cuda"
        self._num_snapshots = snapshots_ahead(spec.index, spec.num_stages) if decoder.snapshot_bytes(spec.layers) else 0
        self._warm_up()
        self._inbox, self._outbox = self._links()

    @torch.inference_mode()
    def serve(self) -> None:
        """Handles messages in order; returns after STOP."""
        self._report(Header(Kind.READY))
        while self.handle(*self._inbox.receive()):
            pass

    def handle(self, header: Header, payload: bytes) -> bool:
        """Does what a message asks for; False after STOP."""
        kind = header.kind
        if kind == Kind.BATCH:
            self._run_batch(header, payload)
        elif kind == Kind.PROMPT:
            self._run_prompt(header, payload)
        else:
            if self._outbox is not None:
                self._outbox.send(header)
            if kind == Kind.STOP:
                return False
            self._report_spans()
        self._free_since_ns = self._now()
        return True

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Computes a few rows and one row, so that what a first use compiles or allocates counts as loading."""
        decoder, spec = self._decoder, self._spec
        width = decoder.config.hidden_size
        num_rows = max(1, min(WARM_UP_ROWS, decoder.config.max_positions - 1))
        rows_SM = torch.zeros(num_rows, width, dtype=decoder.dtype, device=decoder.device)
        cache = decoder.new_cache(num_rows + 1, spec.layers)
        for part_SM in (rows_SM, rows_SM[:1]):
            hidden_SM, _ = decoder.forward(part_SM, cache.length, cache, spec.layers, spec.hidden_indices)
        if spec.has_head:
            decoder.logits(hidden_SM)
        self._wait_for_device()
        return_freed_memory()

    def _links(self) -> tuple[Link, Link | None]:
        spec, pipes, decoder = self._spec, self._pipes, self._decoder
        sizes = decoder.config.hidden_size, decoder.dtype, decoder.device
        in_group = spec.transport != "pipe" and spec.num_stages > 1
        if in_group:
            self._join_group()

        def link(connection: Connection, peer: int) -> Link:
            if not in_group or peer < 0:  # stage 0 has messages from the controller
                return Link(connection, *sizes)
            return DistributedLink(connection, *sizes, peer, host=spec.transport == "gloo")

        return link(pipes.inbox, spec.index - 1), link(pipes.outbox, spec.index + 1) if pipes.outbox else None

    def _join_group(self) -> None:
        """Joins the process group whose stages send rows to each other. Stage 0 holds the group's store, on a port that
        the system chooses, and reports it to the controller, which sends it to all others."""
        spec = self._spec
        if spec.group_host == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if self._on_gpu:
            torch.cuda.set_device(self._decoder.device)
        port = 0 if spec.is_first else int.from_bytes(self._pipes.control.recv_bytes(), "little")
        store = TCPStore(spec.group_host, port, spec.num_stages, is_master=spec.is_first, wait_for_workers=False)
        if spec.is_first:
            self._report(Header(Kind.READY, value=store.port))
        dist.init_process_group(
            backend=spec.transport,
            store=store,
            rank=spec.index,
            world_size=spec.num_stages,
            # More than the controller's, whose error names the stage.
            timeout=timedelta(seconds=LOAD_TIMEOUT_S + spec.timeout_s),
        )

    def _run_prompt(self, header: Header, payload: bytes) -> None:
        spec, decoder = self._spec, self._decoder
        self._read_roots()  # answers of one token bring roots and no batches, and would fill the pipe up
        self._spans.clear()
        self._root, self._greedy = header.root, bool(header.flag)
        self._cache = None  # the new one has its memory
        cache = decoder.new_cache(header.value, spec.layers, self._num_snapshots)
        if spec.is_first:
            rows_SM = decoder.embed(decoder.ids(np.frombuffer(payload, np.int64).tolist()))
        else:
            rows_SM = self._inbox.rows(header, payload)
        rows_SM, states = decoder.forward(rows_SM, 0, cache, spec.layers, spec.hidden_indices)
        self._cache = StageCache(decoder, cache, spec.layers, spec.hidden_indices, len(rows_SM))
        if self._outbox is not None:
            self._outbox.send(header._replace(num_rows=len(rows_SM)), rows_SM)
        if spec.is_last:
            self._report_completed(header, states, rows_SM[-1:])
        else:
            self._report_result(header, states, None)

    def _run_batch(self, header: Header, payload: bytes) -> None:
        spec, cache = self._spec, self._cache
        assert cache is not None
        nodes, rows_SM = self._nodes_and_rows(header, payload)
        self._root = max(self._root, header.root)
        if len(rows := self._living_within_reach(nodes)) < len(nodes):
            nodes, rows_SM = [nodes[row] for row in rows], rows_SM[rows]
        if not nodes:
            return
        began = self._now()
        self._record_span(HOST, max(header.at_ns, self._free_since_ns), began, header)
        try:
            rows_SM, states = cache.forward(rows_SM, nodes, self._root, lambda: not self._living(nodes))
        except CancelledForwardError:
            self._record_span(TARGET, began, self._now(), header)
            return
        self._wait_for_device()
        computed = self._now()
        self._record_span(TARGET, began, computed, header)
        if self._outbox is not None:
            passed_on = header._replace(cycle=header.cycle + 1, num_rows=len(nodes), at_ns=computed)
            self._outbox.send(passed_on, rows_SM, pack_nodes(nodes))
        if spec.is_last:
            computed = self._report_completed(header, states, rows_SM, nodes)
        elif header.flag or spec.hidden_indices:
            self._report_result(header, states, None, nodes)
        self._record_span(HOST, computed, self._now(), header)

    def _report_completed(
        self, header: Header, states: dict[int, Tensor], rows_SM: Tensor, nodes: Sequence[Node] = ()
    ) -> int:
        """Computes the head, or this stage's part, and reports rows that have passed all layers: before that, if the
        controller has a part too, so that both work at the same time. Returns when the head was done."""
        spec = self._spec
        if spec.head_ids is not None:
            self._report_result(header, states, None, nodes)
        began = self._now()
        logits = self._logits(rows_SM) if spec.has_head else None
        ended = self._now()
        if logits is not None and header.kind == Kind.BATCH:
            self._record_span(HEAD, began, ended, header)
        if spec.head_ids is None:
            self._report_result(header, states, logits, nodes)
        elif logits is not None:
            self._report(header._replace(kind=Kind.HEAD, at_ns=ended), to_bytes(logits))
        return ended

    def _nodes_and_rows(self, header: Header, payload: bytes) -> tuple[list[Node], Tensor]:
        """The nodes of a batch and their rows `[S, M]`; stage 0 embeds the token ids that it is sent."""
        size = header.num_rows * NODE_BYTES
        nodes = unpack_nodes(payload[:size])
        if self._spec.is_first:
            return nodes, self._decoder.embed(self._decoder.ids([node.token_id for node in nodes]))
        return nodes, self._inbox.rows(header, payload[size:])

    def _living_within_reach(self, nodes: Sequence[Node]) -> list[int]:
        """The living rows, once this stage could go back from them to the newest root, of which every verdict tells."""
        while (rows := self._living(nodes)) and 0 < self._num_snapshots < max(rows.values()):
            self._control.poll()
            self._free_since_ns = self._now()  # until now it waited for the verdict, not for the controller
        return list(rows)

    def _living(self, nodes: Sequence[Node]) -> dict[int, int]:
        """The rows of those nodes that no verdict has dropped since they were sent, and by how many tokens each is
        ahead of the newest root."""
        assert self._cache is not None
        self._read_roots()
        distances = [self._cache.distance(node, self._root) for node in nodes]
        return {row: distance for row, distance in enumerate(distances) if distance is not None}

    def _logits(self, rows_SM: Tensor) -> Tensor:
        """Logits `[S, V]`, or the next tokens `[S]` where these are enough, after the device has computed them; of a
        part of the head its logits `[S, U]`, or their `best_of`."""
        logits_SV = self._decoder.logits(rows_SM)
        if self._greedy and self._spec.head_ids is not None:
            return best_of(logits_SV).cpu()
        if self._greedy:
            return next_tokens(logits_SV).cpu()
        self._wait_for_device()
        return logits_SV.float()

    def _report_result(
        self, header: Header, states: dict[int, Tensor], logits: Tensor | None, nodes: Sequence[Node] = ()
    ) -> None:
        """RESULT: the nodes, the hidden states to report, one behind the other, and the logits or next tokens."""
        now, parts = self._now(), [pack_nodes(nodes)]
        parts += [to_bytes(states[index]) for index in self._spec.hidden_indices]
        if logits is not None:
            parts.append(to_bytes(logits))
        self._report(header._replace(kind=Kind.RESULT, num_rows=len(nodes), at_ns=now), b"".join(parts))

    def _read_roots(self) -> None:
        while self._control.poll(0):
            try:
                self._root = max(self._root, int.from_bytes(self._pipes.control.recv_bytes(), "little"))
            except (EOFError, OSError):
                raise LinkClosedError from None

    def _report_spans(self) -> None:
        table = np.array(self._spans, np.int64).reshape(-1, SPAN_COLUMNS)
        self._report(Header(Kind.SPANS), table.tobytes())
        return_freed_memory()  # between requests, where it delays nothing

    def _report(self, header: Header, payload: bytes = b"") -> None:
        try:
            self._pipes.reports.send_bytes(pack(header, payload))
        except OSError:
            raise LinkClosedError from None

    def _record_span(self, kind: int, start_ns: int, end_ns: int, header: Header) -> None:
        self._spans.append((kind, start_ns, end_ns, header.batch, header.cycle))

    def _now(self) -> int:
        return time.perf_counter_ns() - self._spec.clock_offset_ns

    def _wait_for_device(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._decoder.device)
