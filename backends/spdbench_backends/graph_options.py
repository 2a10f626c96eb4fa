"""The option `graphs`: whether a backend's steps are captured at load and replayed. Imports no torch by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from spdbench.backend import BackendContext, BackendOptions

if TYPE_CHECKING:
    from spdbench.models.decoder import Decoder

Graphs = Literal["auto", "on", "off", "compiled"]


class GraphOptions(BackendOptions):
    """Options of all backends whose steps can be captured."""

    graphs: Graphs = Field(
        "auto",
        description="on: steps are captured at load and replayed, as CUDA graphs on a GPU, on a CPU to rehearse that; "
        "compiled: the target's are fused by torch.compile before that; "
        "auto: on where a GPU holds a model that can be captured",
    )


def captured_as(graphs: Graphs, capacity: int) -> str:
    """How a result describes captured steps."""
    return f"{'compiled' if graphs == 'compiled' else 'on'}, for up to {capacity} tokens"


def decoder_to_capture(graphs: Graphs, context: BackendContext) -> Decoder | None:
    """The decoder whose steps are to be captured; None where they are not.

    Raises:
        InputError: graphs were asked for, and the model's layers cannot be captured.
    """
    from spdbench.models.cuda.captured_decoder import is_capturable, refuse_uncapturable

    decoder = context.target.decoder
    if graphs == "off" or (graphs == "auto" and (decoder.device.type != "cuda" or not is_capturable(decoder))):
        return None
    return refuse_uncapturable(decoder, f"-o {context.label}.graphs={graphs}", "auto, off")
