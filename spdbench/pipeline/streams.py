"""A pipeline on one device: the stages of a cycle run side by side, as branches of one captured function.

    the newest token's row is embedded
        stage 0 | stage 1 | ... | last stage, head, most likely token | the drafter
    every row moves before the next stage

At batch size 1 no stage fills a GPU, so the branches share it. Each number of stages up to the last busy one is
captured, for every bucket; an idle stage in between works on a slot that is never read. The host sends tokens and
positions before a cycle and waits once in it, for the resulting token ids. On a CPU the branches run one after the
other: a rehearsal. Knows stages and hidden states; must not know how drafts are made or verified.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from spdbench.decoding.sampling import Logits
from spdbench.errors import PromptFailedError
from spdbench.models.cuda.captured_function import (
    CapturedFunction,
    CudaGraphs,
    Readback,
    Tensors,
    Upload,
    Work,
    buckets,
)
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import next_tokens
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.schedule import Batch, Cycle


class CoDrafter(Protocol):
    """A drafter that runs next to the stages, on the hidden states from before the cycle. All its methods are captured:
    they read and write tensors that stay in place. A position equal to `capacity` is that of an idle stage, and must
    leave no trace."""

    def enter(self, position_1: Tensor, hidden_1M: Tensor) -> None:
        """Hidden state 0 of the newest token, before the branches part."""

    def observe_stage(self, index: int, position_1: Tensor, hidden_1M: Tensor) -> None:
        """Hidden state `index` of a token in flight, in the branch of its stage."""

    def draft(self, num_stages: int, position_1: Tensor, bucket: int) -> Tensor:
        """The drafter's branch next to `num_stages` busy stages: the token id `[1]` after the newest token, which
        is at `position_1`."""


class StreamsPipeline(Pipeline):
    """Stages `stages` of `decoder` for sequences of up to `capacity` tokens. The hidden states `hidden_indices` go to
    `co_drafter`; without one they are reported cycle by cycle. Takes chains only: a row a stage. After a restart, slots
    from its token on are overwritten before they are seen again."""

    def __init__(
        self,
        decoder: Decoder,
        stages: tuple[range, ...],
        hidden_indices: Collection[int],
        capacity: int,
        co_drafter: CoDrafter | None = None,
    ) -> None:
        super().__init__(decoder, hidden_indices)
        self.capacity = capacity
        self._stages = stages
        self._co_drafter = co_drafter
        self._graphs = CudaGraphs(decoder.device)
        self._cycle: Cycle | None = None
        self._greedy = True
        self._copy_index: int | None = None
        self._ids: list[int] | None = None
        with torch.inference_mode():
            self._cache = decoder.new_cache(capacity + 1)  # the last slot is that of idle stages
            self._layers = CapturedLayers(decoder.weights, decoder.geometry, decoder.rotary, self._cache)
            self._make_tensors()
            self._sent.send([0, *[capacity] * len(stages)])  # idle stages, for the runs of the captures
            self._cycles = {
                count: CapturedFunction(self._graphs, partial(self._run, count), lengths=buckets(capacity))
                for count in range(1, len(stages) + 1)
            }

    def prefill(self, prompt_ids: Collection[int], capacity: int, *, greedy: bool) -> tuple[Logits, States]:
        if capacity > self.capacity:
            raise PromptFailedError(
                f"a sequence of {capacity} tokens is longer than the {self.capacity} that executor=streams was "
                "captured for; give the pipeline a larger -o LABEL.context, or another executor"
            )
        self._greedy = greedy
        self._states.clear()
        self._cache.rollback(0)
        decoder = self._decoder
        hidden_SM, states = decoder.forward(
            decoder.embed(decoder.ids(prompt_ids)), 0, self._cache, hidden_indices=self._hidden_indices
        )
        return decoder.logits(hidden_SM[-1:])[0], states

    def enter(self, batch: Batch) -> None:
        if 0 in self._state_tensors:
            self._observe(batch, {0: self._embed(batch)})

    def begin(self, cycle: Cycle) -> None:
        self._cycle = cycle
        busy = [stage for stage, _ in cycle.work()]
        positions = [batch[0].position if batch else self.capacity for batch in cycle.stages]
        length = 1 + max(batch[0].position for _, batch in cycle.work())
        self._sent.send([cycle.newest.token_id if cycle.newest else 0, *positions])
        self._cycles[busy[0] + 1](length=length)
        asked = cycle.completing is not None or self._co_drafter is not None
        self._copy_index = self._readback.start(self._ids_2) if asked else None
        self._ids = None

    def drafted(self) -> int:
        """The token id that the co-drafter gave in this cycle; waits for the device."""
        return self._read()[1]

    def finish(self) -> Logits | None:
        assert self._cycle is not None
        for stage, batch in self._cycle.work():
            layers = self._stages[stage]
            states = {index: state.clone() for index, state in self._state_tensors.items() if index - 1 in layers}
            self._observe(batch, states)
        if self._cycle.completing is None:
            return None
        return self._read()[0] if self._greedy else self._logits_1V[0]

    def close(self) -> None:
        self._cycles.clear()

    def _make_tensors(self) -> None:
        decoder, count, device = self._decoder, len(self._stages), self._decoder.device
        self._sent = Upload(1 + count, torch.long, device)
        self._token_1 = self._sent.words[:1]
        self._positions = [self._sent.words[1 + stage : 2 + stage] for stage in range(count)]
        shape = (count, 1, decoder.config.hidden_size)
        self._inputs, self._outputs = (torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in range(2))
        reported = () if self._co_drafter is not None else self._hidden_indices
        self._state_tensors = {index: torch.zeros_like(self._inputs[0]) for index in reported}
        self._logits_1V = torch.zeros(1, decoder.config.vocab_size, dtype=decoder.dtype, device=device)
        self._ids_2 = torch.zeros(2, dtype=torch.long, device=device)  # of the last stage, and of the co-drafter
        self._readback = Readback(2, device)

    def _run(self, num_stages: int, bucket: int) -> Tensors:
        """A cycle of the first `num_stages` stages, as it is captured. The branches write to tensors that stay in
        place, as memory of a side stream must not be read from another one."""
        self._inputs[0].copy_(self._decoder.embed(self._token_1))
        works: list[Work] = [partial(self._run_stage, stage, bucket) for stage in reversed(range(num_stages))]
        if self._co_drafter is not None:
            self._co_drafter.enter(self._positions[0], self._inputs[0])
            works.append(partial(self._run_drafter, num_stages, bucket))
        self._graphs.side_by_side(works)
        moving = min(num_stages, len(self._stages) - 1)
        self._inputs[1 : moving + 1].copy_(self._outputs[:moving])
        return ()

    def _run_drafter(self, num_stages: int, bucket: int) -> None:
        assert self._co_drafter is not None
        self._ids_2[1:].copy_(self._co_drafter.draft(num_stages, self._positions[0], bucket))

    def _run_stage(self, stage: int, bucket: int) -> None:
        decoder, position_1 = self._decoder, self._positions[stage]

        def on_hidden(index: int, hidden_1M: Tensor) -> None:
            if index in self._state_tensors:
                self._state_tensors[index].copy_(hidden_1M)
            elif index in self._hidden_indices and self._co_drafter is not None:
                self._co_drafter.observe_stage(index, position_1, hidden_1M)

        context = self._layers.chain(position_1, bucket)
        hidden_1M = self._layers.forward(self._inputs[stage], context, self._stages[stage], on_hidden)
        self._outputs[stage].copy_(hidden_1M)
        if stage == len(self._stages) - 1:
            logits_1V = decoder.logits(hidden_1M)
            self._logits_1V.copy_(logits_1V)
            self._ids_2[:1].copy_(next_tokens(logits_1V))

    def _read(self) -> list[int]:
        if self._ids is None:
            assert self._copy_index is not None
            self._ids = self._readback.read(self._copy_index)
        return self._ids
