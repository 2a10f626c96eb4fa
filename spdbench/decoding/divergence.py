"""Why two greedy outputs diverge: a tie of logits, rounding, or a real difference (docs/metrics.md, "Losslessness").

The target reads plain decoding's own ids up to the divergence, one token a forward. The gap between its logits of both
ids is compared with a noise floor:

    a method on the target's own layers    the largest change of a logit when the same ids are read in forwards of as
                                           many rows as the method's
    another engine                         the largest change of a gap between two logits from the target to the engine,
                                           both reading the same ids. A constant added to all logits does not count, so
                                           log-probabilities serve as well

Shapes: S rows, M model width, V vocabulary, C ids that an engine reports.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdbench.models.interface import TargetDecoder
from spdbench.types import DivergenceClass, EngineLogits, FirstDivergence, first_difference

MAX_APART = {torch.float32: 1e-4, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""How far another engine's logits may lie from the target's and still count as rounded, relative to their spread:
several times what transformers' lie from ours on SmolLM2-135M, 4e-6, 0.003 and 0.04."""


@dataclass(frozen=True)
class OtherEngine:
    """Where an output comes from that the target's own layers did not compute.

    `logits` is None where the engine reports none. `same_model` is False where it runs other weights or another
    precision, so that its logits may lie anywhere.
    """

    logits: EngineLogits | None
    same_model: bool


@torch.inference_mode()
def first_divergence(
    decoder: TargetDecoder,
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    widths: Collection[int],
    engine: OtherEngine | None = None,
) -> FirstDivergence | None:
    """The first id in which `found` differs from `expected`, the output of plain decoding, and why; None if none does.

    A tie has equal logits for both ids. A near tie has a gap no larger than the noise floor; `widths` are the numbers
    of rows of the other method's forwards. An output that ends early or late is a real difference. So is that of
    another `engine` whose own logits prefer plain decoding's id, or lie further from the target's than rounding puts
    them.
    """
    at = first_difference(expected, found)
    if at == len(expected) == len(found):
        return None
    ours, theirs = (ids[at] if at < len(ids) else None for ids in (expected, found))
    if ours is None or theirs is None:
        return FirstDivergence("real", at, ours, theirs, reason="one output ends where the other goes on")
    answer = expected[:at]
    plain_V = _last_logits(decoder, prompt_ids, answer, 1)
    expected_logit, found_logit = float(plain_V[ours]), float(plain_V[theirs])
    gap = expected_logit - found_logit
    divergence = FirstDivergence("tie", at, ours, theirs, expected_logit, found_logit, gap)
    if engine is not None:
        return _by_engine(divergence, decoder, prompt_ids, answer, plain_V, engine)
    if gap == 0.0:
        return divergence
    floor, width = _floor(decoder, prompt_ids, answer, widths, plain_V, enough=abs(gap))
    outcome: DivergenceClass = "near_tie" if abs(gap) <= floor else "real"
    return replace(divergence, outcome=outcome, floor=floor, floor_source=f"{_rows(width)} a forward against one")


def _by_engine(
    divergence: FirstDivergence,
    decoder: TargetDecoder,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    plain_V: Tensor,
    engine: OtherEngine,
) -> FirstDivergence:
    """`divergence` with the outcome, the floor and the reason that the engine's own logits give."""
    scores = None if engine.logits is None else engine.logits(prompt_ids, answer)
    if scores is None or not {divergence.expected, divergence.found} <= scores.keys():
        if divergence.gap == 0.0:
            return divergence
        missing = "no logits" if scores is None else "no logits of both tokens"
        return replace(divergence, outcome="unclassified", reason=f"the engine reports {missing}")
    ids_C = torch.tensor(list(scores), device=plain_V.device)
    difference_C = plain_V[ids_C].double() - torch.tensor(list(scores.values()), device=plain_V.device).double()
    floor = float(difference_C.max() - difference_C.min())
    spread = float(plain_V[ids_C].double().std(correction=0)) or 1.0
    apart = float(difference_C.std(correction=0)) / spread
    assert divergence.expected is not None
    assert divergence.found is not None
    engine_gap = scores[divergence.expected] - scores[divergence.found]
    found = replace(
        divergence,
        outcome="near_tie" if divergence.gap else "tie",
        floor=floor,
        floor_source="plain decoding's logits against the engine's",
        engine_gap=engine_gap,
        apart=apart,
    )
    assert found.gap is not None
    if engine.same_model and apart > (limit := MAX_APART[decoder.dtype]):
        reason = (
            f"the engine's logits lie {apart:.2g} of their spread from plain decoding's; rounding explains {limit:g}"
        )
        return replace(found, outcome="real", reason=reason)
    if engine_gap > floor:  # within it, rounding turns the engine's own choice: with drafts its forwards are wider
        return replace(found, outcome="real", reason="the engine's own logits prefer plain decoding's token")
    return found if abs(found.gap) <= floor else replace(found, outcome="real")


def _floor(
    decoder: TargetDecoder,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    widths: Collection[int],
    plain_V: Tensor,
    enough: float,
) -> tuple[float, int]:
    """The largest change of a logit from forwards of one row to those of any of `widths`, and the width that shows it.
    Stops at the first change of at least `enough`."""
    largest, widest = 0.0, max(widths, default=1)
    for width in sorted(set(widths), reverse=True):
        change = float((plain_V - _last_logits(decoder, prompt_ids, answer, width)).abs().max())
        if change > largest:
            largest, widest = change, width
        if largest >= enough:
            break
    return largest, widest


def _rows(width: int) -> str:
    return f"{width} row{'s' if width != 1 else ''}"


def _last_logits(decoder: TargetDecoder, prompt_ids: Sequence[int], answer: Sequence[int], width: int) -> Tensor:
    """Logits `[V]` in float32 after `answer`: the prompt in one forward, the rest in forwards of `width` rows each.

    Kernels choose how they sum by the number of rows, so a forward of fewer rows would not show the rounding of a wide
    tree. The last forward is therefore filled up with rows behind the last id, which no row before them sees.
    """
    ids, num_prompt = [*prompt_ids, *answer], len(prompt_ids)
    cache = decoder.new_cache(len(ids) + width)
    hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids[:num_prompt])), 0, cache)
    hidden_SM, last = hidden_SM[-1:], 0
    for start in range(num_prompt, len(ids), width):
        chunk = ids[start : start + width]
        last = len(chunk) - 1
        num_filler = min(width, decoder.config.max_positions - start) - len(chunk)
        rows = chunk + chunk[-1:] * num_filler
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(rows)), start, cache)
    return decoder.logits(hidden_SM)[last].float()
