"""SPD's stages as processes that share one GPU: what a cycle takes there, and what of it is not a stage's work.

The published cycles beside it are of n + 1 GPUs. Without MPS, processes on one GPU take turns, and their kernels never
overlap: that is what is measured. NCCL refuses two processes on one GPU, so rows travel by pipe or gloo, and of NCCL
there is what one process can do. Must not know what other parts measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_models import SHAPES, random_decoder, random_source, stages_of
from benchmarks.gpu_parts import Found, Settings, attempt, synthetic, wait
from benchmarks.sides import Row
from spdbench.judge.metrics.bubble import full_cycles, lane_time, read_spans
from spdbench.models.target import DTYPES
from spdbench.pipeline.process import ProcessPipeline
from spdbench.pipeline.stages import StageWorkers
from spdbench.pipeline.transport import RowTransport, host_store, join_group
from spdbench.pipeline.worker import StageSpec
from spdbench_backends.spd.engine import PipelinedDecoding

PUBLISHED_MS = {4: 9.25, 8: 5.41}
"""A cycle of SPD's reference with Qwen3.5-4B, a GPU a stage and one for the drafter (SPD.md, section 9)."""

TIMEOUT_S = 60.0
FORCED = 0.9
NCCL_ROW = 2560
"""A row of a 4B shape."""

CALLS = 20


def processes(name: str, settings: Settings, count: int) -> Found:
    """So many processes on one GPU, by pipe and by gloo."""
    rows, notes = [], []
    transports: tuple[RowTransport, ...] = ("pipe", "gloo")
    for transport in transports:
        row, why = attempt(partial(breakdown, name, settings, count, transport))
        if row is None:
            notes.append(f"n={count}, {transport}: {why}")
        else:
            rows.append(row)
    if not rows:
        raise RuntimeError("\n".join(notes))
    return Found(rows, [], notes)


def nccl(settings: Settings) -> Found:
    """A group of one, joined as stages join theirs: a sum over it, and a row that it sends to itself."""
    kind: RowTransport = "nccl" if settings.on_gpu else "gloo"
    if settings.on_gpu:
        torch.cuda.set_device(settings.where)
    join_group(host_store(1), kind, 0, 1, TIMEOUT_S)
    sent = torch.arange(1, 1 + NCCL_ROW, dtype=torch.float32, device=settings.where)
    received = torch.zeros_like(sent)

    def add_up() -> None:
        dist.all_reduce(sent)

    def to_itself() -> None:
        both = [dist.P2POp(dist.isend, sent, 0), dist.P2POp(dist.irecv, received, 0)]
        for each in dist.batch_isend_irecv(both):
            each.wait()

    rows, notes = [], []
    sides = {"all-reduce": (add_up, sent), "send to itself": (to_itself, received)}
    if not settings.on_gpu:
        del sides["send to itself"]
        notes.append("nccl: skipped, there is no GPU; gloo added up in its place, and it sends nothing to itself")
    for what, (call, result) in sides.items():
        took, why = attempt(partial(timed_call, call, result, settings))
        if took is None:
            notes.append(f"{what}: {why}")
        else:
            rows.append({"transport": kind, "processes": 1, "call": what, "us": took})
    dist.destroy_process_group()
    if not rows:
        raise RuntimeError("\n".join(notes))
    return Found(rows, [], [*notes, "between stages on one GPU: not run, NCCL refuses two processes there"])


def timed_call(call: Callable[[], None], result: Tensor, settings: Settings) -> float:
    """Microseconds a call, once it is known to give what was sent."""
    call()
    if result.tolist() != list(range(1, 1 + NCCL_ROW)):
        raise RuntimeError(f"it gave {result[:4].tolist()} ...")
    wait(settings.where)
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    wait(settings.where)
    return round((time.perf_counter() - began) / CALLS * 1e6, 1)


def breakdown(name: str, settings: Settings, count: int, transport: RowTransport) -> Row:
    """A full cycle's parts, the second of two answers."""
    shape, stages = SHAPES[name], stages_of(SHAPES[name], count)
    specs = [
        StageSpec(
            index=index,
            num_stages=count,
            layers=layers,
            source=random_source(shape, settings.dtype),
            device=settings.device,
            threads=1,
            cores=None,
            hidden_indices=(),
            transport=transport,
            timeout_s=TIMEOUT_S,
        )
        for index, layers in enumerate(stages)
    ]
    ends = random_decoder(shape, DTYPES[settings.dtype], settings.where, range(1))
    pipeline = ProcessPipeline(StageWorkers(specs, TIMEOUT_S), specs, ends, ())
    try:
        request = settings.request(shape)
        for _ in range(2):
            decoding = PipelinedDecoding(pipeline, stages, synthetic(ends, request, FORCED), request)
            ends_ns, steps = [], []
            for step in decoding.steps():
                ends_ns.append(time.perf_counter_ns())
                steps.append(step)
            spans = decoding.spans()
    finally:
        pipeline.close()
    table = read_spans(spans, count)
    full = full_cycles(table, ends_ns)
    shares = lane_time(table, ends_ns).shares().model_dump()
    wall_s = (ends_ns[-1] - ends_ns[0]) / 1e9
    row: Row = {"shape": name, "n": count, "transport": transport, "P": FORCED}
    row["ms_per_token"] = round(wall_s * 1e3 / sum(len(step.token_ids) for step in steps[1:]), 4)
    if full is not None:
        cycle_s, stage_s = full.wall_s / full.num, full.stage_s / full.num
        row |= {
            "full_cycles": full.num,
            "cycle_ms": round(cycle_s * 1e3, 3),
            "slowest_stage_ms": round(stage_s * 1e3, 3),
        }
        row |= {"control_ms": round((cycle_s - stage_s) * 1e3, 3)}
    row["published_cycle_ms"] = PUBLISHED_MS.get(count, "")
    return row | {key: round(share, 4) for key, share in shares.items()}
