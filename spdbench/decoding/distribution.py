"""What the target's exact distribution says of given ids: quantiles of sampled tokens, the log-likelihood of a text.

Quantiles test sampling on any vocabulary. A token's quantile is a number in [0, 1): the probability of all tokens that
are likelier than it, plus a random part of its own. If an answer follows the target, the quantiles of its tokens, each
given those before it, are independent and uniform, whatever the distributions are (M. Rosenblatt, "Remarks on a
multivariate transformation", Annals of Mathematical Statistics 23 (1952)). So answers to different prompts can be
counted together.

Shapes: N tokens, S rows, M model width, R rows at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spdbench.decoding.sampling import warp
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.types import Sampling

ROWS = 64
"""Rows whose logits are in memory at a time."""


class PlainDistribution:
    """What plain decoding gives after one prompt, for answers of up to `num_tokens` tokens."""

    def __init__(self, decoder: TargetDecoder, prompt_ids: Sequence[int], sampling: Sampling, num_tokens: int) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._num_prompt = len(prompt_ids)
        self._cache = decoder.new_cache(len(prompt_ids) + num_tokens, num_snapshots=num_tokens)
        with torch.inference_mode():
            hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(prompt_ids)), 0, self._cache)
            self._last_1M = hidden_SM[-1:]

    @torch.inference_mode()
    def quantiles(self, token_ids: Sequence[int], uniform: Sequence[float]) -> list[float | None]:
        """The quantile of each token given those before it; None for one whose probability is 0. `uniform` holds a
        number in [0, 1) for each."""
        decoder, rows_NM = self._decoder, self._last_1M
        if before := token_ids[:-1]:
            hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(before)), self._num_prompt, self._cache)
            self._cache.rollback(self._num_prompt)
            rows_NM = torch.cat((rows_NM, hidden_SM))
        target_NV = warp(decoder.logits(rows_NM), self._sampling).double()
        ids_N1 = torch.tensor(token_ids, device=target_NV.device)[:, None]
        own_N1 = target_NV.gather(1, ids_N1)
        others_V = torch.arange(target_NV.shape[1], device=target_NV.device)
        is_before_NV = (target_NV > own_N1) | ((target_NV == own_N1) & (others_V < ids_N1))
        before_N = (target_NV * is_before_NV).sum(1) / target_NV.sum(1)
        shares_N = (own_N1[:, 0] / target_NV.sum(1)).tolist()
        return [
            first + share * number if share > 0.0 else None
            for first, share, number in zip(before_N.tolist(), shares_N, uniform, strict=True)
        ]


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
