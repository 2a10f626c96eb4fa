"""A pipeline whose stages are processes: the controller's side.

A cycle has no barrier: a stage runs as soon as its own input is there, and the controller waits for the oldest node
alone, whose verdict decides what comes next. Other stages' hidden states are read when a drafter asks for them.

Results are matched by batch: each stage reports in the order of its work, so whatever comes before the result that is
waited for belongs to nodes that were dropped meanwhile, and is skipped.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.models.interface import TargetDecoder
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.output_head import HeadPart, join_best
from spdbench.pipeline.processes.messages import NODE_BYTES, Header, Kind, from_bytes, pack_nodes, unpack_nodes
from spdbench.pipeline.processes.stages import StageWorkers
from spdbench.pipeline.processes.worker import SPAN_COLUMNS, SPAN_KINDS, StageSpec
from spdbench.pipeline.schedule import Batch, Change, Cycle, Node
from spdbench.types import Span


class _StageRun(NamedTuple):
    """A stage's run in one cycle, on the batch that was sent under this number."""

    stage: int
    batch: int
    nodes: Batch


class ProcessPipeline(Pipeline):
    """`workers` run the stages `specs`; `decoder` is the controller's own, which embeds for drafters that read
    hidden state 0. `head` is what the controller computes of the output head, if it has a part of it; the last stage
    then reports its output, hidden state L."""

    def __init__(
        self,
        workers: StageWorkers,
        specs: Sequence[StageSpec],
        decoder: TargetDecoder,
        hidden_indices: Collection[int],
        head: HeadPart | None = None,
    ) -> None:
        super().__init__(decoder, hidden_indices)
        self.drafts_in_first_stage = workers.has_local_stage
        self._head = head
        self._head_spans: list[tuple[int, int, int, Batch]] = []  # start, end, cycle, nodes
        self._own_head_ns = 0
        self._workers = workers
        self._specs = tuple(specs)
        self._num_layers = specs[-1].layers.stop
        self._reads_embedding = 0 in hidden_indices
        self._announces_all = any(decoder.snapshot_bytes(spec.layers) for spec in specs)
        """True if stages wait for roots, as their recurrent states reach back only so far (`worker.snapshots_ahead`).
        Others hear of an accepted root with the next batch, and at once only of what is dropped."""
        self._greedy = True
        self._prompt = 0  # its number: node i of the request is sent as number i + 1 behind it
        self._num_sent = 0
        self._root = 0
        self._cycle_number = 0
        self._batch_of: dict[int, int] = {}  # by node, for those sent
        self._sent: dict[int, Batch] = {}  # by number of the batch
        self._latest: tuple[int, frozenset[int]] = (-1, frozenset())  # the batch sent last: its cycle and its nodes
        self._dropped: set[int] = set()
        self._runs: list[_StageRun] = []
        self._unread: list[_StageRun] = []
        self._verdict_ns = 0
        self._host_spans: list[Span] = []

    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        ids = list(prompt_ids)
        self._prompt = self._root = self._num_sent = self._num_sent + 1
        self._cycle_number = 0
        for kept in (self._batch_of, self._sent, self._dropped, self._runs, self._unread, self._states):
            kept.clear()
        self._latest = (-1, frozenset())
        self._host_spans.clear()
        self._head_spans.clear()
        self._verdict_ns = 0
        header = Header(Kind.PROMPT, self._prompt, self._root, num_rows=len(ids), value=capacity, flag=int(greedy))
        self._greedy = greedy
        self._workers.send(header, np.array(ids, np.int64).tobytes())
        states: dict[int, Tensor] = {}
        if self._reads_embedding:
            states[0] = self._decoder.embed(self._decoder.ids(ids))
        logits: Logits | None = None
        for stage in range(len(self._specs)):
            header, payload = self._receive_result(stage, self._prompt)
            found, logits = self._read_result(stage, payload, len(ids), 1)
            states |= found
        if self._head is not None:
            logits = self._logits_of(states[self._num_layers][-1:], self._prompt, 1, 0)
        assert logits is not None
        return logits, states

    def enter(self, batch: Batch) -> None:
        """Sends the nodes at once, unless they were offered before: stage 0 waits for nothing else."""
        if self._reads_embedding:
            self._observe(batch, {0: self._embed(batch)})
        if batch[0].id not in self._batch_of:
            self._send_batch(batch)

    def offer(self, batch: Batch) -> None:
        self._send_batch(batch)

    def begin(self, cycle: Cycle) -> None:
        root = self._number(cycle.root)
        if self._announces_all and root != self._root:
            self._workers.announce_root(root)
        self._root = root
        self._runs = [_StageRun(stage, self._batch_of[batch[0].id], batch) for stage, batch in cycle.work()]
        self._cycle_number += 1

    def finish(self) -> Logits | None:
        oldest, *others = self._runs
        logits, self._verdict_ns = self._read_run(oldest)
        self._unread += [run for run in others if self._specs[run.stage].hidden_indices]
        return logits

    def states(self) -> Sequence[tuple[Node, States]]:
        for run in self._unread:
            self._read_run(run)
        self._unread.clear()
        return super().states()

    def drop(self, change: Change) -> None:
        super().drop(change)
        self._dropped |= {node.id for node in change.dropped}
        self._root = self._number(change.root)
        self._num_sent = max(self._num_sent, self._root)
        self._workers.announce_root(self._root)
        living = [
            run._replace(nodes=tuple(node for node in run.nodes if node.id not in self._dropped))
            for run in self._unread
        ]
        self._unread = [run for run in living if run.nodes]

    def stop(self) -> None:
        self._unread.clear()
        self._states.clear()
        self._num_sent += 1  # a root that no node descends from
        self._workers.announce_root(self._num_sent)

    def spans(self, final_length: int) -> Sequence[Span]:
        self._workers.send(Header(Kind.SPANS))
        found = list(self._host_spans)
        lane = 0 if self.drafts_in_first_stage else len(self._specs)
        for start, end, cycle, nodes in self._head_spans:
            final = any(self._is_final(node, final_length) for node in nodes)
            found.append(Span(lane, "head", start, end, nodes[0].position, final, cycle))
        for spec in self._specs:
            table = np.frombuffer(self._receive_kind(spec.index, Kind.SPANS)[1], np.int64).reshape(-1, SPAN_COLUMNS)
            for kind, start, end, batch, cycle in table.tolist():
                kept = [node for node in self._sent[batch] if self._is_final(node, final_length)]
                position = (kept or self._sent[batch])[0].position
                found.append(Span(spec.index, SPAN_KINDS[kind], start, end, position, bool(kept), cycle))  # type: ignore[arg-type]
        return found

    def close(self) -> None:
        self._workers.close()

    def _is_final(self, node: Node, final_length: int) -> bool:
        return node.position < final_length and node.id not in self._dropped

    def _number(self, node: Node) -> int:
        return self._prompt + 1 + node.id

    def _parent_number(self, node: Node) -> int:
        return self._prompt if node.parent is None else self._prompt + 1 + node.parent

    def _send_batch(self, batch: Batch) -> None:
        """Nodes to stage 0, for the next cycle. The time from the newest verdict until stage 0 had work again is the
        controller's.

        Every stage reports the oldest batch to the controller, or nothing would keep that from running ahead. The
        oldest one in a cycle is the root's, and nodes that do not follow those before them can become it on the way.
        """
        number, now = self._number(batch[0]), perf_counter_ns()
        cycle, before = self._latest
        follows = cycle == self._cycle_number - 1 and all(node.parent in before for node in batch)
        table = [Node(self._number(node), self._parent_number(node), node.token_id, node.position) for node in batch]
        header = Header(Kind.BATCH, number, self._root, self._cycle_number, len(batch), -1, int(not follows), now)
        self._workers.send(header, pack_nodes(table))
        self._latest = self._cycle_number, frozenset(node.id for node in batch)
        self._sent[number] = batch
        self._batch_of |= {node.id: number for node in batch}
        self._num_sent = max(self._num_sent, self._number(batch[-1]))
        if self._verdict_ns:
            lane = len(self._specs) + 1
            sent = now if self.drafts_in_first_stage else perf_counter_ns()  # sending to it is running it
            self._host_spans.append(Span(lane, "host", self._verdict_ns, sent, batch[0].position, True))

    def _receive_kind(self, stage: int, kind: Kind) -> tuple[Header, bytes]:
        while True:
            header, payload = self._workers.receive(stage)
            if header.kind == kind:
                return header, payload

    def _receive_result(self, stage: int, batch: int) -> tuple[Header, bytes]:
        """A stage's result of one batch. Results of batches that were dropped, which come before it, are skipped."""
        header = Header(Kind.RESULT, batch=-1)
        while header.batch != batch:
            header, payload = self._receive_kind(stage, Kind.RESULT)
        return header, payload

    def _read_run(self, run: _StageRun) -> tuple[Logits | None, int]:
        """Keeps the hidden states of a run's nodes; returns the logits of the first one, from the last stage, and when
        they were sent. The stage may have computed nodes that were dropped meanwhile."""
        header, payload = self._receive_result(run.stage, run.batch)
        size = header.num_rows * NODE_BYTES
        numbers = [node.id for node in unpack_nodes(payload[:size])]
        rows = [numbers.index(self._number(node)) for node in run.nodes]
        states, logits = self._read_result(run.stage, payload[size:], len(numbers), len(numbers), rows[0])
        at_ns = header.at_ns
        if self._head is not None and self._specs[run.stage].is_last:
            began, first = perf_counter_ns(), rows[0]
            logits = self._logits_of(states[self._num_layers][first : first + 1], run.batch, len(numbers), first)
            self._head_spans.append((began, self._own_head_ns, self._cycle_number - 1, run.nodes))
            at_ns = perf_counter_ns()
        if states:
            if len(rows) < len(numbers):
                states = {index: state_SM[rows] for index, state_SM in states.items()}
            self._observe(run.nodes, states)
        return logits, at_ns

    def _read_result(
        self, stage: int, payload: bytes, num_rows: int, num_logits: int, row: int = 0
    ) -> tuple[dict[int, Tensor], Logits | None]:
        """Hidden states by index, and from the last stage the logits of `row`."""
        decoder, spec = self._decoder, self._specs[stage]
        width, size = decoder.config.hidden_size, num_rows * decoder.config.hidden_size * decoder.dtype.itemsize
        states = {
            index: from_bytes(payload[at * size : (at + 1) * size], decoder.dtype, num_rows, width).to(decoder.device)
            for at, index in enumerate(spec.hidden_indices)
        }
        if not spec.is_last or spec.head_ids is not None:
            return states, None
        numbers = payload[len(spec.hidden_indices) * size :]
        if self._greedy:
            return states, int(from_bytes(numbers, torch.int64, num_logits)[row])
        logits_SV = from_bytes(numbers, torch.float32, num_logits, decoder.config.vocab_size)
        return states, logits_SV[row].to(decoder.device)

    def _logits_of(self, row_1M: Tensor, batch: int, num_rows: int, row: int) -> Logits:
        """The controller's part of the head on a completed row, joined with the last stage's, if it has one: on `row`
        of `num_rows` rows of a batch."""
        assert self._head is not None
        row_1M = row_1M.to(self._head.device)
        parts = [self._head.best(row_1M).cpu() if self._greedy else self._head.logits(row_1M).float()]
        self._own_head_ns = perf_counter_ns()
        spec = self._specs[-1]
        if spec.has_head:
            assert spec.head_ids is not None
            header = Header(Kind.HEAD, batch=-1)
            while header.batch != batch:
                header, payload = self._receive_kind(spec.index, Kind.HEAD)
            if self._greedy:
                found = from_bytes(payload, torch.float64, num_rows, 2)
            else:
                found = from_bytes(payload, torch.float32, num_rows, len(spec.head_ids)).to(parts[0].device)
            parts.insert(0, found[row : row + 1])
        return int(join_best(parts)[0]) if self._greedy else torch.cat(parts, dim=-1)[0]
