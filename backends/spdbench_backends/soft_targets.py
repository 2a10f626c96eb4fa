"""What EAGLE's and Medusa's training share: which drafts count, and their loss against the target's distribution.

Both draft several levels from every token of an answer, and level k's draft at t stands for the token at t + 2 + k, so
the target judges it by its distribution at position t + 1 + k. That distribution is cut to the draft vocabulary and
made whole again; it is computed once for all levels that it judges. Must not know what made the drafts.

Shapes: B conversations, S tokens, R rows that draft, K levels, N judged positions, M model width, U draft vocabulary,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spdbench.training.recipe import Batch, Counts

CHUNK = 2**21
"""Logits held at once: few enough to stay in a CPU's cache, or nearly."""


@dataclass(frozen=True)
class DraftRows:
    """The tokens of a batch that draft: those whose next token, the root, is of an answer, as is the one behind it.

    `tokens_BR` says where they stand, padded with 0. `run_BR` counts a row and the rows right before it, 0 on padding:
    the draft of level k that row r's root is judged by comes from row r - k, if its run is longer than k.
    """

    tokens_BR: Tensor
    run_BR: Tensor

    @property
    def real(self) -> Tensor:
        return self.run_BR > 0

    def judged(self, level: int) -> Tensor:
        """`[B, R]`: rows from which a draft of `level` ends within the answer."""
        return pad(self.run_BR, (0, level))[:, level:] > level

    def ahead(self, values_BS: Tensor, count: int) -> Tensor:
        """What stands `count` tokens behind each row, `[B, R]`; past the end, the last one."""
        return values_BS.gather(1, (self.tokens_BR + count).clamp(max=values_BS.shape[1] - 1))

    def states(self, hidden_BSM: Tensor, count: int = 0) -> Tensor:
        """The hidden states that stand `count` tokens behind each row, `[B, R, M]`."""
        at_BR = (self.tokens_BR + count).clamp(max=hidden_BSM.shape[1] - 1)
        return hidden_BSM.gather(1, at_BR[..., None].expand(-1, -1, hidden_BSM.shape[-1]))


def draft_rows(batch: Batch) -> DraftRows:
    """The rows of a batch; at least one column, so that there is always something to compute."""
    starts_BS = batch.answers_BS & pad(batch.answers_BS, (0, 1))[:, 1:]
    index_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    broken_BS = torch.where(starts_BS, -1, index_S).cummax(dim=1).values
    width = max(1, int(starts_BS.sum(dim=1).max()))
    order_BR = (~starts_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    real_BR = starts_BS.gather(1, order_BR)
    runs_BR = (index_S - broken_BS).gather(1, order_BR)
    return DraftRows(order_BR.masked_fill(~real_BR, 0), runs_BR.masked_fill(~real_BR, 0))


class DraftVocabulary:
    """The tokens that are drafted, with the target's own rows of its head; all tokens if `ids_U` is None."""

    def __init__(self, ids_U: Tensor | None, head_VM: Tensor) -> None:
        self.ids_U = ids_U
        self.rows_UM = head_VM if ids_U is None else head_VM[ids_U]
        self._index_V = torch.arange(len(head_VM), device=head_VM.device)
        if ids_U is not None:
            self._index_V = torch.full_like(self._index_V, -1)
            self._index_V[ids_U] = torch.arange(len(ids_U), device=head_VM.device)

    def indices(self, token_ids: Tensor) -> Tensor:
        """Where tokens stand in the vocabulary, -1 for those that are not in it."""
        return self._index_V[token_ids]

    def token_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.ids_U is None else self.ids_U[draft_ids]


@dataclass(frozen=True)
class Judged:
    """The positions of a batch that judge drafts, N in all, and the rows that the drafts come from.

    `rows_KN` are indices into the batch's B R rows, and `counts_KN` says where they count: the row is there, and the
    target's choice is in the draft vocabulary. `labels_N` are those choices as draft ids.
    """

    rows_KN: Tensor
    counts_KN: Tensor
    labels_N: Tensor

    def drafts(self, hidden_KBRM: Tensor) -> Tensor:
        """Every level's states for the positions: `[K, N, M]`."""
        level_K1 = torch.arange(len(self.rows_KN), device=hidden_KBRM.device)[:, None]
        return hidden_KBRM.flatten(1, 2)[level_K1, self.rows_KN]


def judged_positions(batch: Batch, rows: DraftRows, vocabulary: DraftVocabulary, levels: int) -> Judged:
    """Row r judges by the position of its root, one token behind it."""
    labels_BR = vocabulary.indices(rows.ahead(batch.argmax_BS, 1))
    at_N = (rows.real & (labels_BR >= 0)).flatten().nonzero()[:, 0]
    levels_K1 = torch.arange(levels, device=at_N.device)[:, None]
    counts_KN = rows.run_BR.flatten()[at_N] > levels_K1
    return Judged((at_N - levels_K1) * counts_KN, counts_KN, labels_BR.flatten()[at_N])


def soft_loss(
    drafts_KNM: Tensor, head_UM: Tensor, target_NM: Tensor, target_head_UM: Tensor, judged: Judged, decay: float
) -> tuple[Tensor, dict[str, float]]:
    """Levels' mean cross entropies against the target's softmax, level k weighed by `decay`^k, and figures for a log.

    `drafts_KNM` and `target_NM` are states that the heads are applied to.
    """
    levels = len(drafts_KNM)
    counts_KN = judged.counts_KN
    decays_K1 = decay ** torch.arange(levels, device=counts_KN.device)[:, None]
    weights_KN = counts_KN / counts_KN.sum(dim=1, keepdim=True).clamp(min=1) * decays_K1
    total, entropy_KN, right_KN = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        drafts_KNM, head_UM, target_NM, target_head_UM, weights_KN, judged.labels_N
    )
    figures = {}
    for level in range(levels):
        there_N = counts_KN[level]
        if bool(there_N.any()):
            figures[f"loss_{level}"] = float(entropy_KN[level][there_N].mean())
            figures[f"top1_{level}"] = float(right_KN[level][there_N].float().mean())
    return total, figures


