"""Where a pipeline computes the output head: in the last stage, in the controller next to the drafter, or half of the
vocabulary in each.

With a large vocabulary the head is the heaviest piece of a model, and in the last stage it bounds every deep pipeline.
Where the controller has a part of it, the last stage reports its output before it computes its own part, so that both
work at the same time; the parts are joined to what the whole head gives.

Shapes: S rows, M model width, V vocabulary, U token ids of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import NOT_NUMBERS, argmax
from spdbench.models.partition import HeadPlace, Layout

BLOCK = 16
"""A part's token ids begin at a multiple of this, as packed weights lie in blocks."""


class HeadParts(NamedTuple):
    """The token ids whose logits the last stage and the controller compute; those of the stage come first."""

    stage: range
    controller: range

    @classmethod
    def of(cls, place: HeadPlace, vocab_size: int) -> HeadParts:
        half = -(-vocab_size // (2 * BLOCK)) * BLOCK
        stop = {"last_stage": vocab_size, "drafter": 0, "split": min(half, vocab_size)}[place]
        return cls(range(stop), range(stop, vocab_size))

    def bytes_of(self, head_bytes: int) -> tuple[int, int]:
        """The head's bytes by part."""
        stage_bytes = head_bytes * len(self.stage) // self.controller.stop if self.controller else head_bytes
        return stage_bytes, head_bytes - stage_bytes


class HeadPart:
    """The logits of the token ids `ids` alone."""

    def __init__(self, decoder: Decoder, ids: range) -> None:
        self.ids = ids
        self._decoder = decoder.with_head_of(ids)

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """`[S, U]`."""
        return self._decoder.logits(hidden_SM)

    def best(self, hidden_SM: Tensor) -> Tensor:
        """As `best_of` the logits."""
        return best_of(self.logits(hidden_SM), self.ids.start)


def best_of(logits_SU: Tensor, first_id: int = 0) -> Tensor:
    """The likeliest token id of a part that begins with `first_id`, and its logit: `[S, 2]` in float64, which holds
    both exactly."""
    ids_S = argmax(logits_SU)
    best_S = logits_SU.gather(-1, ids_S[:, None])[:, 0]
    return torch.stack((ids_S.double() + first_id, best_S.double()), dim=-1)


def join_best(parts: Sequence[Tensor]) -> Tensor:
    """The next token of each row `[S]` from what `best_of` gives of each part, in the order of their token ids: of
    equal logits the first, as over the whole vocabulary, and `NOT_NUMBERS` where a logit is NaN."""
    both_PS2 = torch.stack([part.cpu() for part in parts])
    part_S = both_PS2[..., 1].argmax(dim=0)
    ids_S = both_PS2[..., 0].gather(0, part_S[None])[0].long()
    return ids_S.masked_fill(both_PS2[..., 1].isnan().any(dim=0), NOT_NUMBERS)


def lane_bytes(decoder: TargetDecoder, stages: Sequence[range], layout: Layout) -> list[int]:
    """Bytes of the target that each lane reads for a token, the head included where it runs: a lane a stage, and one
    more for a drafter by itself that has a part of the head."""
    found = [decoder.bytes_per_token(layers, head=False) for layers in stages]
    head_bytes = decoder.bytes_per_token(stages[-1], head=True) - found[-1]
    stage_bytes, drafter_bytes = HeadParts.of(layout.head, decoder.config.vocab_size).bytes_of(head_bytes)
    found[-1] += stage_bytes
    if layout.drafting == "first_stage":
        found[0] += drafter_bytes
    elif drafter_bytes:
        found.append(drafter_bytes)
    return found
