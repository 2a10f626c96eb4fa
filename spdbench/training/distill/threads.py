"""Batches side by side in threads, which share the weights and nothing else.

Two threads with a batch each get more done than both on one batch, product by product: nobody waits for the other at
every product's end, which on a machine that does other things as well takes most of the time. Must not know what is
computed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from typing import TypeVar

import torch

from spdbench.training.distill.continuous import Batch

Result = TypeVar("Result")
SECONDS_TO_STOP = 60.0
"""How long a thread is waited for that was told to stop: it does so after its step."""


class _Ended:
    """A thread's last word, with what it died of."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def results_of(batches: Sequence[Batch[Result]], num_threads: int) -> Generator[Result | None, None, None]:
    """The results of all batches as they come, with None now and then in between; `num_threads` are shared among them.

    Closing the iterator stops the threads. An error in one of them is raised here.
    """
    if len(batches) == 1:
        yield from batches[0].results()
        return
    found: queue.SimpleQueue[Result | _Ended | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work(batch: Batch[Result]) -> None:
        error: BaseException | None = None
        try:
            torch.set_num_threads(max(1, num_threads // len(batches)))  # of products called from this thread
            for result in batch.results():
                found.put(result)
                if stop.is_set():
                    break
        except BaseException as caught:
            error = caught
        found.put(_Ended(error))

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
