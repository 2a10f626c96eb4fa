"""`vanilla`: autoregressive decoding, one token a forward. The baseline of every speed-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

from spdbench.backend import BackendContext, BackendInfo, BackendOptions
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.graph_options import GraphOptions, captured_as, decoder_to_capture

if TYPE_CHECKING:
    from spdbench.decoding.autoregressive import CapturedDecoding
    from spdbench.models.interface import TargetDecoder


class Vanilla:
    """Autoregressive decoding, one token a forward: the baseline."""

    class Options(GraphOptions):
        """vanilla has no options of its own."""

    kind: ClassVar[BackendKind] = "autoregressive"
    lossless = True

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = cast(Vanilla.Options, options)
        self._context = context
        self._decoder: TargetDecoder | None = None
        self._captured: CapturedDecoding | None = None

    def load(self) -> None:
        self._decoder = self._context.target.decoder
        graphs = self._options.graphs
        if (decoder := decoder_to_capture(graphs, self._context)) is not None:
            from spdbench.decoding.autoregressive import CapturedDecoding
            from spdbench.models.cuda.captured_decoder import usual_capacity

            self._captured = CapturedDecoding(decoder, usual_capacity(decoder), compiled=graphs == "compiled")

    def describe(self) -> BackendInfo:
        decoder, captured = self._loaded(), self._captured
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(decoder.bytes_per_token(decoder.layers, head=True),),
            stage_layers=(len(decoder.layers),),
            chosen={} if captured is None else {"graphs": captured_as(self._options.graphs, captured.capacity)},
            kernels=decoder.kernels,
        )

    def prepare(self, request: GenerationRequest) -> None:
        pass

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.decoding.autoregressive import decode

        forwards = float(len(request.prompt_ids))
        decoder, captured = self._loaded(), self._captured
        for token in decode(decoder, request) if captured is None else captured.decode(request):
            yield Step((token,), 0, 0, 0, forwards)
            forwards = 1.0

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        self._decoder = self._captured = None

    def _loaded(self) -> TargetDecoder:
        if self._decoder is None:
            raise RuntimeError("vanilla is not loaded")
        return self._decoder
