"""What the pipelined backends share: stages, where they run, and the drafter's device. A method adds its drafter."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.errors import InputError
from spdbench.processors import usable_processors
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.drafting import Drafting, F
from spdbench_backends.local import described_snapshots

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.models.decoder import Decoder
    from spdbench.pipeline.interface import Pipeline
    from spdbench.pipeline.ranks.remote import Ranks
    from spdbench.pipeline.streams import CoDrafter, StreamsPipeline
    from spdbench.pipeline.transport import RowTransport
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.engine import PipelinedDecoding


def counts_of(value: Any) -> Any:
    """`8,8,7,7` or `8;8;7;7` as a list."""
    if not isinstance(value, str) or value == "auto":
        return value
    return [part for part in value.replace(";", ",").split(",") if part]


class PipelineOptions(BackendOptions):
    """Options of all pipelined backends."""

    stages: int | None = Field(
        None, ge=1, description="pipeline stages n; default: the drafter's, else 3 where that divides the layers"
    )
    stage_layers: Annotated[tuple[int, ...] | Literal["auto"] | None, BeforeValidator(counts_of)] = Field(
        None, description="layers of each stage, e.g. 11,10,9; auto: balanced by measured times; default: equal stages"
    )
    executor: Literal["auto", "process", "inline", "streams", "torchrun"] = Field(
        "auto",
        description="process: a process for each stage; inline: all stages stepped in this process; "
        "streams: all stages in parallel on one GPU, captured in CUDA graphs (on a CPU a rehearsal); "
        "torchrun: a rank for each stage, also on other nodes, and rank 0 measures; "
        "auto: streams where there is one GPU, else process for more than one stage",
    )
    context: int | None = Field(
        None, ge=64, le=2**20, description="streams: tokens of the longest sequence; default: 4096, or the model's own"
    )
    transport: Literal["auto", "pipe", "gloo", "nccl"] = Field(
        "auto",
        description="how hidden states travel between processes; auto: nccl where every stage has a GPU of its own, "
        "else pipe",
    )
    timeout_s: float = Field(
        60.0, gt=0, le=1e6, description="a stage that does not answer in this time counts as hanging"
    )


class Pipelined(Drafting["PipelineDrafter"]):
    """Base of the backends of kind pipeline."""

    kind: ClassVar[BackendKind] = "pipeline"
    Options: ClassVar[type[BackendOptions]] = PipelineOptions
    method: ClassVar[str]
    """As `config.json` of a drafter's folder has it."""

    _options: PipelineOptions
    _stages: tuple[range, ...] = ()
    _ends: Decoder | None = None
    _pipeline: Pipeline | None = None
    _decoding: PipelinedDecoding | None = None

    @abstractmethod
    def _anchors(self) -> Collection[int]:
        """The hidden states that the drafter reads, by index."""

    def load(self) -> None:
        self._check_context()
        ranks = self._ranks if self._executor == "torchrun" else None  # before weights are loaded
        super().load()
        if ranks is not None:
            ranks.require_stages(len(self._stages), f"-o {self._context.label}.executor=torchrun")
        self._pipeline = self._start_pipeline()

    def describe(self) -> BackendInfo:
        decoder = self._decoder
        last = len(self._stages) - 1
        devices = self._stage_devices
        if self._anchors():
            devices.append(self._drafters_device)
        chosen: dict[str, str] = {"executor": self._executor}
        if self._in_processes:
            chosen["transport"] = self._transport
        if self._executor == "torchrun":
            chosen |= self._ranks.describe()
        chosen |= described_snapshots(decoder, self._stages, self._num_snapshots)
        return BackendInfo(
            devices=tuple(dict.fromkeys(devices)),
            lane_bytes=tuple(decoder.bytes_per_token(layers, head=s == last) for s, layers in enumerate(self._stages)),
            stage_layers=tuple(len(layers) for layers in self._stages),
            drafter=self._info,
            chosen=chosen,
            kernels=decoder.kernels,
        )

    def spans(self) -> Sequence[Span]:
        return () if self._decoding is None else self._decoding.spans()

    def close(self) -> None:
        pipeline = self._pipeline
        super().close()
        if pipeline is not None:
            pipeline.close()

    def _decode(self, request: GenerationRequest, drafter: PipelineDrafter) -> Iterator[Step]:
        from spdbench.models.torch_utils import with_threads
        from spdbench_backends.spd.engine import PipelinedDecoding

        self._decoding = PipelinedDecoding(self._loaded(self._pipeline), self._stages, drafter, request)
        steps = self._decoding.steps()
        return with_threads(steps, self._drafters_threads) if self._in_processes else steps

    @property
    def _executor(self) -> Literal["process", "inline", "streams", "torchrun"]:
        if self._options.executor != "auto":
            return self._options.executor
        if self._share_a_gpu:
            return "inline" if self._has_branches else "streams"
        return "process" if len(self._stages) > 1 else "inline"

    @property
    def _has_branches(self) -> bool:
        """True if more than one token of the same position can be in flight."""
        return False

    @property
    def _in_processes(self) -> bool:
        return self._executor in ("process", "torchrun")

    @property
    def _ranks(self) -> Ranks:
        from spdbench.pipeline.ranks.remote import joined_ranks

        return joined_ranks(f"-o {self._context.label}.executor=torchrun")

    @property
    def _num_snapshots(self) -> list[int]:
        """States of recurrent layers that each stage keeps to go back to."""
        from spdbench.pipeline.inline import snapshots_in_step
        from spdbench.pipeline.worker import snapshots_ahead

        count = len(self._stages)
        if self._in_processes:
            return [snapshots_ahead(count)] * count
        return [snapshots_in_step(stage, count) for stage in range(count)]

    @property
    def _share_a_gpu(self) -> bool:
        """True if one GPU is all there is. Processes would take turns on it; captured stages run in parallel."""
        from spdbench.models.cuda.captured_decoder import is_capturable

        devices = set(self._context.devices)
        return len(devices) == 1 and devices.pop().startswith("cuda") and is_capturable(self._decoder)

    @property
    def _transport(self) -> RowTransport:
        if self._options.transport != "auto":
            return self._options.transport
        return "nccl" if self._have_own_gpus and len(self._stages) > 1 else "pipe"

    @property
    def _have_own_gpus(self) -> bool:
        devices = self._stage_devices
        return len(set(devices)) == len(devices) and all(device.startswith("cuda") for device in devices)

    @property
    def _stage_devices(self) -> list[str]:
        """Stages take the devices in turn; streams share one, and ranks have their nodes'."""
        if self._executor == "torchrun":
            return self._ranks.devices(self._context.devices)
        devices = self._context.devices[:1] if self._executor == "streams" else self._context.devices
        return [devices[stage % len(devices)] for stage in range(len(self._stages))]

    @property
    def _drafters_device(self) -> str:
        """A device of its own if there are more devices than stages, else the first."""
        devices, count = self._context.devices, len(self._stages)
        return devices[count] if self._executor == "process" and len(devices) > count else devices[0]

    @property
    def _drafters_target(self) -> Decoder:
        """The target that heads are built on: with its embedding and its head on the drafter's device."""
        from spdbench.models.target import find_device

        target, device = self._context.target.own_decoder, find_device(self._drafters_device)
        if device == target.device:
            return target
        if self._ends is None:
            self._ends = target.embedding_and_head_on(device)
        return self._ends

    def _find_head(
        self,
        choice: DrafterChoice,
        read: Callable[[Path], F],
        draw: Callable[[Decoder, tuple[range, ...], int], F],
    ) -> F | None:
        """The head that the user chose, None for a synthetic drafter; also cuts the model into stages that fit it.
        `draw(target, stages, seed)` is an untrained head."""
        target, counts = self._context.target, self._options.stage_layers
        if target.unsupported_reason and not choice.is_synthetic:
            raise InputError(
                f"--drafter {choice.text}: {self.method.upper()} heads are made of spdbench's own layers, which do not "
                f"know this model ({target.unsupported_reason}). Give oracle:P or forced:P."
            )
        is_read = choice.kind in ("path", "auto")
        if not is_read:
            self._stages = self._cut(None)
        file = self._read_drafter(
            choice,
            self.method,
            read,
            lambda: draw(target.own_decoder, self._stages, self._context.seed),
            len(counts) if isinstance(counts, tuple) else self._options.stages,
        )
        if is_read:
            assert file is not None
            self._stages = self._cut(file.config.num_stages, self._trained_cut(file))
        return file

    def _trained_cut(self, file: F) -> tuple[range, ...] | None:
        """The stages that a drafter's config lists, if it does."""
        from spdbench.models.partition import split_by_counts

        layers = getattr(file.config, "stage_layers", None)
        try:
            return None if layers is None else split_by_counts(self._context.target.config.num_layers, layers)
        except InputError as error:
            raise file.error(f"config: {error}") from None

    def _cut(self, drafters_stages: int | None, trained_cut: tuple[range, ...] | None = None) -> tuple[range, ...]:
        """The stages that the options name, else those that the drafter was trained for, else equal ones."""
        from spdbench.models.partition import split_by_counts, split_evenly, usual_stages

        options, num_layers = self._options, self._context.target.config.num_layers
        try:
            if isinstance(options.stage_layers, tuple):
                if options.stages not in (None, len(options.stage_layers)):
                    raise InputError(f"stages={options.stages}: stage_layers names {len(options.stage_layers)} stages.")
                return split_by_counts(num_layers, options.stage_layers)
            num_stages = options.stages or drafters_stages or usual_stages(num_layers)
            if options.stage_layers == "auto":
                return self._balanced(num_stages)
            if trained_cut is not None and len(trained_cut) == num_stages:
                return trained_cut
            return split_evenly(num_layers, num_stages)
        except InputError as error:
            raise InputError(f"-o {self._context.label}.{error}") from None

    def _balanced(self, num_stages: int, drafting_s: float = 0.0) -> tuple[range, ...]:
        """Stages of equal time. The first shares its cores with the drafter if none are left for it."""
        from spdbench.pipeline.balance import balanced_stages

        threads = self._threads(num_stages)
        shared = num_stages * threads >= self._context.threads
        return balanced_stages(self._decoder, num_stages, threads, drafting_s if shared else 0.0, self._stored)

    def _threads(self, num_stages: int) -> int:
        """Threads of each stage: together no more than the run has, where it has at least one a stage."""
        return max(1, self._context.threads // num_stages)

    @property
    def _drafters_threads(self) -> int:
        """The threads that the stages leave; more would wait for the stages' threads."""
        count = len(self._stages)
        return max(1, self._context.threads - count * self._threads(count))

    def _check_context(self) -> None:
        context, most = self._options.context, self._context.target.config.max_positions
        if context is None:
            return
        if self._executor != "streams":
            raise self._option_error("context", f"is used with {self._context.label}.executor=streams only")
        if context > most:
            raise self._option_error("context", f"the model has {most} positions")

    def _start_pipeline(self) -> Pipeline:
        anchors = self._anchors()
        if self._executor == "inline":
            from spdbench.pipeline.inline import InlinePipeline

            return InlinePipeline(self._decoder, self._stages, anchors)
        if self._executor == "streams":
            return self._start_streams()
        from spdbench.pipeline.process import ProcessPipeline
        from spdbench.pipeline.stages import StageWorkers
        from spdbench.pipeline.worker import StageSpec

        if self._transport == "nccl" and not self._have_own_gpus:
            raise self._option_error(
                "transport",
                f"each of the {len(self._stages)} stages needs a GPU of its own, but --devices are "
                f"{','.join(self._context.devices)}. Allowed: auto, pipe, gloo.",
            )
        count, threads, source = len(self._stages), self._threads(len(self._stages)), self._context.target.source
        cores = usable_processors()
        pinned = hasattr(os, "sched_setaffinity") and count > 1 and count * threads <= len(cores)
        specs = [
            StageSpec(
                index=index,
                num_stages=count,
                layers=layers,
                source=source,
                device=device,
                threads=threads,
                cores=frozenset(cores[index * threads : (index + 1) * threads]) if pinned else None,
                hidden_indices=tuple(anchor for anchor in sorted(anchors) if layers.start < anchor <= layers.stop),
                transport=self._transport,
                timeout_s=self._options.timeout_s,
            )
            for index, (layers, device) in enumerate(zip(self._stages, self._stage_devices, strict=True))
        ]
        start = None
        if self._executor == "torchrun":
            specs = self._ranks.place(specs, self._context.devices, self._context.threads)
            start = self._ranks.start_stages
        workers = StageWorkers(specs, self._options.timeout_s, self._context.label, start)
        return ProcessPipeline(workers, specs, self._ends or self._decoder, anchors)

    def _start_streams(self) -> StreamsPipeline:
        from spdbench.models.cuda.captured_decoder import refuse_uncapturable, usual_capacity
        from spdbench.pipeline.streams import StreamsPipeline

        asked = f"-o {self._context.label}.executor=streams"
        decoder = refuse_uncapturable(self._decoder, asked, "process, inline")
        capacity = self._options.context or usual_capacity(decoder)
        return StreamsPipeline(decoder, self._stages, self._anchors(), capacity, self._co_drafter(capacity))

    def _co_drafter(self, capacity: int) -> CoDrafter | None:  # noqa: ARG002 - for methods that have one
        """The drafter that is captured together with the stages; None where drafts are made outside of the cycle."""
        return None
