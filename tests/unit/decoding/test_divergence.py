"""Divergence by class: ties, near ties, real differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.divergence import OtherEngine, first_divergence
from spdbench.models.cpu.linear import PlainLinear
from spdbench.models.decoder import Decoder
from spdbench.types import DivergenceClass, FirstDivergence
from tests import tiny

PROMPT = tuple(range(60, 70))


def classify(decoder: Any, expected: Sequence[int], found: Sequence[int], widths: Collection[int]) -> DivergenceClass:
    divergence = first_divergence(decoder, PROMPT, expected, found, widths)
    return "identical" if divergence is None else divergence.outcome


def test_equal_outputs_are_identical(decoder: Decoder) -> None:
    assert classify(decoder, [1, 2], [1, 2], {1}) == "identical"


def test_another_token_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    wrong = [*ids[:5], (ids[5] + 1) % 262, *ids[6:]]
    assert classify(decoder, ids, wrong, {4}) == "real"


def test_an_output_that_ends_early_is_a_real_difference(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 8)))
    assert classify(decoder, ids, ids[:6], {1}) == "real"


def plain_head(decoder: Decoder) -> Tensor:
    assert decoder.head is not None
    return decoder.head.plain().clone()


def test_equal_logits_are_a_tie(decoder: Decoder) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 3)))
    head = plain_head(decoder)
    twin = (ids[2] + 1) % 262
    head[twin] = head[ids[2]]
    tied = dataclasses.replace(decoder, head=PlainLinear(head))
    assert classify(tied, ids, [*ids[:2], twin], {1}) == "tie"


def test_a_gap_below_the_noise_floor_is_a_near_tie(tiny_model: Path) -> None:
    """In bfloat16, four tokens at a time give logits that differ from one at a time; a gap within that is no fault."""
    low = tiny.load(tiny_model, "bfloat16").own_decoder
    ids = list(decode(low, tiny.greedy(PROMPT, 6)))
    twin = (ids[5] + 1) % 262
    head = plain_head(low)
    head[twin] = head[ids[5]]
    head[twin, 0] += 2.0**-9  # about one unit in the last place of one weight
    near = dataclasses.replace(low, head=PlainLinear(head))
    found = classify(near, ids, [*ids[:5], twin], {4})
    assert found in ("tie", "near_tie")
    assert classify(near, ids, [*ids[:5], (twin + 7) % 262], {4}) == "real"


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
        return classify(RoundsWideForwards(), ids, [*ids[:5], twin], widths)

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
    assert classify(watched, ids, [*ids[:7], (ids[7] + 1) % 262], {64}) == "real"
    assert max(ends) == len(PROMPT) + 8


class Engine:
    """Another engine: the decoder's logits after the same ids, changed by `change`."""

    def __init__(self, decoder: Decoder, change: Callable[[Tensor], Tensor]) -> None:
        self._decoder, self._change = decoder, change

    def __call__(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> dict[int, float]:
        decoder, ids = self._decoder, [*prompt_ids, *answer_ids]
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids)), 0, decoder.new_cache(len(ids)))
        return dict(enumerate(self._change(decoder.logits(hidden_SM[-1:])[0].float()).tolist()))


@pytest.fixture(scope="module")
def close_call(tiny_model: Path) -> tuple[Decoder, list[int], int]:
    """A decoder in bfloat16 whose sixth token has a twin with a logit that is 2^-5 smaller."""
    low = tiny.load(tiny_model, "bfloat16").own_decoder
    ids = list(decode(low, tiny.greedy(PROMPT, 6)))
    twin, original = (ids[5] + 1) % 262, low.logits

    class Close:
        def __getattr__(self, name: str) -> Any:
            return getattr(low, name)

        def logits(self, hidden_SM: Tensor) -> Tensor:
            logits_SV = original(hidden_SM).float()
            logits_SV[:, twin] = logits_SV[:, ids[5]] - 2.0**-5
            return logits_SV

    return Close(), ids, twin  # type: ignore[return-value]


def by_engine(
    close_call: tuple[Decoder, list[int], int], change: Callable[[Tensor, int, int], Tensor], *, same_model: bool = True
) -> FirstDivergence:
    decoder, ids, twin = close_call
    with torch.inference_mode():
        engine = Engine(decoder, lambda logits_V: change(logits_V, ids[5], twin))
        found = first_divergence(decoder, PROMPT, ids, [*ids[:5], twin], {1}, OtherEngine(engine, same_model))
    assert found is not None
    return found


def rounded(logits_V: Tensor, ours: int, theirs: int) -> Tensor:
    """Logits with noise of a size that bfloat16 explains, which turns the two tokens."""
    noise_V = 2.0**-6 * torch.randn(logits_V.shape, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    noise_V[ours], noise_V[theirs] = -(2.0**-5), 2.0**-5
    return logits_V + noise_V


def test_another_engines_rounding_is_a_near_tie(close_call: tuple[Decoder, list[int], int]) -> None:
    found = by_engine(close_call, rounded)
    assert found.outcome == "near_tie"
    assert found.gap == pytest.approx(2.0**-5)
    assert found.floor is not None
    assert found.floor >= 2.0**-4
    assert found.engine_gap is not None
    assert found.engine_gap < 0


def test_log_probabilities_say_what_logits_say(close_call: tuple[Decoder, list[int], int]) -> None:
    plain = by_engine(close_call, rounded)
    logged = by_engine(close_call, lambda *words: rounded(*words).log_softmax(-1))
    assert logged.outcome == "near_tie"
    assert logged.floor == pytest.approx(plain.floor, rel=1e-4)


def test_an_engine_that_leaves_its_own_logits_is_really_different(close_call: tuple[Decoder, list[int], int]) -> None:
    """Noise explains a gap of this size, but the engine's own logits prefer the token that it did not emit."""
    found = by_engine(close_call, lambda logits_V, ours, theirs: -rounded(-logits_V, ours, theirs))
    assert found.outcome == "real"
    assert found.reason == "the engine's own logits prefer plain decoding's token"


def test_an_engine_with_other_weights_is_really_different(close_call: tuple[Decoder, list[int], int]) -> None:
    def other(logits_V: Tensor, ours: int, theirs: int) -> Tensor:
        return rounded(logits_V, ours, theirs) + 0.5 * logits_V.std() * torch.sin(torch.arange(len(logits_V)))

    found = by_engine(close_call, other)
    assert found.outcome == "real"
    assert "lie" in found.reason
    assert by_engine(close_call, other, same_model=False).outcome in ("near_tie", "real")


@pytest.mark.parametrize("report", [None, {3: 0.0}])
def test_without_both_logits_it_cannot_be_known(decoder: Decoder, report: dict[int, float] | None) -> None:
    ids = list(decode(decoder, tiny.greedy(PROMPT, 6)))
    other = [*ids[:5], (ids[5] + 1) % 262]
    for engine in (OtherEngine(lambda *_: report, same_model=True), OtherEngine(None, same_model=False)):
        found = first_divergence(decoder, PROMPT, ids, other, {1}, engine)
        assert found is not None
        assert found.outcome == "unclassified"
        assert "the engine reports no logits" in found.reason
