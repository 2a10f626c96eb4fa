"""Continuous batching: scripts ask for completions, and a seat whose script has ended gets the next one at once.

A script is a generator: it yields the completion that it wants and is sent the new ids. Its seat keeps what it has
read, so that a request which continues the last one reads only what is new, and the system prompt that all share is
read once a seat. Prompts are read one token a step, like anything else: in a full batch a token costs the same whether
it is read or written.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spdbench.decoding.sampling import draw_rows, require_number
from spdbench.models.layer_ops import next_tokens
from spdbench.models.torch_utils import to_device
from spdbench.training.distill.batched import SingleSlot, Slots
from spdbench.types import Sampling

TOP_K = 64
"""Sampling is from this many most probable tokens at most: the rest is mostly noise, and sorting the whole vocabulary
for each row would cost as much as the layers do."""
SECONDS_TO_STOP = 60.0
"""How long to wait for a thread that has been asked to stop; it stops after its step."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """A request for new ids after `ids`, up to the first of `eos_ids`, which is included, or `max_new_tokens`."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]


Script = Generator[Completion, tuple[int, ...], Result]


@dataclass
class _Seat(Generic[Result]):
    """One slot's script and the completion that it waits for."""

    script: Script[Result] | None = None
    request: Completion | None = None
    text: list[int] = field(default_factory=list)
    """The request's ids, then the new ones; the slot has read the first `length` of them."""
    random: random.Random = field(default_factory=random.Random)


class Batch(Generic[Result]):
    """Runs scripts in parallel; `num_written` counts all new ids.

    Scripts run while `lock` is held, so that batches in several threads may take them from one iterator, and scripts
    may share state.
    """

    def __init__(
        self,
        slots: Slots | SingleSlot,
        scripts: Iterator[Script[Result]],
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._slots = slots
        self._scripts = scripts
        self._lock = lock or nullcontext()
        self._seats: list[_Seat[Result]] = [_Seat() for _ in slots.lengths]
        self.num_written = 0

    def results(self) -> Iterator[Result | None]:
        """The results of scripts in the order in which they end; None after every step in which none ended."""
        ended = [result for slot in range(len(self._seats)) for result in self._run_scripts(slot)]
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
        requests = [request for i in due if (request := seats[i].request) is not None]
        samplings = [request.sampling for request in requests]
        points = [0.0 if how.greedy else seats[i].random.random() for i, how in zip(due, samplings, strict=True)]
        tokens = choose(slots.logits(rows), samplings, points)
        self.num_written += len(tokens)
        ended: list[Result] = []
        for i, request, token in zip(due, requests, tokens, strict=True):
            text = seats[i].text
            text.append(token)
            if token in request.eos_ids or len(text) == len(request.ids) + request.max_new_tokens:
                ended += self._run_scripts(i, tuple(text[len(request.ids) :]))
        return ended

    def _run_scripts(self, slot: int, new_ids: tuple[int, ...] | None = None) -> list[Result]:
        """Sends `new_ids` to the slot's script, and starts further scripts until one wants a completion.

        Returns the results of those that ended.
        """
        seat, ended = self._seats[slot], list[Result]()
        with self._lock:
            while True:
                if seat.script is None:
                    seat.script = next(self._scripts, None)
                    if seat.script is None:
                        return ended
                try:
                    request = next(seat.script) if new_ids is None else seat.script.send(new_ids)
                except StopIteration as end:
                    ended.append(end.value)
                    seat.script = new_ids = None
                    continue
                self._begin(slot, request)
                return ended

    def _begin(self, slot: int, request: Completion) -> None:
        """Gives the slot a request. What it has read of the same ids stays; at least the last id is read again."""
        seat, room, needed = self._seats[slot], self._slots.capacity, len(request.ids)
        if needed + request.max_new_tokens > room:
            raise IndexError(f"slots of {room} tokens cannot hold {needed} and {request.max_new_tokens} more")
        shared, longest = 0, min(self._slots.lengths[slot], needed - 1)
        while shared < longest and seat.text[shared] == request.ids[shared]:
            shared += 1
        seat.request, seat.text, seat.random = request, list(request.ids), random.Random(request.seed)
        self._slots.rollback(slot, shared)


def results_of(batches: Sequence[Batch[Result]], num_threads: int) -> Generator[Result | None, None, None]:
    """The results of all batches, each in a thread of its own, with None now and then in between.

    The batches share `num_threads`. Two threads with a batch each do more than both on one batch: they do not wait for
    each other at the end of every matrix multiplication, which on a machine with other work takes most of the time.
    Closing the iterator stops the threads; an error in one of them is raised here.
    """
    if len(batches) == 1:
        yield from batches[0].results()
        return
    found: queue.SimpleQueue[Result | _Ended | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work(batch: Batch[Result]) -> None:
        ended = _Ended()
        try:
            torch.set_num_threads(max(1, num_threads // len(batches)))  # for multiplications called from this thread
            for result in batch.results():
                found.put(result)
                if stop.is_set():
                    break
        except BaseException as error:
            ended.error = error
        found.put(ended)

    threads = [threading.Thread(target=work, args=(batch,), daemon=True) for batch in batches]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            result = found.get()
            if not isinstance(result, _Ended):
                yield result
            elif result.error is not None:
                raise result.error
            else:
                running -= 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS_TO_STOP)


@dataclass
class _Ended:
    """The last thing that a thread reports, with the error that ended it."""

    error: BaseException | None = None


def choose(logits_RV: Tensor, samplings: list[Sampling], points: list[float]) -> list[int]:
    """A next token for each row: the argmax where greedy, else by inverse CDF at `points`, uniform in [0, 1).

    Raises:
        PromptFailedError: a logit is NaN.
    """
    greedy = [i for i, sampling in enumerate(samplings) if sampling.greedy]
    sampled = [i for i, sampling in enumerate(samplings) if not sampling.greedy]
    chosen = dict(zip(greedy, next_tokens(logits_RV[greedy]).tolist(), strict=True)) if greedy else {}
    if sampled:
        ids_RN, weights_RN = likeliest(logits_RV[sampled], [samplings[i] for i in sampled])
        points_R = to_device([points[i] for i in sampled], ids_RN.device, torch.float64)
        index_R = draw_rows(weights_RN, points_R)  # negative for a row with NaN
        drawn_R = torch.where(index_R < 0, index_R, ids_RN.gather(1, index_R.clamp(min=0)[:, None])[:, 0])
        chosen |= dict(zip(sampled, drawn_R.tolist(), strict=True))
    return [require_number(chosen[i]) for i in range(len(samplings))]


def likeliest(logits_RV: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Each row's `TOP_K` most probable tokens and their weights, `[R, N]`: those of `decoding.sampling.warp` with this
    top-k, whose rows share one temperature and one top-p and are sorted whole. For 32 rows of 49,152 logits that
    is 1.7 ms where `warp` row by row takes 23 (one core); a test holds the weights of both against each other."""
    top_RN, ids_RN = logits_RV.topk(min(TOP_K, logits_RV.shape[1]), dim=-1)
    settings = [(sampling.temperature, sampling.top_p) for sampling in samplings]
    temperatures_R1, top_ps_R1 = torch.tensor(settings, device=top_RN.device).T[..., None]
    weights_RN = (top_RN.float() / temperatures_R1).softmax(dim=-1)
    return ids_RN, weights_RN.masked_fill(weights_RN.cumsum(dim=-1) - weights_RN >= top_ps_R1, 0.0)
