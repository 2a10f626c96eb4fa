"""`spd`: speculative pipeline decoding, n stages at work on n tokens of one sequence.

    prefill, then cycle by cycle:
        draft a successor for the newest token, from the features that exist before the step
        every stage moves its token one stage on
        the token that leaves the last stage judges its successor
            right: it counts, the new draft enters stage 0
            wrong: all in flight is dropped, the target's own token enters stage 0, and n - 1 cycles give no verdict

Source: arXiv 2605.30852; SPD.md section 4, without the faults of its section 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field

from spdbench.backend import BackendContext, BackendInfo, BackendOptions
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.drafting import Drafting

if TYPE_CHECKING:
    from spdbench.decoding.synthetic import DrafterChoice
    from spdbench_backends.spd.drafter import PipelineDrafter
    from spdbench_backends.spd.formats import HeadFile
    from spdbench_backends.spd.head import HeadWeights


def _counts(value: Any) -> Any:
    """`8,8,7,7` or `8;8;7;7` as a list."""
    return [part for part in value.replace(";", ",").split(",") if part] if isinstance(value, str) else value


class SPD(Drafting["PipelineDrafter"]):
    """Speculative pipeline decoding: n stages work on n tokens of one sequence."""

    class Options(BackendOptions):
        stages: int | None = Field(
            None,
            ge=1,
            description="pipeline stages n; default: the drafter's, else 3 where that divides the layers",
        )
        stage_layers: Annotated[tuple[int, ...] | None, BeforeValidator(_counts)] = Field(
            None, description="layers of each stage, e.g. 11,10,9; default: equal stages"
        )
        executor: Literal["inline"] = Field("inline", description="inline: all stages stepped in this process")

    kind: ClassVar[BackendKind] = "pipeline"

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        super().__init__(context)
        self._options = cast(SPD.Options, options)
        self._stages: tuple[range, ...] = ()
        self._head: HeadWeights | None = None

    def load(self) -> None:
        from spdbench.decoding.synthetic import parse_drafter

        choice = parse_drafter(self._context.drafter)
        file = self._find_head(choice)
        self._stages = self._cut(file)
        self._load_drafter(choice, file)
        self._choice = choice

    def describe(self) -> BackendInfo:
        decoder = self._decoder
        last = len(self._stages) - 1
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=tuple(decoder.bytes_per_token(layers, head=s == last) for s, layers in enumerate(self._stages)),
            stage_layers=tuple(len(layers) for layers in self._stages),
            drafter=self._info,
            kernels=decoder.kernels,
        )

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        super().close()
        self._head = None

    def _find_head(self, choice: DrafterChoice) -> HeadFile | None:
        """The head that was asked for, still without a place in this model; None for a synthetic drafter."""
        from spdbench.models.drafters import find_drafter
        from spdbench_backends.spd.formats import random_head, read_head

        if choice.kind in ("oracle", "forced"):
            return None
        if unknown := self._context.target.unknown:
            raise InputError(
                f"--drafter {choice.text}: SPD heads are made of spdbench's own layers, which do not know this model "
                f"({unknown}). Give oracle:P or forced:P."
            )
        if choice.kind == "path":
            return read_head(choice.path)
        if choice.kind == "random":
            return random_head(self._context.target.own_decoder, self._cut(None), self._context.seed)
        return read_head(find_drafter(self._context.target.files, "spd", self._wanted_stages()))

    def _wanted_stages(self) -> int | None:
        counts = self._options.stage_layers
        return self._options.stages if counts is None else len(counts)

    def _cut(self, file: HeadFile | None) -> tuple[range, ...]:
        from spdbench.models.partition import split_by_counts, split_evenly

        options, num_layers = self._options, self._context.target.config.num_layers
        try:
            if options.stage_layers is not None:
                if options.stages not in (None, len(options.stage_layers)):
                    raise InputError(f"stages={options.stages}: stage_layers names {len(options.stage_layers)} stages.")
                return split_by_counts(num_layers, options.stage_layers)
            return split_evenly(num_layers, options.stages or (file.config.num_stages if file else _usual(num_layers)))
        except InputError as error:
            raise InputError(f"-o {self._context.label}.{error}") from None

    def _load_drafter(self, choice: DrafterChoice, file: HeadFile | None) -> None:
        if file is None:
            self._info = self._synthetic(choice)
            return
        from spdbench_backends.drafter_files import drafter_info
        from spdbench_backends.spd.formats import build_head

        self._head = build_head(file, self._context.target.own_decoder, self._stages)
        self._info = drafter_info(choice.kind, file.path.name, "spd", file.sha256, file.config.trained_tokens)

    def _new_drafter(self, request: GenerationRequest) -> PipelineDrafter:
        from spdbench_backends.spd.drafter import HeadDrafter, SyntheticDrafter

        if self._head is not None:
            return HeadDrafter(self._head, self._decoder.config.vocab_size)
        return SyntheticDrafter(self._drafts(request))

    def _decode(self, request: GenerationRequest, drafter: PipelineDrafter) -> Iterator[Step]:
        from spdbench_backends.spd.engine import generate

        return generate(self._decoder, self._stages, drafter, request)


def _usual(num_layers: int) -> int:
    if num_layers % 3 == 0:
        return 3
    return next((n for n in range(2, num_layers + 1) if num_layers % n == 0), 1)
