"""What every backend that drafts and verifies shares: its rounds, its spans, the tree that it chose.

A method fills in how drafters are loaded and made. Must not know any method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from spdbench.backend import BackendContext, BackendInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.drafting import Drafting

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter, Judge


class DraftVerify(Drafting["Drafter"]):
    """Base of the backends of kind draft_verify."""

    kind: ClassVar[BackendKind] = "draft_verify"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._spans: Sequence[Span] = ()
        self._chosen: Mapping[str, str] = {}  # what the backend decided for itself, to be kept in the result

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

    def spans(self) -> Sequence[Span]:
        return self._spans

    def close(self) -> None:
        super().close()
        self._spans = ()

    def _decode(self, request: GenerationRequest, drafter: Drafter) -> Iterator[Step]:
        from spdbench.decoding.speculate import Speculation

        speculation = Speculation(self._decoder, drafter, request, self._judge())
        self._spans = speculation.spans
        return speculation.steps()

    def _judge(self) -> Judge:
        from spdbench.decoding.verify import judge_tree

        return judge_tree

    def _no_trees(self, asked: str) -> InputError:
        return InputError(
            f"-o {self._context.label}.tree={asked}: this model runs on transformers' layers, which take no trees; "
            "use chain"
        )
