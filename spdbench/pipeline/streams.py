"""A pipeline on one device: the stages of a cycle side by side, as branches of one recorded piece.

    the newest token's row is looked up
        stage 0 | stage 1 | ... | last stage, head, likeliest token | what drafts beside them
    every row moves before the next stage

At batch one no stage fills a GPU, so its branches share it. There is a recording for every number of stages up to the
last busy one, 1 to s, and every bucket; a stage in between that idles works for a slot that nobody reads. The host
sends tokens and positions before a cycle and waits once in it, for the numbers that come out. On a CPU the branches run
one after the other: a rehearsal. Knows stages and hidden states; must not know who drafts or how tokens are judged.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.errors import PromptFailedError
from spdbench.models.cpu.argmax import argmax
from spdbench.models.cuda.captured_decoder import run_layers
from spdbench.models.cuda.graph import GraphRunner, Readback, Upload, Work
from spdbench.models.cuda.static_layers import StaticLayers, bucket_for, buckets
from spdbench.models.decoder import Decoder
from spdbench.pipeline.interface import States
from spdbench.pipeline.schedule import Cycle, Node
from spdbench.types import Span


class CoDrafter(Protocol):
    """What drafts beside the stages, from what there was before the cycle. All its methods are recorded: they read and
    write tensors that stay in place. Positions at `capacity` stand for nobody and must leave no trace."""

    answer_1: Tensor
    """One int64: what came out."""

    def enter(self, position_1: Tensor, hidden_1M: Tensor) -> None:
        """Hidden state 0 of the newest token, before the branches part."""

    def see(self, index: int, position_1: Tensor, hidden_1M: Tensor) -> None:
        """Hidden state `index` of a token in flight, in the branch of its stage."""

    def work(self, num_stages: int, position_1: Tensor, bucket: int) -> None:
        """The branch beside `num_stages` busy stages; the newest token stands at `position_1`."""


class StreamsPipeline:
    """Stages `stages` of `decoder` for sequences of up to `capacity` tokens. The hidden states `hidden_indices` are
    `beside`'s; without it they are reported cycle by cycle."""

    def __init__(
        self,
        decoder: Decoder,
        stages: tuple[range, ...],
        hidden_indices: Collection[int],
        capacity: int,
        beside: CoDrafter | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.capacity = capacity
        self._buckets = buckets(capacity)
        self._decoder = decoder
        self._stages = stages
        self._hidden_indices = frozenset(hidden_indices)
        self._beside = beside
        self._reported = frozenset() if beside is not None else self._hidden_indices
        self._runner = GraphRunner(decoder.device)
        self._cycle: Cycle | None = None
        self._greedy = True
        self._found: list[tuple[int, States]] = []
        self._ticket: int | None = None
        self._numbers: list[int] | None = None
        with torch.inference_mode():
            self._cache = decoder.new_cache(capacity + 1)  # the last slot is nobody's
            windows = decoder.config.windows
            self._layers = StaticLayers(decoder.geometry, decoder.rotary, self._cache, windows, compiled=compiled)
            self._make_tensors()
            self._sent.send([0, *[capacity] * len(stages)])  # for the runs while recording
            self._replays = {
                (count, bucket): self._runner.record(partial(self._work, count, bucket))
                for bucket in self._buckets
                for count in range(1, len(stages) + 1)
            }

    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        if capacity > self.capacity:
            raise PromptFailedError(
                f"a sequence of {capacity} tokens is longer than the {self.capacity} that executor=streams was "
                "recorded for; give the pipeline a larger -o LABEL.context, or another executor"
            )
        self._greedy = greedy
        self._found.clear()
        self._cache.rollback(0)
        decoder = self._decoder
        hidden_SM, states = decoder.forward(
            decoder.embed(decoder.ids(prompt_ids)), 0, self._cache, hidden_indices=self._hidden_indices
        )
        return decoder.logits(hidden_SM[-1:])[0], states

    def enter(self, node: Node) -> None:
        if 0 in self._reported:
            hidden_1M = self._decoder.embed(self._decoder.ids((node.token_id,)))
            self._found.append((node.position, {0: hidden_1M}))

    def offer(self, token_id: int, position: int) -> None:
        """It enters with the next cycle, which cannot begin before this one's verdict."""

    def begin(self, cycle: Cycle) -> None:
        self._cycle = cycle
        busy = [stage for stage, node in enumerate(cycle.stages) if node is not None]
        positions = [self.capacity if node is None else node.position for node in cycle.stages]
        length = 1 + max(node.position for node in cycle.stages if node is not None)
        self._sent.send([cycle.stages[0].token_id if cycle.stages[0] else 0, *positions])
        self._replays[busy[-1] + 1, bucket_for(length, self._buckets)]()
        asked = cycle.completing is not None or self._beside is not None
        self._ticket = self._readback.start(self._answers) if asked else None
        self._numbers = None

    def drafted(self) -> int:
        """What the branch beside the stages gave in this cycle; waits for the device."""
        return self._read()[1]

    def finish(self) -> Logits | None:
        assert self._cycle is not None
        for stage, node in self._cycle.work():
            layers = self._stages[stage]
            states = {i: self._states[i].clone() for i in self._reported if layers.start < i <= layers.stop}
            self._found.append((node.position, states))
        if self._cycle.completing is None:
            return None
        return self._read()[0] if self._greedy else self._logits_1V[0]

    def states(self) -> Sequence[tuple[int, States]]:
        found, self._found = self._found, []
        return found

    def rollback(self, length: int) -> None:
        """What lies in slots from `length` on is written again before it is seen."""
        self._found = [(position, states) for position, states in self._found if position < length]

    def spans(self, final_length: int) -> Sequence[Span]:  # noqa: ARG002 - no clock tells branches apart
        return ()

    def close(self) -> None:
        self._replays.clear()

    def _make_tensors(self) -> None:
        decoder, count, device = self._decoder, len(self._stages), self._decoder.device
        row_1M = torch.zeros(1, decoder.config.hidden_size, dtype=decoder.dtype, device=device)
        self._sent = Upload(1 + count, torch.long, device)
        self._token_1 = self._sent.words[:1]
        self._positions = [self._sent.words[1 + stage : 2 + stage] for stage in range(count)]
        self._inputs = [torch.zeros_like(row_1M) for _ in range(count)]
        self._outputs = [torch.zeros_like(row_1M) for _ in range(count)]
        self._states = {index: torch.zeros_like(row_1M) for index in self._reported}
        self._logits_1V = torch.zeros(1, decoder.config.vocab_size, dtype=decoder.dtype, device=device)
        self._answers = torch.zeros(2, dtype=torch.long, device=device)
        self._readback = Readback(2, device)

    def _work(self, num_stages: int, bucket: int) -> None:
        """A cycle of the first `num_stages` stages, as it is recorded."""
        beside, count = self._beside, len(self._stages)
        self._inputs[0].copy_(self._decoder.embed(self._token_1))
        works: list[Work] = [partial(self._stage, stage, bucket) for stage in reversed(range(num_stages))]
        if beside is not None:
            beside.enter(self._positions[0], self._inputs[0])
            works.append(partial(beside.work, num_stages, self._positions[0], bucket))
        self._runner.side_by_side(works)
        for stage in range(min(num_stages, count - 1)):
            self._inputs[stage + 1].copy_(self._outputs[stage])
        if beside is not None:
            self._answers[1:].copy_(beside.answer_1)

    def _stage(self, stage: int, bucket: int) -> None:
        decoder, position_1 = self._decoder, self._positions[stage]
        place = self._layers.chain(position_1, bucket)

        def see(index: int, hidden_1M: Tensor) -> None:
            if index in self._reported:
                self._states[index].copy_(hidden_1M)
            elif index in self._hidden_indices and self._beside is not None:
                self._beside.see(index, position_1, hidden_1M)

        hidden_1M = run_layers(decoder, self._layers, self._inputs[stage], place, self._stages[stage], see)
        self._outputs[stage].copy_(hidden_1M)
        if stage == len(self._stages) - 1:
            logits_1V = decoder.logits(hidden_1M)
            self._logits_1V.copy_(logits_1V)
            self._answers[:1].copy_(argmax(logits_1V))

    def _read(self) -> list[int]:
        if self._numbers is None:
            assert self._ticket is not None
            self._numbers = self._readback.read(self._ticket)
        return self._numbers
