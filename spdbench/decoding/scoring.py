"""What the target says of given ids: why two greedy outputs of it diverge, and the log-likelihood of a text.

Two outputs diverge by a tie of logits, rounding, or a real difference (METRICS.md).
Shapes: S rows, M model width, R rows at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax

Difference = Literal["identical", "tie", "near_tie", "real"]

ROWS = 64
"""Rows whose logits are in memory at a time."""


@torch.inference_mode()
def classify_difference(
    decoder: TargetDecoder,
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
    widths: Collection[int],
) -> Difference:
    """Classifies the first id in which `found` differs from `expected`, the output of plain decoding.

    A tie has equal logits for both ids. A near tie has a gap no larger than the noise floor: the largest change of a
    logit between feeding the same prefix one token at a time and in forwards of any of the numbers of rows `widths`,
    which are those of the other method. An output that ends early or late is a real difference.
    """
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    if at == len(expected) == len(found):
        return "identical"
    if at in (len(expected), len(found)):
        return "real"
    prefix = [*prompt_ids, *expected[:at]]
    plain_V = _last_logits(decoder, prefix, len(prompt_ids), 1)
    gap = float(plain_V[expected[at]] - plain_V[found[at]])
    if gap == 0.0:
        return "tie"
    floors = (
        float((plain_V - _last_logits(decoder, prefix, len(prompt_ids), width)).abs().max())
        for width in sorted(set(widths), reverse=True)
    )
    return "near_tie" if any(abs(gap) <= floor for floor in floors) else "real"


def _last_logits(decoder: TargetDecoder, ids: Sequence[int], num_prompt: int, width: int) -> Tensor:
    """Logits `[V]` in float32 after `ids`: the prompt in one forward, the rest in forwards of `width` rows each.

    Kernels choose how they sum by the number of rows, so a forward of fewer rows would not show the rounding of a wide
    tree. The last forward is therefore filled up with rows behind the last id, which no row before them sees.
    """
    cache = decoder.new_cache(len(ids) + width)
    hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids[:num_prompt])), 0, cache)
    hidden_SM, last = hidden_SM[-1:], 0
    for start in range(num_prompt, len(ids), width):
        chunk = list(ids[start : start + width])
        last = len(chunk) - 1
        num_filler = min(width, decoder.config.max_positions - start) - len(chunk)
        rows = chunk + chunk[-1:] * num_filler
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(rows)), start, cache)
    return decoder.logits(hidden_SM)[last].float()


@torch.inference_mode()
def loglikelihood(
    decoder: TargetDecoder, context_ids: Sequence[int], continuation_ids: Sequence[int]
) -> tuple[float, bool]:
    """The natural logarithm of the continuation's probability after the context, in float32 or better, and whether
    greedy decoding gives the same tokens.

    Raises:
        ValueError: no context, which the first token's probability depends on.
    """
    if not context_ids:
        raise ValueError("a continuation needs at least one token of context")
    ids = [*context_ids, *continuation_ids][:-1]
    if not continuation_ids:
        return 0.0, True
    cache = decoder.new_cache(len(ids))
    hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids)), 0, cache)
    hidden_SM = hidden_SM[len(context_ids) - 1 :]
    total, is_greedy = 0.0, True
    for start in range(0, len(continuation_ids), ROWS):
        logits_RV = decoder.logits(hidden_SM[start : start + ROWS])
        ids_R = torch.tensor(continuation_ids[start : start + ROWS], dtype=torch.long, device=logits_RV.device)
        log_probabilities_RV = logits_RV.float().log_softmax(dim=-1)
        total += float(log_probabilities_RV.gather(1, ids_R[:, None]).double().sum())
        is_greedy = is_greedy and bool((argmax(logits_RV).to(ids_R.device) == ids_R).all())
    return total, is_greedy
