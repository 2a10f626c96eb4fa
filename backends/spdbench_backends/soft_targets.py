"""What EAGLE's and Medusa's training share: which drafts count, and their loss against the target's distribution.

Both draft several levels from every token of an answer, and level k's draft at t stands for the token at t + 2 + k, so
the target judges it by its distribution at position t + 1 + k. That distribution is cut to the draft vocabulary and
made whole again; it is computed once for all levels that it judges. Must not know what made the drafts.

Shapes: B conversations, S tokens, R rows that draft, K levels, X drafts, N positions that judge them, C ranks, M model
width, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    there is a draft of level k from row r - k for row r's root to judge if its run is longer than k.
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
    """X drafts of a batch that are judged, in the order of the N positions that judge them.

    Draft x is the one of level `levels_X[x]` from row `rows_X[x]` of the batch's B R, and position `positions_X[x]`
    judges it. Position n stands one token behind row `roots_N[n]`; `labels_N` is what the target chooses there, as
    draft ids. Positions whose choice is not in the draft vocabulary judge nothing.
    """

    rows_X: Tensor
    levels_X: Tensor
    positions_X: Tensor
    roots_N: Tensor
    labels_N: Tensor

    def only(self, kept_X: Tensor) -> Judged:
        """Some of the drafts."""
        rows, levels, positions = (values[kept_X] for values in (self.rows_X, self.levels_X, self.positions_X))
        return Judged(rows, levels, positions, self.roots_N, self.labels_N)


def judged_drafts(batch: Batch, rows: DraftRows, vocabulary: DraftVocabulary, levels: int) -> Judged:
    """All that the batch has. A row's root judges the drafts of the row and of those right before it."""
    labels_BR = vocabulary.indices(rows.ahead(batch.argmax_BS, 1))
    roots_N = (rows.real & (labels_BR >= 0)).flatten().nonzero()[:, 0]
    runs_N = rows.run_BR.flatten()[roots_N]
    positions_X, levels_X = (runs_N[:, None] > torch.arange(levels, device=runs_N.device)).nonzero().unbind(dim=1)
    return Judged(roots_N[positions_X] - levels_X, levels_X, positions_X, roots_N, labels_BR.flatten()[roots_N])


def soft_loss(
    drafts_XM: Tensor, head_UM: Tensor, target_NM: Tensor, target_head_UM: Tensor, judged: Judged, decay: float
) -> tuple[Tensor, dict[str, float]]:
    """Levels' mean cross entropies against the target's softmax, level k weighed by `decay`^k, and figures for a log.

    `drafts_XM` and `target_NM` are states that the heads are applied to.
    """
    levels_X = judged.levels_X
    counts_K = levels_X.bincount()
    weights_X = decay**levels_X / counts_K[levels_X]
    total, entropy_X, right_X = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        drafts_XM, head_UM, target_NM, target_head_UM, weights_X, judged.positions_X, judged.labels_N
    )
    figures = {}
    for level in range(len(counts_K)):
        of_level = levels_X == level
        if not counts_K[level]:
            continue
        figures[f"loss_{level}"] = float(entropy_X[of_level].mean())
        figures[f"top1_{level}"] = float(right_X[of_level].float().mean())
    return total, figures


class _SoftCrossEntropy(torch.autograd.Function):
    """Weighs and sums X drafts' cross entropies, those of a few positions at a time.

    Gradients are worked out on the way, softmax minus target, as keeping X U logits for them would take gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        drafts_XM: Tensor,
        head_UM: Tensor,
        target_NM: Tensor,
        target_head_UM: Tensor,
        weights_X: Tensor,
        positions_X: Tensor,
        labels_N: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device = product_dtype(drafts_XM), drafts_XM.device
        entropy_X = torch.zeros(len(drafts_XM), device=device)
        right_X = torch.zeros(len(drafts_XM), dtype=torch.bool, device=device)
        grad_XM = torch.zeros(drafts_XM.shape, device=device)
        grad_UM = torch.zeros_like(head_UM) if ctx.needs_input_grad[1] else None
        with torch.autocast(device.type, enabled=False):
            drafts_XM, target_NM = drafts_XM.to(dtype), target_NM.to(dtype)
            own_UM, target_UM = head_UM.to(dtype), target_head_UM.to(dtype)
            for at, some in _chunks(positions_X, len(target_NM), len(head_UM)):
                target_NU = (target_NM[at] @ target_UM.T).float().softmax(dim=-1)
                target_XU = target_NU[positions_X[some] - at.start]
                logs_XU = (drafts_XM[some] @ own_UM.T).float().log_softmax(dim=-1)
                entropy_X[some] = -torch.linalg.vecdot(logs_XU, target_XU)
                chosen_X = logs_XU.gather(-1, labels_N[positions_X[some], None])[:, 0]
                right_X[some] = chosen_X >= logs_XU.amax(dim=-1)
                error_XU = logs_XU.exp_().sub_(target_XU).to(dtype)
                grad_XM[some] = (error_XU @ own_UM) * weights_X[some, None]
                if grad_UM is not None:
                    grad_UM += error_XU.T @ (drafts_XM[some] * weights_X[some, None]).to(dtype)
        ctx.save_for_backward(grad_XM, grad_UM)
        ctx.mark_non_differentiable(entropy_X, right_X)
        return (weights_X * entropy_X).sum(), entropy_X, right_X

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_XM, grad_UM = ctx.saved_tensors
        grad = grads[0]
        return grad_XM * grad, None if grad_UM is None else grad_UM * grad, None, None, None, None, None


def _chunks(positions_X: Tensor, num_positions: int, num_logits: int) -> Iterator[tuple[slice, slice]]:
    """Cuts positions, and with them the drafts that they judge, into parts of few enough logits."""
    per_position = max(1, len(positions_X) // max(1, num_positions))
    step = max(8, CHUNK // (num_logits * per_position))
    edges = torch.arange(0, num_positions + step, step, device=positions_X.device)
    ends = torch.searchsorted(positions_X, edges).tolist()
    for index, start in enumerate(edges[:-1].tolist()):
        yield slice(start, start + step), slice(ends[index], ends[index + 1])


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
