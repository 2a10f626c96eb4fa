"""`vanilla`: autoregressive decoding, one token a forward. The baseline of every speed-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from spdbench.backend import BackendContext, BackendInfo, BackendOptions
from spdbench.types import BackendKind, GenerationRequest, Span, Step

if TYPE_CHECKING:
    from spdbench.models.interface import TargetDecoder


class Vanilla:
    """Autoregressive decoding, one token a forward: the baseline."""

    class Options(BackendOptions):
        """vanilla has no options of its own."""

    kind: ClassVar[BackendKind] = "autoregressive"
    lossless = True

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:  # noqa: ARG002 - the protocol's
        self._context = context
        self._decoder: TargetDecoder | None = None

    def load(self) -> None:
        self._decoder = self._context.target.decoder

    def describe(self) -> BackendInfo:
        decoder = self._loaded()
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(decoder.bytes_per_token(decoder.layers, head=True),),
            stage_layers=(len(decoder.layers),),
            kernels=decoder.kernels,
        )

    def prepare(self, request: GenerationRequest) -> None:
        pass

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.decoding.autoregressive import decode

        forwards = float(len(request.prompt_ids))
        for token in decode(self._loaded(), request):
            yield Step((token,), 0, 0, 0, forwards)
            forwards = 1.0

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        self._decoder = None

    def _loaded(self) -> TargetDecoder:
        if self._decoder is None:
            raise RuntimeError("vanilla is not loaded")
        return self._decoder
