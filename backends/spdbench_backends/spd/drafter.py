"""Who proposes the next token in SPD: a head that reads features, or a synthetic drafter that reads the answer.

Both stand behind `PipelineDrafter`, so the decoding loop is one. Must not know how stages run or who won.
Index t counts new tokens from 0 (prefill's), position counts from the prompt's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.synthetic import SyntheticDrafts
from spdbench.decoding.verify import Draft
from spdbench.pipeline.schedule import Cycle
from spdbench_backends.spd.head import DraftModule, HeadWeights
from spdbench_backends.spd.plan import DeepestRows, NominalRows


class PipelineDrafter(Protocol):
    """One request's drafter. `anchors` are the hidden states it wants to see. `reads_this_cycle`: it drafts when the
    stages have moved, from what they have just computed; else beside them, from what there was before."""

    anchors: tuple[int, ...]
    reads_this_cycle: bool

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        """The prompt's hidden states, `[S, M]` by index."""

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        """New hidden states of a token in flight, `[1, M]` by index."""

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        """A successor for the node in stage 0, from what was observed."""

    def dictated(self, position: int) -> bool | None:
        """The verdict that a timing experiment prescribes for the draft at `position`; usually None."""

    def rollback(self, length: int) -> None:
        """Everything from position `length` on was dropped."""


class SyntheticDrafter:
    """`oracle:P` and `forced:P`."""

    anchors: tuple[int, ...] = ()

    def __init__(self, drafts: SyntheticDrafts, *, reads_this_cycle: bool = False) -> None:
        self.reads_this_cycle = reads_this_cycle
        self._drafts = drafts
        self._prompt_length = 0

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:  # noqa: ARG002
        self._prompt_length = prompt_length

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        pass

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:  # noqa: ARG002
        assert cycle.stages[0] is not None
        return Draft(self._drafts.token(cycle.stages[0].position + 1 - self._prompt_length))

    def dictated(self, position: int) -> bool | None:
        return self._drafts.verdict(position - self._prompt_length)

    def rollback(self, length: int) -> None:
        pass


class HeadDrafter:
    """The Pipeline Draft Module, trained or random."""

    reads_this_cycle = False

    def __init__(self, weights: HeadWeights, vocab_size: int) -> None:
        self.anchors = weights.plan.anchors
        self._token_ids = None if weights.token_ids_U is None else weights.token_ids_U.tolist()
        self._weights = weights
        self._vocab_size = vocab_size
        self._module = DraftModule(weights)
        self._rows = DeepestRows(weights.plan) if weights.use_deepest else NominalRows(weights.plan)

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        self._module.start(self._rows.start(prompt_length), states, prompt_length, capacity)

    def observe(self, position: int, states: Mapping[int, Tensor]) -> None:
        self._module.observe(position, states)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        newest = cycle.stages[0]
        assert newest is not None
        in_flight = [node.position if node else -1 for node in cycle.stages]
        logits_U = self._module.logits(self._rows.next(in_flight, newest.position))
        if sampler.greedy:
            return Draft(self._target_id(sampler.choose(logits_U)))
        return self._drawn(logits_U, sampler)

    def dictated(self, position: int) -> bool | None:  # noqa: ARG002
        return None

    def rollback(self, length: int) -> None:
        self._rows.rollback(length)
        self._module.rollback(length)

    def _drawn(self, logits_U: Tensor, sampler: Sampler) -> Draft:
        drafted_U = sampler.probabilities(logits_U)
        return Draft(self._target_id(sampler.draw(drafted_U)), self._over_vocabulary(drafted_U))

    def _target_id(self, draft_index: int) -> int:
        return draft_index if self._token_ids is None else int(self._token_ids[draft_index])

    def _over_vocabulary(self, drafted_U: Tensor) -> Tensor:
        if self._weights.token_ids_U is None:
            return drafted_U
        out = torch.zeros(self._vocab_size, dtype=drafted_U.dtype, device=drafted_U.device)
        return out.index_copy_(0, self._weights.token_ids_U, drafted_U)
