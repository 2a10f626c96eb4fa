"""What the target says of given ids: the log-likelihood of a text.

Shapes: S rows, M model width, R rows at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax

ROWS = 64
"""Rows whose logits are in memory at a time."""


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
