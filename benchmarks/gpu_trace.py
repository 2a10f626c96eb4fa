"""A profiler's trace of a few steps, kept as a file, and how often each step waits for the device.

Must not know what other parts measure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_drafts import Forced, longer
from benchmarks.gpu_models import SHAPES, stages_of
from benchmarks.gpu_parts import Found, Settings, room, synthetic
from benchmarks.sides import Goal, Row
from spdbench.decoding.captured import CapturedDecoding
from spdbench.decoding.speculate import Speculation
from spdbench.decoding.synthetic import parse_drafter, synthetic_drafts
from spdbench.decoding.tree_builder import DynamicTreeBuilder
from spdbench.models.cuda.captured_decoder import CapturedDecoder
from spdbench.models.decoder import Decoder
from spdbench.pipeline.streams import StreamsPipeline
from spdbench.types import GenerationRequest, Step
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.recorded import RecordedEagle, RecordedEagleDrafter
from spdbench_backends.spd.engine import PipelinedDecoding

WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::_local_scalar_dense",
)  # fmt: skip
LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaMemcpyAsync")
STEPS = 8


def trace(name: str, settings: Settings, folder: Path) -> Found:
    """Vanilla's steps, SPD's cycles and EAGLE's rounds, all recorded."""
    shape = SHAPES[name]
    decoder, request = settings.decoder(shape), settings.request(shape)
    stages = stages_of(shape, 4)
    pipeline = StreamsPipeline(decoder, stages, (), room(request))
    drafter = synthetic(decoder, request, 1.0)
    sides: dict[str, Iterator[Any]] = {
        "vanilla": CapturedDecoding(decoder, room(request)).decode(request),
        "streams": PipelinedDecoding(pipeline, stages, drafter, request).steps(),
        "eagle": recorded_eagle(decoder, longer(request)),
    }
    rows, goals = [], []
    for side, steps in sides.items():
        for _ in range(3):
            next(steps)
        file = folder / f"trace-{name}-{side}.json.gz"
        counts = profiled(steps, file, settings)
        row: Row = {"shape": name, "side": side, "steps": STEPS, "file": file.name}
        rows.append(row | {each: counts[each] / STEPS for each in (*WAITS, *LAUNCHES)})
        waits = sum(counts[each] for each in WAITS if each.startswith("cuda")) / STEPS
        if settings.on_gpu:
            goals.append(Goal(f"waits a step, {side} {name}", waits, at_most=1.0))
    return Found(rows, goals, [] if settings.on_gpu else ["rehearsed: there is no device to wait for"])


def recorded_eagle(decoder: Decoder, request: GenerationRequest) -> Iterator[Step]:
    """Rounds of a dynamic tree whose drafts are all wrong, so that there are enough of them."""
    weights = build_eagle(random_eagle(decoder, 0), decoder, aux_convention="auto", rope_theta=None, norm_output="auto")
    builder = DynamicTreeBuilder(5, 8, 24)
    target = CapturedDecoder(decoder, (1, builder.max_nodes), room(request), weights.aux)
    module = RecordedEagle(weights, decoder, builder, room(request))
    drafter = RecordedEagleDrafter(weights, decoder, builder, module)
    drafts = synthetic_drafts(parse_drafter("forced:0"), 0, decoder, request)
    return Speculation(target, Forced(drafter, drafts), request).steps()


def profiled(steps: Iterator[Any], file: Path, settings: Settings) -> Counter[str]:
    """How often what was called in `STEPS` steps. The profiler's own waits at both ends are not among them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if settings.on_gpu else [])]
    with profile(activities=activities) as found, torch.profiler.record_function("steps"):
        for _ in range(STEPS):
            next(steps)
    found.export_chrome_trace(str(file))
    events = found.events()
    assert events is not None
    whole = next(event for event in events if event.name == "steps").time_range
    inside = (event for event in events if whole.start <= event.time_range.start and event.time_range.end <= whole.end)
    return Counter(event.name for event in inside)
