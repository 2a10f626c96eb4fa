"""Stages that compute in separate processes without any messages between them: the reference for a pipeline.

Each loops over one row with the layers, threads and cores of its pipeline's worker.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from benchmarks.memory import mapped_bytes, status_bytes
from spdbench.models.layer_ops import argmax
from spdbench.pipeline.processes.worker import StageSpec
from spdbench.processors import die_with


class StageLoops:
    """One process for each of `specs`. Use as a context manager."""

    def __init__(self, specs: Sequence[StageSpec]) -> None:
        context = get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for spec in specs:
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(spec, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
        self.base_bytes: list[int] = [end.recv() for end in self._ends]
        """Memory of each process after it has computed with one layer, without that layer."""

    def __enter__(self) -> StageLoops:
        return self

    def __exit__(self, *_: object) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            end.send(None)
            process.join()

    def together(self, start: int, num_rows: int) -> list[float]:
        """Median seconds a row of each stage over rows from position `start`, with all stages computing at once."""
        for end in self._ends:
            end.send((start, num_rows))
        return [end.recv() for end in self._ends]

    def alone(self, start: int, num_rows: int) -> list[float]:
        """The same, one stage after the other."""
        found = []
        for end in self._ends:
            end.send((start, num_rows))
            found.append(end.recv())
        return found


def held_bytes(process: int, folder: Path) -> int:
    """A process's anonymous memory and the resident pages of the files in `folder` that it maps."""
    return status_bytes("RssAnon", process) + mapped_bytes(folder, process)


@torch.inference_mode()
def _serve(spec: StageSpec, end: Connection, parent: int) -> None:
    die_with(parent)
    torch.set_num_threads(spec.threads)
    if spec.cores is not None:
        os.sched_setaffinity(0, spec.cores)
    one = range(1, 2)
    decoder: Any = spec.source.load(one, spec.device)
    row = torch.randn(1, decoder.config.hidden_size).to(decoder.dtype)
    decoder.forward(row.expand(128, -1).contiguous(), 0, decoder.new_cache(129, one), one)
    decoder.forward(row, 0, decoder.new_cache(1, one), one)
    end.send(held_bytes(os.getpid(), spec.source.files.directory) - decoder.bytes_per_token(one, head=False))
    decoder = spec.source.load(spec.layers, spec.device)
    while (request := end.recv()) is not None:
        start, num_rows = request
        cache = decoder.new_cache(start + num_rows, spec.layers)
        decoder.forward(row.expand(start, -1).contiguous(), 0, cache, spec.layers)
        seconds = []
        for position in range(start, start + num_rows):
            began = time.perf_counter()
            hidden, _ = decoder.forward(row, position, cache, spec.layers)
            if spec.is_last:
                int(argmax(decoder.logits(hidden)[0]))
            seconds.append(time.perf_counter() - began)
        end.send(statistics.median(seconds))
