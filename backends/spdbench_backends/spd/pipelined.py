"""What every pipelined backend shares: its stages, where they run, and its life. A method adds its drafter.

Must not know how drafts are made.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field

from spdbench.backend import BackendContext, BackendInfo, BackendOptions, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Span, Step

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice
    from spdbench.pipeline.interface import Pipeline
    from spdbench.pipeline.transport import RowTransport
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.engine import PipelinedDecoding


def _counts(value: Any) -> Any:
    """`8,8,7,7` or `8;8;7;7` as a list."""
    if not isinstance(value, str) or value == "auto":
        return value
    return [part for part in value.replace(";", ",").split(",") if part]


class PipelineOptions(BackendOptions):
    """Options of all pipelined backends."""

    stages: int | None = Field(
        None, ge=1, description="pipeline stages n; default: the drafter's, else 3 where that divides the layers"
    )
    stage_layers: Annotated[tuple[int, ...] | Literal["auto"] | None, BeforeValidator(_counts)] = Field(
        None, description="layers of each stage, e.g. 11,10,9; auto: balanced by measured times; default: equal stages"
    )
    executor: Literal["auto", "process", "inline"] = Field(
        "auto",
        description="process: a process for each stage; inline: all stages stepped in this process; "
        "auto: process for more than one stage",
    )
    transport: Literal["auto", "pipe", "gloo", "nccl"] = Field(
        "auto",
        description="how hidden states travel between processes; auto: nccl where every stage has a GPU of its own, "
        "else pipe",
    )
    timeout_s: float = Field(60.0, gt=0, description="a stage that takes longer for an answer is taken to hang")


class Pipelined(ABC):
    """Base of the backends of kind pipeline."""

    kind: ClassVar[BackendKind] = "pipeline"

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = cast(PipelineOptions, options)
        self._context = context
        self._stages: tuple[range, ...] = ()
        self._choice: DrafterChoice | None = None
        self._info: DrafterInfo | None = None
        self._pipeline: Pipeline | None = None
        self._decoding: PipelinedDecoding | None = None
        self._prepared: tuple[GenerationRequest, PipelineDrafter] | None = None

    @property
    def lossless(self) -> bool:
        """Dictated verdicts are for timing; what they let through is not the target's own."""
        return not self._context.drafter.startswith("forced:")

    @abstractmethod
    def _load_drafter(self, choice: DrafterChoice) -> None:
        """Sets the stages and what the drafter is made of."""

    @abstractmethod
    def _anchors(self) -> Collection[int]:
        """The hidden states that the drafter reads, by index."""

    @abstractmethod
    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter: ...

    def load(self) -> None:
        from spdbench.decoding.synthetic import parse_drafter

        choice = parse_drafter(self._context.drafter)
        self._load_drafter(choice)
        self._pipeline = self._start_pipeline()
        self._choice = choice

    def describe(self) -> BackendInfo:
        decoder = self._context.target.decoder
        last = len(self._stages) - 1
        devices = [self._device(stage) for stage in range(len(self._stages))]
        chosen: dict[str, str] = {"executor": self._executor}
        if self._executor == "process":
            chosen["transport"] = self._transport
        return BackendInfo(
            devices=tuple(dict.fromkeys(devices)),
            lane_bytes=tuple(decoder.bytes_per_token(layers, head=s == last) for s, layers in enumerate(self._stages)),
            stage_layers=tuple(len(layers) for layers in self._stages),
            drafter=self._info,
            chosen=chosen,
            kernels=decoder.kernels,
        )

    def prepare(self, request: GenerationRequest) -> None:
        self._prepared = (request, self._new_drafter(request))

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench_backends.spd.engine import PipelinedDecoding

        if self._prepared is None or self._prepared[0] is not request:
            self.prepare(request)
        assert self._prepared is not None
        assert self._pipeline is not None
        drafter, self._prepared = self._prepared[1], None
        self._decoding = PipelinedDecoding(self._pipeline, self._stages, drafter, request)
        return self._decoding.steps()

    def spans(self) -> Sequence[Span]:
        return () if self._decoding is None else self._decoding.spans()

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = self._decoding = self._prepared = self._choice = None

    @property
    def _executor(self) -> Literal["process", "inline"]:
        if self._options.executor == "auto":
            return "process" if len(self._stages) > 1 else "inline"
        return self._options.executor

    @property
    def _transport(self) -> RowTransport:
        if self._options.transport != "auto":
            return self._options.transport
        devices = [self._device(stage) for stage in range(len(self._stages))]
        own_gpus = len(set(devices)) == len(devices) and all(device.startswith("cuda") for device in devices)
        return "nccl" if own_gpus and len(devices) > 1 else "pipe"

    def _device(self, stage: int) -> str:
        """Devices are dealt to the stages in order."""
        devices = self._context.devices
        return devices[stage % len(devices)]

    def _cut(self, drafters_stages: int | None) -> tuple[range, ...]:
        from spdbench.models.partition import split_by_counts, split_evenly

        options, num_layers = self._options, self._context.target.config.num_layers
        try:
            if isinstance(options.stage_layers, tuple):
                if options.stages not in (None, len(options.stage_layers)):
                    raise InputError(f"stages={options.stages}: stage_layers names {len(options.stage_layers)} stages.")
                return split_by_counts(num_layers, options.stage_layers)
            num_stages = options.stages or drafters_stages or _usual(num_layers)
            if options.stage_layers == "auto":
                return self._balanced(num_stages)
            return split_evenly(num_layers, num_stages)
        except InputError as error:
            raise InputError(f"-o {self._context.label}.{error}") from None

    def _balanced(self, num_stages: int) -> tuple[range, ...]:
        """Stages that take the same time, the last of which has the target's head too."""
        from spdbench.models.partition import measure_stage_costs, split_by_cost

        costs = measure_stage_costs(self._context.target.decoder, self._threads(num_stages))
        return split_by_cost(self._context.target.config.num_layers, num_stages, costs.head_s / costs.layer_s)

    def _threads(self, num_stages: int) -> int:
        """Threads of each stage: all together no more than the run was given, where there are enough."""
        return max(1, self._context.threads // num_stages)

    def _start_pipeline(self) -> Pipeline:
        decoder, anchors = self._context.target.decoder, self._anchors()
        if self._executor == "inline":
            from spdbench.pipeline.inline import InlinePipeline

            return InlinePipeline(decoder, self._stages, anchors)
        from spdbench.pipeline.process import ProcessPipeline
        from spdbench.pipeline.stages import StageWorkers
        from spdbench.pipeline.worker import StageSpec

        count, threads, source = len(self._stages), self._threads(len(self._stages)), self._context.target.source
        cores = sorted(os.sched_getaffinity(0))
        pinned = count > 1 and count * threads <= len(cores)
        specs = [
            StageSpec(
                index=index,
                num_stages=count,
                layers=layers,
                source=source,
                device=self._device(index),
                threads=threads,
                cores=frozenset(cores[index * threads : (index + 1) * threads]) if pinned else None,
                wanted=tuple(anchor for anchor in sorted(anchors) if layers.start < anchor <= layers.stop),
                transport=self._transport,
                timeout_s=self._options.timeout_s,
            )
            for index, layers in enumerate(self._stages)
        ]
        return ProcessPipeline(StageWorkers(specs, self._options.timeout_s), specs, decoder, anchors)


def _usual(num_layers: int) -> int:
    if num_layers % 3 == 0:
        return 3
    return next((n for n in range(2, num_layers + 1) if num_layers % n == 0), 1)
