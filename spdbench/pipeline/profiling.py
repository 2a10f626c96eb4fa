"""What a model's pieces take on this machine.

For a profile, what every method shares: layers by rows and context, the output head, a verdict, a cycle's bookkeeping,
and messages between processes. To balance stages and to choose a layout (`models.partition`): layers of each kind, and
the head, for one row.

Row counts and contexts take turns round by round, so that a slow moment affects all of them.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from statistics import median
from time import perf_counter

import torch

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.stored_costs import StoredCosts
from spdbench.decoding.verify import Draft, verify_draft
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.models.target import find_device
from spdbench.models.torch_utils import median_seconds
from spdbench.pipeline.processes.children import child_process
from spdbench.pipeline.processes.messages import Header, Kind
from spdbench.pipeline.processes.transport import Link, LinkClosedError
from spdbench.pipeline.schedule import PipelineSchedule
from spdbench.profiles.profile import make_key
from spdbench.types import Sampling

CONTEXTS = (128, 512, 1024, 4096)
BALANCE_CONTEXT = 128
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
def measured_times(
    decoder: TargetDecoder, threads: int, stored: StoredCosts | None = None
) -> tuple[list[float], float]:
    """Seconds of a row's way through each layer, and of the head and its argmax, with `threads` threads, for a decoder
    that holds all layers; an exit head has no embedding. Times come from `stored` where they are there."""
    kinds = _layer_kinds(decoder)
    row_1M = _zero_rows(decoder, 1)

    def measure() -> list[float]:
        layers_s = [_one_row_seconds(decoder, alike, threads) / sum(map(len, alike)) for alike in kinds.values()]
        return [*layers_s, median_seconds(lambda: argmax(decoder.logits(row_1M)).item(), threads=threads)]

    keys = [make_key("balance", part=part, threads=threads) for part in (*kinds, "head")]
    *each_s, head_s = stored.seconds(keys, measure) if stored else measure()
    by_layer = {layer: s for alike, s in zip(kinds.values(), each_s, strict=True) for ran in alike for layer in ran}
    return [by_layer[layer] for layer in decoder.layers], head_s


def _zero_rows(decoder: TargetDecoder, count: int) -> torch.Tensor:
    """Hidden states of zeros: `[count, M]`."""
    return torch.zeros(count, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)


def _layer_kinds(decoder: TargetDecoder) -> dict[str, list[range]]:
    """Layers by kind, those of which take the same time: all at once, or recurrent ones and others one by one."""
    ranges = [range(layer, layer + 1) for layer in decoder.layers]
    recurrent = [each for each in ranges if decoder.snapshot_bytes(each)]
    if not recurrent:
        return {"layer": [decoder.layers]}
    others = [each for each in ranges if each not in recurrent]
    return {"recurrent": recurrent} | ({"layer": others} if others else {})


def _one_row_seconds(decoder: TargetDecoder, ranges: Sequence[range], threads: int) -> float:
    """Seconds of a row's way through all `ranges`."""
    prompt_SM = _zero_rows(decoder, BALANCE_CONTEXT)
    caches = [decoder.new_cache(BALANCE_CONTEXT + 1, layers, num_snapshots=1) for layers in ranges]
    for layers, cache in zip(ranges, caches, strict=True):
        decoder.forward(prompt_SM, 0, cache, layers)

    def forward() -> None:
        for layers, cache in zip(ranges, caches, strict=True):
            cache.rollback(BALANCE_CONTEXT)
            row_1M, _ = decoder.forward(prompt_SM[:1], BALANCE_CONTEXT, cache, layers)
        row_1M.sum().item()

    return median_seconds(forward, threads=threads)


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
    width, dtype = decoder.config.hidden_size, decoder.dtype
    here, there = Pipe()
    other = devices[1 % len(devices)]
    process = child_process(_echo, there, width, dtype, other, name="spdbench-echo")
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
