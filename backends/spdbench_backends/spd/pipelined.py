"""What the pipelined backends share: the cut into stages, and the pipeline of these. A method adds its drafter."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from spdbench.backend import BackendInfo, BackendOptions
from spdbench.errors import InputError
from spdbench.models.partition import Layout
from spdbench.processors import usable_processors
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.drafting import F
from spdbench_backends.local import described_snapshots
from spdbench_backends.spd.placement import PipelineOptions, Placed

if TYPE_CHECKING:
    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.models.decoder import Decoder
    from spdbench.pipeline.interface import Pipeline
    from spdbench.pipeline.output_head import HeadPart, HeadParts
    from spdbench.pipeline.processes.stages import StageWorkers
    from spdbench.pipeline.processes.worker import StageSpec
    from spdbench.pipeline.streams import CoDrafter, StreamsPipeline
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.engine import PipelinedDecoding


class Pipelined(Placed):
    """Base of the backends of kind pipeline."""

    kind: ClassVar[BackendKind] = "pipeline"
    Options: ClassVar[type[BackendOptions]] = PipelineOptions
    method: ClassVar[str]
    """As `config.json` of a drafter's folder has it."""

    _head: object | None = None
    """The drafter's weights; None for a synthetic one."""
    _ends: Decoder | None = None
    _pipeline: Pipeline | None = None
    _decoding: PipelinedDecoding | None = None

    @abstractmethod
    def _anchors(self) -> Collection[int]:
        """The hidden states that the drafter reads, by index."""

    @abstractmethod
    def _time_draft(self, threads: int) -> float:
        """Seconds of a draft by the head in a full pipeline, timed now."""

    def check(self) -> None:
        self._require_trained(self.method)

    def load(self) -> None:
        self._check_context()
        self._layout = self._layouts()[0]
        if self._executor == "torchrun":
            self._require_ranks(self._options.asked_stages)  # before weights are loaded
        super().load()
        if self._executor == "torchrun":
            self._require_ranks(len(self._stages))
        self._choose_layout()
        self._pipeline = self._start_pipeline()

    def _require_ranks(self, num_stages: int | None) -> None:
        """Raises `InputError` without torchrun, or where its ranks do not fit the stages, as far as these are known."""
        ranks, first_is_here = self._ranks, self._layout.drafting == "first_stage"
        if num_stages is not None:
            ranks.require_stages(num_stages, self._context.label, first_is_here=first_is_here)

    def describe(self) -> BackendInfo:
        from spdbench.pipeline.output_head import lane_bytes

        decoder, devices = self._decoder, self._stage_devices
        lanes = lane_bytes(decoder, self._stages, self._layout)
        if self._anchors() or self._parts.controller:
            devices.append(self._drafters_device)
        chosen: dict[str, str] = {"executor": self._executor}
        if self._layout != Layout() or self._estimates:
            chosen["layout"] = self._layout.words + self._estimates
        if self._in_processes:
            chosen["transport"] = self._transport
        if self._executor == "torchrun":
            chosen |= self._ranks.describe(len(self._stages))
        chosen |= described_snapshots(decoder, self._stages, self._num_snapshots)
        return BackendInfo(
            devices=tuple(dict.fromkeys(devices)),
            lane_bytes=tuple(lanes),
            stage_layers=tuple([*map(len, self._stages), 0][: len(lanes)]),
            drafter=self._info,
            chosen=chosen,
            kernels=decoder.kernels,
        )

    def measure_costs(self) -> None:
        """Measures, for `spdbench profile`, a draft with all threads, and what the choice of a layout or of balanced
        stages reads: a draft with those of each layout, and the target's parts with a stage's."""
        count, all_threads = len(self._stages), self._context.threads
        a_stages = self._threads(count)
        if self._head is not None:
            for threads in sorted({all_threads, a_stages, max(1, all_threads - count * a_stages)}):
                self._draft_s(threads)
        self._times(count, 0.0)

    def _drafting_s(self) -> float:
        return 0.0 if self._head is None else self._draft_s(self._drafters_threads)

    def _draft_s(self, threads: int) -> float:
        """Seconds of a draft: the stored ones, so that every run on this machine chooses alike."""
        from spdbench.profiles.profile import make_key

        info = self._loaded(self._info)
        fields = {"method": info.method, "drafter": (info.sha256 or info.id)[:12]}
        key = make_key("draft", **fields, stages=len(self._stages), threads=threads)
        return self._stored.seconds([key], lambda: [self._time_draft(threads)])[0]

    @property
    def _parts(self) -> HeadParts:
        from spdbench.pipeline.output_head import HeadParts

        return HeadParts.of(self._layout.head, self._context.target.config.vocab_size)

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
    def _drafters_target(self) -> Decoder:
        """The target that heads are built on: with its embedding and its head on the drafter's device."""
        from spdbench.models.target import find_device

        target, device = self._context.target.ends, find_device(self._drafters_device)
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
        target = self._context.target
        is_read = choice.kind in ("path", "auto")
        if not is_read:
            self._stages = self._cut(None)
        file = self._read_drafter(
            choice,
            self.method,
            read,
            lambda: draw(target.ends, self._stages, self._context.seed),
        )
        if is_read:
            assert file is not None
            self._stages = self._cut(file.config.num_stages, self._trained_cut(file))
        return file

    @property
    def _asked_cut(self) -> tuple[int | None, Sequence[int] | None]:
        layers = self._options.stage_layers
        if layers == "auto":
            return self._options.asked_stages, ()
        return self._options.asked_stages, layers if layers is not None and len(set(layers)) > 1 else None

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
            # Of a drafter for so many stages `_choose_layout` balances as far as that one fits.
            is_for_these = num_stages == drafters_stages and (trained_cut is not None or num_layers % num_stages == 0)
            if options.stage_layers == "auto" and not is_for_these:
                return self._balanced(num_stages)
            if trained_cut is not None and len(trained_cut) == num_stages:
                return trained_cut
            return split_evenly(num_layers, num_stages)
        except InputError as error:
            raise InputError(f"-o {self._context.label}.{error}") from None

    def _head_part(self, ids: range) -> HeadPart:
        from spdbench.pipeline.output_head import HeadPart

        return HeadPart(self._drafters_target, ids)

    def _start_pipeline(self) -> Pipeline:
        anchors, parts = self._anchors(), self._parts if self._parts.controller else ()
        if self._executor == "inline":
            from spdbench.pipeline.inline import InlinePipeline

            return InlinePipeline(self._decoder, self._stages, anchors, [self._head_part(ids) for ids in parts if ids])
        if self._executor == "streams":
            return self._start_streams()
        from spdbench.pipeline.processes.process import ProcessPipeline
        from spdbench.pipeline.processes.worker import StageSpec

        if self._transport == "nccl" and not self._have_own_gpus:
            raise self._option_error(
                "transport",
                f"each of the {len(self._stages)} stages needs a GPU of its own, but --devices are "
                f"{','.join(self._context.devices)}. Allowed: auto, pipe, gloo.",
            )
        count, threads, source = len(self._stages), self._threads(len(self._stages)), self._context.target.source
        reported = {*anchors, self._stages[-1].stop} if parts else anchors
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
                hidden_indices=tuple(state for state in sorted(reported) if layers.start < state <= layers.stop),
                transport=self._transport,
                timeout_s=self._options.timeout_s,
                head_ids=parts.stage if parts and index == count - 1 else None,
            )
            for index, (layers, device) in enumerate(zip(self._stages, self._stage_devices, strict=True))
        ]
        if self._executor == "torchrun":
            specs = self._ranks.place(specs, self._context.devices, self._context.threads)
        head = self._head_part(parts.controller) if parts else None
        return ProcessPipeline(self._start_workers(specs), specs, self._ends or self._decoder, anchors, head)

    def _start_workers(self, specs: Sequence[StageSpec]) -> StageWorkers:
        from spdbench.pipeline.processes.local_stage import StageWorkersWithLocal
        from spdbench.pipeline.processes.stages import StageWorkers

        start = self._ranks.start_stages if self._executor == "torchrun" else None
        workers = StageWorkersWithLocal if self._layout.drafting == "first_stage" else StageWorkers
        return workers(specs, self._options.timeout_s, self._context.label, start)

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
