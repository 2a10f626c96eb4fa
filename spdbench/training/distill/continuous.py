"""Continuous batching: scripts ask for completions, and a seat whose script ended gets the next one at once.

A script is a generator: it yields what it wants completed and is sent the new ids. Its seat keeps what it has read, so
that a request which goes on where the last one ended reads only what is new, and the system prompt that all share is
read once a seat. Prompts are read one token a step like anything else: in a full batch a token costs the same whether
it is read or written. Must not know text.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spdbench.training.distill.batched import Slots
from spdbench.types import Sampling

TOP_K = 64
"""Sampling is from so many likeliest tokens at most: what is behind them is mostly noise, and sorting the whole
vocabulary for each row would cost as much as the layers do."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """A wish: new ids behind `ids`, up to the first of `eos_ids`, which counts, or `max_new_tokens`."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]


Script = Generator[Completion, tuple[int, ...], Result]


@dataclass
class _Seat(Generic[Result]):
    """One slot's script and what it is at."""

    script: Script[Result] | None = None
    wish: Completion | None = None
    text: list[int] = field(default_factory=list)
    """The wish's ids and behind them the new ones; the slot has read the first `length` of them."""
    random: random.Random = field(default_factory=random.Random)

    def new_ids(self, wish: Completion) -> tuple[int, ...]:
        return tuple(self.text[len(wish.ids) :])

    def sit(self, wish: Completion, read: int) -> int:
        """Takes a wish; returns how many of its ids are read already, `read` of the former text being so."""
        shared, longest = 0, min(read, len(wish.ids) - 1)
        while shared < longest and self.text[shared] == wish.ids[shared]:
            shared += 1
        self.wish, self.text, self.random = wish, list(wish.ids), random.Random(wish.seed)
        return shared


class Batch(Generic[Result]):
    """Runs scripts side by side; `num_written` counts all new ids.

    Scripts go on while `lock` is held, so that batches in several threads may take them from one iterator, and scripts
    may share what they like.
    """

    def __init__(
        self, slots: Slots, scripts: Iterator[Script[Result]], lock: AbstractContextManager[Any] | None = None
    ) -> None:
        self._slots = slots
        self._scripts = scripts
        self._lock = lock or nullcontext()
        self._seats: list[_Seat[Result]] = [_Seat() for _ in slots.lengths]
        self.num_written = 0

    def results(self) -> Iterator[Result | None]:
        """What scripts return, in the order in which they end; None after every step that ended none."""
        ended: list[Result] = []
        with self._lock:
            for slot in range(len(self._seats)):
                ended += self._next_script(slot)
        yield from ended
        while any(seat.script is not None for seat in self._seats):
            ended = self._step()
            yield from ended
            if not ended:
                yield None

    def _step(self) -> list[Result]:
        """Every seat reads a token; those that have read all they have get a new one."""
        slots, seats = self._slots, self._seats
        ids_B = [
            None if seat.script is None else seat.text[length]
            for seat, length in zip(seats, slots.lengths, strict=True)
        ]
        hidden_BM = slots.read(ids_B)
        due = [i for i, seat in enumerate(seats) if seat.script is not None and slots.lengths[i] == len(seat.text)]
        if not due:
            return []
        rows = hidden_BM if len(due) == len(seats) else hidden_BM[due]
        wishes = [wish for i in due if (wish := seats[i].wish) is not None]
        points = [
            0.0 if wish.sampling.greedy else seats[i].random.random() for i, wish in zip(due, wishes, strict=True)
        ]
        tokens = choose(slots.logits(rows), [wish.sampling for wish in wishes], points)
        self.num_written += len(tokens)
        ended: list[Result] = []
        for i, wish, token in zip(due, wishes, tokens, strict=True):
            seat = seats[i]
            seat.text.append(token)
            if token in wish.eos_ids or len(seat.text) == len(wish.ids) + wish.max_new_tokens:
                with self._lock:
                    ended += self._go_on(i, wish)
        return ended

    def _go_on(self, slot: int, wish: Completion) -> list[Result]:
        """Hands the finished wish to the slot's script, and the slot to the next script if that was the last."""
        seat = self._seats[slot]
        assert seat.script is not None
        try:
            self._sit(slot, seat.script.send(seat.new_ids(wish)))
        except StopIteration as end:
            return [end.value, *self._next_script(slot)]
        return []

    def _next_script(self, slot: int) -> list[Result]:
        """Gives the slot a script with a wish; those that end without one have their results returned."""
        ended: list[Result] = []
        for script in self._scripts:
            try:
                wish = next(script)
            except StopIteration as end:
                ended.append(end.value)
                continue
            self._seats[slot].script = script
            self._sit(slot, wish)
            return ended
        self._seats[slot].script = None
        return ended

    def _sit(self, slot: int, wish: Completion) -> None:
        room = self._slots.capacity
        if len(wish.ids) + wish.max_new_tokens > room:
            raise IndexError(f"slots of {room} tokens cannot hold {len(wish.ids)} and {wish.max_new_tokens} more")
        self._slots.rollback(slot, self._seats[slot].sit(wish, self._slots.lengths[slot]))


def choose(logits_RV: Tensor, samplings: list[Sampling], points: list[float]) -> list[int]:
    """A next token for each row: the argmax where greedy, else by inverse CDF at `points`, uniform in [0, 1).

    Temperature, then the `TOP_K` likeliest, then top-p as in `decoding.sampling.warp`.
    """
    greedy = [i for i, sampling in enumerate(samplings) if sampling.greedy]
    warm = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    chosen = dict(zip(greedy, logits_RV[greedy].argmax(dim=-1).tolist(), strict=True)) if greedy else {}
    if warm:
        top_RN, ids_RN = logits_RV[warm].topk(min(TOP_K, logits_RV.shape[1]), dim=-1)
        temperatures = torch.tensor([samplings[i].temperature for i in warm], device=top_RN.device)
        weights_RN = (top_RN.float() / temperatures[:, None]).softmax(dim=-1)
        top_ps = torch.tensor([samplings[i].top_p for i in warm], device=top_RN.device)
        weights_RN[weights_RN.cumsum(dim=-1) - weights_RN >= top_ps[:, None]] = 0.0
        cumulative_RN = weights_RN.cumsum(dim=-1)
        at = torch.tensor([points[i] for i in warm], device=top_RN.device)[:, None] * cumulative_RN[:, -1:]
        index_R1 = (cumulative_RN <= at).sum(dim=-1, keepdim=True)
        last_R1 = (weights_RN > 0).sum(dim=-1, keepdim=True) - 1  # rounding may put a point at the very end
        chosen |= dict(zip(warm, ids_RN.gather(1, torch.minimum(index_R1, last_R1))[:, 0].tolist(), strict=True))
    return [chosen[i] for i in range(len(samplings))]
