"""Divergence by class: ties, near ties, real differences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.scoring import classify_difference
from spdbench.models.cpu.linear import PlainLinear
from spdbench.models.decoder import Decoder
from tests import tiny

PROMPT = tuple(range(60, 70))


def test_equal_outputs_are_identical(decoder: Decoder) -> None:
    assert classify_difference(decoder, PROMPT, [1, 2], [1, 2], {1}) == "identical"


def test_another_token_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    wrong = [*ids[:5], (ids[5] + 1) % 262, *ids[6:]]
    assert classify_difference(decoder, PROMPT, ids, wrong, {4}) == "real"


def test_an_output_that_ends_early_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    assert classify_difference(decoder, PROMPT, ids, ids[:6], {1}) == "real"


def plain_head(decoder: Decoder) -> Tensor:
    assert decoder.head is not None
    return decoder.head.plain().clone()


def test_equal_logits_are_a_tie(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 3)))
    head = plain_head(decoder)
    twin = (ids[2] + 1) % 262
    head[twin] = head[ids[2]]
    tied = dataclasses.replace(decoder, head=PlainLinear(head))
    assert classify_difference(tied, PROMPT, ids, [*ids[:2], twin], {1}) == "tie"


def test_a_gap_below_the_noise_floor_is_a_near_tie(tiny_model: Path) -> None:
    """In bfloat16, four tokens at a time give logits that differ from one at a time; a gap within that is no fault."""
    low = tiny.load(tiny_model, "bfloat16").own_decoder
    ids = list(decode(low, tiny.greedy(PROMPT, 6)))
    twin = (ids[5] + 1) % 262
    head = plain_head(low)
    head[twin] = head[ids[5]]
    head[twin, 0] += 2.0**-9  # about one unit in the last place of one weight
    near = dataclasses.replace(low, head=PlainLinear(head))
    found = classify_difference(near, PROMPT, ids, [*ids[:5], twin], {4})
    assert found in ("tie", "near_tie")
    assert classify_difference(near, PROMPT, ids, [*ids[:5], (twin + 7) % 262], {4}) == "real"


def test_the_noise_floor_is_that_of_the_widths_which_the_other_method_used(tiny_model: Path) -> None:
    """An answer of five tokens does not fill a forward of 100 rows; its rounding is still that of 100 rows."""
    low = tiny.load(tiny_model, "bfloat16").own_decoder
    ids = list(decode(low, tiny.greedy(PROMPT, 6)))
    twin = (ids[5] + 1) % 262

    class RoundsWideForwards:
        """The decoder with logits that a forward of more than 64 rows changes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(low, name)

        def logits(self, hidden_SM: Tensor) -> Tensor:
            found_SV = low.logits(hidden_SM).float()
            found_SV[:, twin] = found_SV[:, ids[5]] - 0.25
            found_SV[:, 0] += 0.5 if len(hidden_SM) > 64 else 0.0
            return found_SV

    def differs(*widths: int) -> str:
        return classify_difference(RoundsWideForwards(), PROMPT, ids, [*ids[:5], twin], widths)

    assert differs(100) == differs(3, 100, 8) == "near_tie"
    assert differs(8) == "real"


def test_filler_rows_stay_within_the_positions_of_the_model(decoder: Decoder) -> None:
    limit = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, max_positions=len(PROMPT) + 8))
    ids = list(decode(limit, tiny.greedy(PROMPT, 8)))
    ends: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(limit, name)

        def forward(self, hidden_SM: Tensor, start: int, cache: Any) -> Any:
            ends.append(start + len(hidden_SM))
            return limit.forward(hidden_SM, start, cache)

    watched: Any = Watched()
    assert classify_difference(watched, PROMPT, ids, [*ids[:7], (ids[7] + 1) % 262], {64}) == "real"
    assert max(ends) == len(PROMPT) + 8