class _SoftCrossEntropy(torch.autograd.Function):
    """Weighs and sums cross entropies of N positions at K levels, a few positions at a time.

    Gradients are worked out on the way, softmax minus target, as keeping K N U logits for them would take gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        drafts_KNM: Tensor,
        head_UM: Tensor,
        target_NM: Tensor,
        target_head_UM: Tensor,
        weights_KN: Tensor,
        labels_N: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = product_dtype(drafts_KNM)
        device = drafts_KNM.device.type
        levels, num, _ = drafts_KNM.shape
        with torch.autocast(device, enabled=False):
            drafts_KNM, target_NM = drafts_KNM.to(dtype), target_NM.to(dtype)
            same = head_UM is target_head_UM
            head_UM = head_UM.to(dtype)
            target_head_UM = head_UM if same else target_head_UM.to(dtype)
            entropy_KN = torch.zeros(levels, num, device=drafts_KNM.device)
            right_KN = torch.zeros(levels, num, dtype=torch.bool, device=drafts_KNM.device)
            grad_KNM = torch.zeros_like(drafts_KNM)
            grad_UM = torch.zeros(head_UM.shape, device=drafts_KNM.device) if ctx.needs_input_grad[1] else None
            size = max(16, CHUNK // (levels * len(head_UM)))
            for start in range(0, num, size):
                some = slice(start, start + size)
                target_NU = (target_NM[some] @ target_head_UM.T).softmax(dim=-1, dtype=torch.float32)
                logs_KNU = (drafts_KNM[:, some] @ head_UM.T).log_softmax(dim=-1, dtype=torch.float32)
                entropy_KN[:, some] = -torch.einsum("knu,nu->kn", logs_KNU, target_NU)
                label_KN1 = labels_N[some, None].expand(levels, -1, 1)
                right_KN[:, some] = logs_KNU.gather(-1, label_KN1)[..., 0] >= logs_KNU.amax(dim=-1)
                error_KNU = logs_KNU.exp_().sub_(target_NU).mul_(weights_KN[:, some, None]).to(dtype)
                grad_KNM[:, some] = error_KNU @ head_UM
                if grad_UM is not None:
                    grad_UM += error_KNU.flatten(0, 1).T @ drafts_KNM[:, some].flatten(0, 1)
        ctx.save_for_backward(grad_KNM, grad_UM)
        ctx.mark_non_differentiable(entropy_KN, right_KN)
        return (weights_KN * entropy_KN).sum(), entropy_KN, right_KN

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_KNM, grad_UM = ctx.saved_tensors
        grad = grads[0]
        return grad_KNM.float() * grad, None if grad_UM is None else grad_UM * grad, None, None, None, None


def product_dtype(like: Tensor) -> torch.dtype:
    """What matrix products are computed in where `like` lives."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def best_drafts(states: Tensor, head_UM: Tensor, count: int = 1) -> Tensor:
    """The `count` likeliest draft ids of states of any shape, best first: `[..., count]`."""
    dtype = product_dtype(states)
    flat_NM, head_UM = states.flatten(0, -2).to(dtype), head_UM.to(dtype)
    chunk = max(16, CHUNK // len(head_UM))
    best = [(part_NM @ head_UM.T).topk(count, dim=-1).indices for part_NM in torch.split(flat_NM, chunk)]
    return torch.cat(best).view(*states.shape[:-1], count)


def chain_counts(batch: Batch, rows: DraftRows, drafts_KBR: Sequence[Tensor]) -> Counts:
    """First choices as token ids, judged along the given text as a chain that starts at every row.

    A draft is judged if those before it are the target's choices and the text's tokens. On a text that is the target's
    own, that is what decoding does from there; where decoding starts its rounds is left open, as it depends on how long
    they are.
    """
    judged, accepted = [], []
    stands_BR = rows.real
    for level, drafts_BR in enumerate(drafts_KBR):
        judged_BR = stands_BR & rows.judged(level)
        right_BR = judged_BR & (drafts_BR == rows.ahead(batch.argmax_BS, 1 + level))
        judged.append(int(judged_BR.sum()))
        accepted.append(int(right_BR.sum()))
        stands_BR = right_BR & (drafts_BR == rows.ahead(batch.ids_BS, 2 + level))
    return Counts(tuple(judged), tuple(accepted))


def rank_counts(batch: Batch, rows: DraftRows, ranked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How often each level was judged, `[K]`, and how often its draft of each rank was right, `[K, C]`.

    `ranked` are token ids `[B, R, C]` of each level. A level is judged where one of the C of every level before it was
    right: where a tree of them all would have led to it.
    """
    judged, right = [], []
    stands_BR = rows.real
    for level, drafts_BRC in enumerate(ranked):
        judged_BR = stands_BR & rows.judged(level)
        right_BRC = judged_BR[..., None] & (drafts_BRC == rows.ahead(batch.argmax_BS, 1 + level)[..., None])
        judged.append(judged_BR.sum())
        right.append(right_BRC.sum(dim=(0, 1)))
        follows_BR = rows.ahead(batch.ids_BS, 2 + level) == rows.ahead(batch.argmax_BS, 1 + level)
        stands_BR = right_BRC.any(dim=-1) & follows_BR
    return torch.stack(judged).cpu(), torch.stack(right).cpu()
