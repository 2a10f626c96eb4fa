"""Where a pipeline's parts run: the executor, devices and threads of its stages, and the places of the drafter and of
the output head. With the options of all pipelined backends. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from spdbench.backend import BackendOptions
from spdbench.models.partition import DraftingPlace, HeadPlace, Layout, PieceTimes, best_layout, split_by_cost
from spdbench_backends.drafting import Drafting

if TYPE_CHECKING:
    from spdbench.pipeline.processes.transport import RowTransport
    from spdbench.pipeline.ranks.remote import Ranks
    from spdbench_backends.spd.drafter import PipelineDrafter  # noqa: F401 - named as text, as the class runs without it

LAID_OUT = ("process", "inline")
"""Executors whose layout can be chosen by what parts take on this machine."""


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
        "torchrun: a rank for each stage, also on other nodes, and rank 0 measures and drafts; "
        "auto: streams where there is one GPU (inline with branches), else process for more than one stage",
    )
    context: int | None = Field(
        None, ge=64, le=2**20, description="streams: tokens of the longest sequence; default: 4096, or the model's own"
    )
    drafting: Literal["own", "first_stage", "auto"] = Field(
        "own",
        description="where drafts are made: own: next to the stages, on a device of its own if --devices has one more; "
        "first_stage: by the process that is the first stage, so that n stages need n devices; auto: by measured times",
    )
    head: Literal["last_stage", "drafter", "split", "auto"] = Field(
        "last_stage",
        description="where the output head runs: with the last stage; with the drafter; split: half of the vocabulary "
        "with each; auto: by measured times",
    )
    transport: Literal["auto", "pipe", "gloo", "nccl"] = Field(
        "auto",
        description="how hidden states travel between processes; auto: nccl where every stage has a GPU of its own, "
        "else pipe",
    )
    timeout_s: float = Field(
        60.0, gt=0, le=1e6, description="a stage that does not answer in this time counts as hanging"
    )

    @property
    def asked_stages(self) -> int | None:
        """The number of stages, if the options name it."""
        return len(self.stage_layers) if isinstance(self.stage_layers, tuple) else self.stages


class Placed(Drafting["PipelineDrafter"]):
    """Base of `Pipelined`: decides where things run, and runs nothing."""

    _options: PipelineOptions
    _stages: tuple[range, ...] = ()
    _layout: Layout = Layout()
    _estimates: str = ""
    _measured: tuple[list[float], float] | None = None
    """Seconds of each layer and of the head."""
    _drafts_last: ClassVar[bool] = False
    """True if drafts are made after the stages have moved."""

    @property
    def _executor(self) -> Literal["process", "inline", "streams", "torchrun"]:
        if self._options.executor != "auto":
            return self._options.executor
        if self._share_a_gpu:
            return "inline" if self._has_branches else "streams"
        return "process" if len(self._stages) > 1 else "inline"

    @property
    def _share_a_gpu(self) -> bool:
        """True if one GPU is all there is. Processes would take turns on it; captured stages run in parallel."""
        from spdbench.models.cuda.captured_decoder import is_capturable

        devices = set(self._context.devices)
        return len(devices) == 1 and devices.pop().startswith("cuda") and is_capturable(self._decoder)

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
        from spdbench.pipeline.processes.worker import snapshots_ahead

        count = len(self._stages)
        if self._in_processes:
            return [snapshots_ahead(stage, count) for stage in range(count)]
        return [snapshots_in_step(stage, count) for stage in range(count)]

    @property
    def _stage_devices(self) -> list[str]:
        """Stages take the devices in turn; streams share one, and ranks have their nodes'."""
        if self._executor == "torchrun":
            return self._ranks.devices(self._context.devices, len(self._stages))
        devices = self._context.devices[:1] if self._executor == "streams" else self._context.devices
        return [devices[stage % len(devices)] for stage in range(len(self._stages))]

    @property
    def _drafters_device(self) -> str:
        """The first stage's if it drafts, or if there are no more devices than stages; else one of its own."""
        devices, count = self._context.devices, len(self._stages)
        own = self._executor == "process" and self._layout.drafting == "own" and len(devices) > count
        return devices[count] if own else devices[0]

    @property
    def _have_own_gpus(self) -> bool:
        devices = self._stage_devices
        return len(set(devices)) == len(devices) and all(device.startswith("cuda") for device in devices)

    @property
    def _transport(self) -> RowTransport:
        if self._layout.drafting == "first_stage":
            return "pipe"
        if self._options.transport != "auto":
            return self._options.transport
        return "nccl" if self._have_own_gpus and len(self._stages) > 1 else "pipe"

    def _threads(self, num_stages: int) -> int:
        """Threads of each stage: together no more than the run has, where it has at least one a stage."""
        return max(1, self._context.threads // num_stages)

    @property
    def _drafters_threads(self) -> int:
        """The threads that the stages leave; more would wait for the stages' threads. A drafter in the first stage's
        process takes turns with that stage."""
        num_here = len(self._stages)
        each = self._threads(num_here)
        if self._executor == "torchrun":
            each, num_here = self._ranks.threads(num_here, self._context.threads)
        if self._layout.drafting == "first_stage":
            return each
        return max(1, self._context.threads - num_here * each)

    def _check_context(self) -> None:
        context, most = self._options.context, self._context.target.config.max_positions
        if context is None:
            return
        if self._executor != "streams":
            raise self._option_error("context", f"is used with {self._context.label}.executor=streams only")
        if context > most:
            raise self._option_error("context", f"the model has {most} positions")

    def _balanced(self, num_stages: int) -> tuple[range, ...]:
        """Stages of equal time, for a drafter that takes none."""
        times = self._times(num_stages, 0.0)
        return split_by_cost(times.layers_s, times.extras_s(self._layout, num_stages))

    def _times(self, num_stages: int, draft_s: float) -> PieceTimes:
        from spdbench.pipeline.profiling import measured_times

        threads = self._threads(num_stages)
        if self._measured is None:
            self._measured = measured_times(self._decoder, threads, self._stored)
        has_lane = num_stages * threads < self._context.threads or len(self._context.devices) > num_stages
        return PieceTimes(*self._measured, draft_s, self._drafts_last, has_lane)

    def _layouts(self) -> list[Layout]:
        """The layouts that the options allow, the one with the fewest devices and messages first. A drafter that has a
        device to itself is never slower there, so that nothing is left to choose."""
        options, num_stages = self._options, len(self._stages) or 2
        fixed = self._executor not in LAID_OUT or bool(self._context.target.unsupported_reason)
        draftings: tuple[DraftingPlace, ...] = ("first_stage", "own")
        heads: tuple[HeadPlace, ...] = ("last_stage", "drafter", "split")
        if options.drafting != "auto":
            draftings = (options.drafting,)
        elif fixed or num_stages == 1 or len(self._context.devices) > num_stages:
            draftings = ("own",)
        if options.head != "auto":
            heads = (options.head,)
        elif fixed:
            heads = ("last_stage",)
        return [Layout(drafting, head) for head in heads for drafting in draftings]

    def _choose_layout(self) -> None:
        """Sets layout and stages: as the options have them, else those whose cycle is estimated as the shortest."""
        layouts, balanced = self._layouts(), self._options.stage_layers == "auto"
        self._require_possible(layouts)
        self._layout = layouts[0]
        if len(layouts) == 1 and not balanced:
            return
        num_stages = len(self._stages)
        times = self._times(num_stages, self._drafting_s())
        cuts = dict.fromkeys(layouts, self._stages)
        if balanced:
            each = {layout: split_by_cost(times.layers_s, times.extras_s(layout, num_stages)) for layout in layouts}
            cuts |= {layout: cut for layout, cut in each.items() if self._fits(cut)}
        cycles_s = {layout: times.cycle_s(layout, cut) for layout, cut in cuts.items()}
        self._layout = best_layout(cycles_s)
        self._use_cut(cuts[self._layout])
        if len(layouts) > 1:
            others = [f"{layout.words} {s * 1e3:.2f}" for layout, s in cycles_s.items() if layout != self._layout]
            self._estimates = f"; ms a cycle by measured parts: {cycles_s[self._layout] * 1e3:.2f}; {'; '.join(others)}"

    def _require_possible(self, layouts: Sequence[Layout]) -> None:
        """Raises `InputError` where an option asks for a layout that there is not."""
        drafting, head, transport = layouts[0].drafting, layouts[-1].head, self._options.transport
        if self._executor == "streams":
            for name, value, usual in (("drafting", drafting, "own"), ("head", head, "last_stage")):
                if value != usual:
                    problem = f"needs {self._context.label}.executor=process, torchrun or inline, and this is streams"
                    raise self._option_error(name, f"{problem}. Allowed here: {usual}.")
        if head != "last_stage" and (why := self._context.target.unsupported_reason):
            problem = f"transformers' layers serve this model ({why}), whose head cannot be taken apart from them"
            raise self._option_error("head", f"{problem}. Allowed: last_stage.")
        if {layout.drafting for layout in layouts} == {"first_stage"} and self._in_processes:
            if len(self._stages) == 1:
                raise self._option_error(
                    "drafting", "there is one stage, and nothing would run in parallel. Allowed: own."
                )
            if transport in ("gloo", "nccl"):
                problem = "rows from the first stage to the next go through a pipe"
                raise self._option_error("drafting", f"{problem}. Allowed with it: transport=pipe, not {transport}.")

    def _fits(self, stages: tuple[range, ...]) -> bool:  # noqa: ARG002 - of synthetic drafters
        """True if the drafter can draft for these stages."""
        return True

    def _use_cut(self, stages: tuple[range, ...]) -> None:
        """Sets the stages, which fit the drafter."""
        self._stages = stages

    def _drafting_s(self) -> float:
        """Seconds of a draft, with the drafter's threads."""
        return 0.0
