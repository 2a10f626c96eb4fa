"""What every backend that drafts and verifies shares: its life, its synthetic drafters, its spans.

A method fills in how drafters are loaded and made. Must not know any method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from spdbench.backend import BackendContext, BackendInfo, BackendOptions, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Span, Step

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter, Judge
    from spdbench.decoding.synthetic import DrafterChoice, SyntheticDrafts
    from spdbench.models.interface import TargetDecoder


class DraftVerify:
    """Base of the backends of kind draft_verify."""

    kind: ClassVar[BackendKind] = "draft_verify"

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:  # noqa: ARG002 - the protocol's
        self._context = context
        self._info: DrafterInfo | None = None
        self._prepared: tuple[GenerationRequest, Drafter] | None = None
        self._spans: Sequence[Span] = ()
        self._chosen: Mapping[str, str] = {}  # what the backend decided for itself, to be kept in the result

    @property
    def lossless(self) -> bool:
        """Dictated verdicts are for timing; what they let through is not the target's own."""
        return not self._context.drafter.startswith("forced:")

    def describe(self) -> BackendInfo:
        decoder = self._decoder
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(decoder.bytes_per_token(decoder.layers, head=True),),
            stage_layers=(len(decoder.layers),),
            drafter=self._info,
            chosen=self._chosen,
            kernels=decoder.kernels,
        )

    def prepare(self, request: GenerationRequest) -> None:
        self._prepared = (request, self._new_drafter(request))

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.decoding.speculate import Speculation

        if self._prepared is None or self._prepared[0] is not request:
            self.prepare(request)
        assert self._prepared is not None
        drafter, self._prepared = self._prepared[1], None
        speculation = Speculation(self._decoder, drafter, request, self._judge())
        self._spans = speculation.spans
        return speculation.steps()

    def spans(self) -> Sequence[Span]:
        return self._spans

    def close(self) -> None:
        self._prepared = None
        self._spans = ()

    @property
    def _decoder(self) -> TargetDecoder:
        return self._context.target.decoder

    def _new_drafter(self, request: GenerationRequest) -> Drafter:
        raise NotImplementedError

    def _judge(self) -> Judge:
        from spdbench.decoding.verify import judge_tree

        return judge_tree

    def _no_trees(self, asked: str) -> InputError:
        return InputError(
            f"-o {self._context.label}.tree={asked}: this model runs on transformers' layers, which take no trees; "
            "use chain"
        )

    def _synthetic(self, choice: DrafterChoice) -> DrafterInfo:
        return DrafterInfo(choice.text, method=choice.kind, synthetic=True)

    def _drafts(self, choice: DrafterChoice, request: GenerationRequest) -> SyntheticDrafts:
        from spdbench.decoding.synthetic import synthetic_drafts

        return synthetic_drafts(choice, self._context.seed, self._decoder, request)
