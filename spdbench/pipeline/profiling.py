"""Measures what every method shares, for a profile: layers by rows and context, the output head, a
verdict, a cycle's bookkeeping, and messages between processes.

Row counts and contexts take turns round by round, so that a slow moment affects all of them.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter

import torch

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft, verify_draft
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.models.target import find_device
from spdbench.models.torch_utils import median_seconds
from spdbench.pipeline.messages import Header, Kind
from spdbench.pipeline.schedule import PipelineSchedule
from spdbench.pipeline.transport import Link, LinkClosedError
from spdbench.profiles.profile import make_key
from spdbench.types import Sampling

CONTEXTS = (128, 512, 1024, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 7
MESSAGE_ROWS = (1, 64)
MESSAGES = 200
ECHO_TIMEOUT_S = 60.0


@torch.inference_mode()
def target_seconds(decoder: TargetDecoder) -> dict[str, float]:
    """A layer, the mean over all, and the head, for all row counts and the contexts that the model has."""
    most = decoder.config.max_positions
    contexts = [each for each in CONTEXTS if each + ROWS[-1] <= most] or [max(1, most - ROWS[-1])]
    rows = [count for count in ROWS if count < most]
    work: dict[str, Callable[[], object]] = {}
    for context in contexts:
        cache = decoder.new_cache(context + rows[-1], num_snapshots=rows[-1])
        decoder.forward(decoder.embed(decoder.ids([0] * context)), 0, cache)
        for count in rows:
            work[make_key("layer", context=context, rows=count)] = _forward(decoder, cache, context, count)
    for count in rows:
        hidden_SM = decoder.embed(decoder.ids([0] * count))
        work[make_key("head", rows=count)] = lambda hidden_SM=hidden_SM: argmax(decoder.logits(hidden_SM)).tolist()  # type: ignore[misc]
    found = _in_turn(work)
    layers = len(decoder.layers)
    return {key: seconds / layers if key.startswith("layer") else seconds for key, seconds in found.items()}


def _forward(decoder: TargetDecoder, cache: object, context: int, count: int) -> Callable[[], object]:
    rows_SM = decoder.embed(decoder.ids([0] * count))

    def forward() -> None:
        hidden_SM, _ = decoder.forward(rows_SM, context, cache)
        hidden_SM[-1, 0].item()  # waits for a GPU
        cache.rollback(context)  # type: ignore[attr-defined]

    return forward


def _in_turn(work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(ROUNDS + 1):  # the first warms up
        for key, run in work.items():
            began = perf_counter()
            run()
            times[key].append(perf_counter() - began)
    return {key: median(seconds[1:]) for key, seconds in times.items()}


@torch.inference_mode()
def control_seconds(decoder: TargetDecoder) -> dict[str, float]:
    """A greedy verdict on logits, and the schedule's work in a cycle."""
    logits_V = torch.zeros(decoder.config.vocab_size, device=decoder.device)
    draft, sampler = Draft(0), Sampler(Sampling(), 0)
    schedule = PipelineSchedule(4)
    schedule.start(0, 0)

    def run_cycle() -> None:
        cycle = schedule.cycle()
        if cycle.newest is not None:
            schedule.draft([(cycle.newest, 0)])
        if cycle.completing is None:
            schedule.fill()
        else:
            schedule.accept(schedule.children()[0])

    return {
        make_key("verify"): median_seconds(lambda: verify_draft(logits_V, draft, sampler), rounds=50),
        make_key("host"): median_seconds(run_cycle, rounds=50),
    }


def message_seconds(decoder: TargetDecoder, devices: tuple[str, ...]) -> dict[str, float]:
    """Hidden states from this process to another one on the next device, by bytes: half a way there and back."""
    context, width, dtype = get_context("spawn"), decoder.config.hidden_size, decoder.dtype
    here, there = context.Pipe()
    other = devices[1 % len(devices)]
    process = context.Process(target=_echo, args=(there, width, dtype, other), daemon=True)
    process.start()
    there.close()
    try:
        link = Link(here, width, dtype, decoder.device)
        if not here.poll(ECHO_TIMEOUT_S):
            raise TimeoutError("the process that answers messages did not start")
        here.recv_bytes()
        found = {}
        for rows in MESSAGE_ROWS:
            rows_SM = torch.zeros(rows, width, dtype=dtype, device=decoder.device)
            header = Header(Kind.RESULT, num_rows=rows)

            def there_and_back(header: Header = header, rows_SM: torch.Tensor = rows_SM) -> None:
                link.send(header, rows_SM)
                link.rows(*link.receive()).sum().item()

            key = make_key("message", bytes=rows * width * dtype.itemsize)
            found[key] = median_seconds(there_and_back, rounds=MESSAGES) / 2
        return found
    finally:
        here.close()  # the other process ends by that
        process.join(ECHO_TIMEOUT_S)
        if process.is_alive():
            process.kill()


def _echo(connection: Connection, width: int, dtype: torch.dtype, device: str) -> None:
    """Sends back what arrives, by way of its device, until the other end closes."""
    link = Link(connection, width, dtype, find_device(device))
    connection.send_bytes(b"ready")
    while True:
        try:
            header, payload = link.receive()
        except LinkClosedError:
            return
        link.send(header, link.rows(header, payload))
