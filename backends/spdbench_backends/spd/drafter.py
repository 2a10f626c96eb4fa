"""The drafters of pipelined backends: a head over the features of tokens in flight (SPD), an early exit (PPSD), and the
synthetic one.

They differ from `decoding.speculate.Drafter` in that they draft next tokens only, after tokens that are not verified.
Index t counts new tokens from 0 (prefill's), a position counts from the prompt's start.

Shapes: S rows, M model width, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.synthetic import SyntheticDrafts
from spdbench.decoding.verify import Draft
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from spdbench.pipeline.schedule import Change, Cycle, Node
from spdbench_backends.spd.head import CapturedDraftModule, DraftModule, HeadWeights, ModuleWeights


class Proposal(NamedTuple):
    """A draft and the node in flight that it follows."""

    parent: Node
    draft: Draft


class PipelineDrafter(ABC):
    """One request's drafter. `hidden_indices` are the hidden states that it reads. With `reads_this_cycle` it drafts
    after the stages have moved, from what they have just computed; otherwise in parallel with them, from earlier
    states. It proposes at most `max_rows` drafts a cycle."""

    hidden_indices: tuple[int, ...] = ()
    reads_this_cycle: bool = False
    max_rows: int = 1

    @abstractmethod
    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        """The prompt's hidden states, `[S, M]` by index; `capacity` tokens is the longest that the sequence can get."""

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:  # noqa: B027 - optional
        """New hidden states of a token in flight, `[1, M]` by index."""

    def successors(self, cycle: Cycle, can_continue: Callable[[Node], bool], sampler: Sampler) -> Sequence[Proposal]:
        """Drafts after nodes in flight that `can_continue`, no token twice after the same node. By default one, after
        the newest token."""
        newest = cycle.newest
        if newest is None or not can_continue(newest):
            return ()
        return (Proposal(newest, self.draft(cycle, sampler)),)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        """A successor of the newest token, from what was observed, where `successors` gives one at most."""
        raise NotImplementedError

    def drop(self, change: Change) -> None:
        """A verdict has dropped nodes. By default those of a chain: the target's own token takes their place."""
        self.rollback(change.root.position)

    def rollback(self, length: int) -> None:  # noqa: B027 - optional
        """Forgets everything from position `length` on."""


class SyntheticPipelineDrafter(PipelineDrafter):
    """`oracle:P` and `forced:P`. With `top_k` above 1 every newest node gets so many drafts, up to `max_rows` in a
    cycle; all but the first are wrong for certain."""

    def __init__(
        self, drafts: SyntheticDrafts, *, reads_this_cycle: bool = False, top_k: int = 1, max_rows: int = 1
    ) -> None:
        self.reads_this_cycle = reads_this_cycle
        self.max_rows = max_rows
        self._drafts = drafts
        self._top_k = top_k
        self._prompt_length = 0

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:  # noqa: ARG002
        self._prompt_length = prompt_length

    def successors(self, cycle: Cycle, can_continue: Callable[[Node], bool], sampler: Sampler) -> Sequence[Proposal]:  # noqa: ARG002
        found = [
            (rank, Proposal(node, draft))
            for node in cycle.stages[0]
            if can_continue(node)
            for rank, draft in enumerate(self._drafts.drafts(node.position + 1 - self._prompt_length, self._top_k))
        ]
        found.sort(key=lambda ranked: ranked[0])
        return [proposal for _, proposal in found[: self.max_rows]]


class HeadDrafter(PipelineDrafter):
    """The Pipeline Draft Module, trained or random."""

    def __init__(self, weights: ModuleWeights) -> None:
        self.hidden_indices = weights.plan.anchors
        self._weights = weights
        self._module: DraftModule | None = None
        self._rows = weights.new_rows()

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        self._module = self._weights.new_module(capacity)
        self._module.start(len(self._rows.start(prompt_length)), states, prompt_length)

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        assert self._module is not None
        self._module.observe(node.position, states)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        assert self._module is not None
        in_flight = [batch[0].position if batch else -1 for batch in cycle.stages]
        return self._draft(self._module.logits(self._rows.next(in_flight, _newest(cycle).position)), sampler)

    def rollback(self, length: int) -> None:
        self._rows.rollback(length)
        if self._module is not None:
            self._module.rollback(length)

    def _draft(self, logits_U: Tensor, sampler: Sampler) -> Draft:
        return Draft.from_logits(logits_U, sampler).in_target(self._weights.vocabulary)


class CapturedHeadDrafter(HeadDrafter):
    """One request's drafter whose drafts come out of the pipeline's cycle: `drafted` waits for the current one's."""

    def __init__(self, weights: HeadWeights, module: CapturedDraftModule, drafted: Callable[[], int]) -> None:
        super().__init__(weights)
        self._captured = module
        self._drafted = drafted

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:  # noqa: ARG002
        self._captured.start(prompt_length, states, prompt_length)

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        """The stages have put them into the module's ring."""

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:  # noqa: ARG002 - the cycle has drafted
        return Draft(self._drafted()) if sampler.greedy else self._draft(self._captured.logits_1U[0], sampler)

    def rollback(self, length: int) -> None:
        """Rows from `length` on are overwritten before they are read."""


class ExitDrafter(PipelineDrafter):
    """PPSD's exit head: drafts after the stages have moved, from what stage 0 has just computed."""

    reads_this_cycle = True

    def __init__(self, head: Decoder, exit_layer: int) -> None:
        self.hidden_indices: tuple[int, ...] = (exit_layer,)
        self._head = head
        self._exit_layer = exit_layer
        self._cache: KVCache | None = None
        self._length = 0
        self._unread: list[Tensor] = []

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        self._cache = self._head.new_cache(capacity)
        self._head.forward(states[self._exit_layer], 0, self._cache)
        self._length = prompt_length
        self._unread.clear()

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        if self._exit_layer in states:
            assert node.position == self._length + len(self._unread)
            self._unread.append(states[self._exit_layer])

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        assert self._cache is not None
        hidden_SM, _ = self._head.forward(torch.cat(self._unread), self._length, self._cache)
        self._length += len(self._unread)
        self._unread.clear()
        assert _newest(cycle).position == self._length - 1
        return Draft.from_logits(self._head.logits(hidden_SM[-1:])[0], sampler)

    def rollback(self, length: int) -> None:
        assert self._cache is not None
        del self._unread[max(0, length - self._length) :]
        self._length = min(self._length, length)
        self._cache.rollback(self._length)


def _newest(cycle: Cycle) -> Node:
    """The newest token, which is in stage 0."""
    assert cycle.newest is not None
    return cycle.newest
