"""A pipeline whose stages are processes: the controller's side.

A cycle has no barrier: a stage runs as soon as its own input is there, and the controller waits for the oldest node
alone, whose verdict decides what comes next. Other stages' hidden states are read when a drafter asks for them.

Results are matched by epoch and cycle: each stage reports in the order of its work, so whatever comes before the result
that is waited for belongs to a node that was dropped meanwhile, and is skipped.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.models.interface import TargetDecoder
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.messages import Header, Kind, from_bytes
from spdbench.pipeline.schedule import Cycle, Node
from spdbench.pipeline.stages import StageWorkers
from spdbench.pipeline.worker import SPAN_COLUMNS, SPAN_KINDS, StageSpec
from spdbench.types import Span


@dataclass(frozen=True)
class _StageRun:
    """A stage's run on its node in one cycle."""

    stage: int
    node: Node
    cycle: int
    epoch: int


class ProcessPipeline(Pipeline):
    """`workers` run the stages `specs`; `decoder` is the controller's own, which embeds for drafters that read
    hidden state 0."""

    def __init__(
        self, workers: StageWorkers, specs: Sequence[StageSpec], decoder: TargetDecoder, hidden_indices: Collection[int]
    ) -> None:
        super().__init__(decoder, hidden_indices)
        self._workers = workers
        self._specs = tuple(specs)
        self._reads_embedding = 0 in hidden_indices
        self._epoch = 0
        self._cycle_number = 0
        self._dropped_from: dict[int, int] = {}  # by epoch: the first position that its end dropped
        self._runs: list[_StageRun] = []
        self._unread: list[_StageRun] = []
        self._offered: tuple[int, int] | None = None  # epoch and position of the draft that stage 0 has already
        self._verdict_ns = 0
        self._host_spans: list[Span] = []

    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        ids = list(prompt_ids)
        self._epoch += 1
        self._cycle_number = 0
        self._dropped_from.clear()
        self._runs.clear()
        self._unread.clear()
        self._states.clear()
        self._host_spans.clear()
        self._verdict_ns = 0
        header = Header(Kind.PROMPT, self._epoch, num_rows=len(ids), value=capacity, flag=int(greedy))
        self._workers.send(header, np.array(ids, np.int64).tobytes())
        states: dict[int, Tensor] = {}
        if self._reads_embedding:
            states[0] = self._decoder.embed(self._decoder.ids(ids))
        logits: Logits | None = None
        for stage in range(len(self._specs)):
            found, logits, _ = self._receive_result(stage, self._epoch, 0, len(ids))
            states |= found
        assert logits is not None
        return logits, states

    def enter(self, node: Node) -> None:
        """Sends the node at once, unless it was offered before: stage 0 waits for nothing else."""
        if self._reads_embedding:
            self._states.append((node.position, {0: self._embed(node)}))
        if self._offered == (self._epoch, node.position):
            return
        self._send_node(node.token_id, node.position, oldest=node.parent is None)

    def offer(self, token_id: int, position: int) -> None:
        self._offered = (self._epoch, position)
        self._send_node(token_id, position, oldest=False)

    def begin(self, cycle: Cycle) -> None:
        self._runs = [_StageRun(stage, node, self._cycle_number, self._epoch) for stage, node in cycle.work()]
        self._cycle_number += 1

    def finish(self) -> Logits | None:
        oldest = self._runs[0]
        found, logits, self._verdict_ns = self._receive_result(oldest.stage, oldest.epoch, oldest.cycle)
        if found:
            self._states.append((oldest.node.position, found))
        self._unread += [run for run in self._runs[1:] if self._specs[run.stage].hidden_indices]
        return logits

    def states(self) -> Sequence[tuple[int, States]]:
        for run in self._unread:
            self._states.append((run.node.position, self._receive_result(run.stage, run.epoch, run.cycle)[0]))
        self._unread.clear()
        return super().states()

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self._dropped_from[self._epoch] = length
        self._epoch += 1
        self._workers.announce_epoch(self._epoch)
        self._unread = [run for run in self._unread if run.node.position < length]

    def spans(self, final_length: int) -> Sequence[Span]:
        self._workers.send(Header(Kind.SPANS))
        found = list(self._host_spans)
        for spec in self._specs:
            table = np.frombuffer(self._receive_kind(spec.index, Kind.SPANS)[1], np.int64).reshape(-1, SPAN_COLUMNS)
            for kind, start, end, position, epoch, cycle in table.tolist():
                kept = position < min(self._dropped_from.get(epoch, final_length), final_length)
                found.append(Span(spec.index, SPAN_KINDS[kind], start, end, position, kept, cycle))  # type: ignore[arg-type]
        return found

    def close(self) -> None:
        self._workers.close()

    def _send_node(self, token_id: int, position: int, *, oldest: bool) -> None:
        """A node to stage 0, for the next cycle. The time from the newest verdict until stage 0 had work again is the
        controller's."""
        now = perf_counter_ns()
        self._workers.send(Header(Kind.NODE, self._epoch, self._cycle_number, position, 0, token_id, int(oldest), now))
        if self._verdict_ns:
            lane = len(self._specs) + 1
            self._host_spans.append(Span(lane, "host", self._verdict_ns, perf_counter_ns(), position, True))

    def _receive_kind(self, stage: int, kind: Kind) -> tuple[Header, bytes]:
        while True:
            header, payload = self._workers.receive(stage)
            if header.kind == kind:
                return header, payload

    def _receive_result(
        self, stage: int, epoch: int, cycle: int, num_rows: int = 1
    ) -> tuple[States, Logits | None, int]:
        """A stage's result of one cycle: hidden states, from the last stage logits, and when it was sent. Results of
        stale nodes that come before it are skipped."""
        header = Header(Kind.RESULT, epoch=-1)
        while (header.epoch, header.cycle) != (epoch, cycle):
            header, payload = self._receive_kind(stage, Kind.RESULT)
        decoder, spec = self._decoder, self._specs[stage]
        width, size = decoder.config.hidden_size, num_rows * decoder.config.hidden_size * decoder.dtype.itemsize
        states = {
            index: from_bytes(payload[at * size : (at + 1) * size], decoder.dtype, num_rows, width).to(decoder.device)
            for at, index in enumerate(spec.hidden_indices)
        }
        logits: Logits | None = None
        if spec.is_last and header.value >= 0:
            logits = header.value
        elif spec.is_last:
            numbers = payload[len(spec.hidden_indices) * size :]
            logits = from_bytes(numbers, torch.float32, decoder.config.vocab_size).to(decoder.device)
        return states, logits, header.at_ns
