"""A pipeline in this process, at the service of one request."""

from __future__ import annotations

from collections.abc import Iterator

from spdbench.models.decoder import Decoder
from spdbench.pipeline.inline import InlinePipeline
from spdbench.types import GenerationRequest, Step
from spdbench_backends.spd.drafter import PipelineDrafter
from spdbench_backends.spd.engine import PipelinedDecoding


def generate(
    decoder: Decoder, stages: tuple[range, ...], drafter: PipelineDrafter, request: GenerationRequest
) -> Iterator[Step]:
    return PipelinedDecoding(InlinePipeline(decoder, stages, drafter.hidden_indices), stages, drafter, request).steps()
