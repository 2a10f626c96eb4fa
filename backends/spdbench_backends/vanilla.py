"""`vanilla`: autoregressive decoding, one token a forward. The baseline of every speed-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spdbench.types import BackendKind, GenerationRequest, Step
from spdbench_backends.local import GraphOptions, LocalBackend, captured_as, decoder_to_capture

if TYPE_CHECKING:
    from spdbench.decoding.autoregressive import CapturedDecoding
    from spdbench.models.interface import TargetDecoder


class Vanilla(LocalBackend):
    """Autoregressive decoding, one token a forward: the baseline."""

    class Options(GraphOptions):
        """vanilla has no options of its own."""

    kind: ClassVar[BackendKind] = "autoregressive"

    _options: Options
    _target: TargetDecoder | None = None
    _captured: CapturedDecoding | None = None

    def load(self) -> None:
        self._target = self._decoder
        graphs = self._options.graphs
        if (decoder := decoder_to_capture(graphs, self._context)) is not None:
            from spdbench.decoding.autoregressive import CapturedDecoding
            from spdbench.models.cuda.captured_decoder import usual_capacity

            capacity = usual_capacity(decoder)
            self._captured = CapturedDecoding(decoder, capacity, compiled=graphs == "compiled")
            self._chosen = {"graphs": captured_as(graphs, capacity)}

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.decoding.autoregressive import decode

        forwards = float(len(request.prompt_ids))
        decoder, captured = self._loaded(self._target), self._captured
        for token in decode(decoder, request) if captured is None else captured.decode(request):
            yield Step((token,), 0, 0, 0, forwards)
            forwards = 1.0
