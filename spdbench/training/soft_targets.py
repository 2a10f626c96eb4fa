"""The loss of every method against the target's distribution, and which drafts EAGLE and Medusa count in it.

The loss applies the heads to a few rows at a time and works out the gradients on the way (softmax minus target), so
that all logits are never held at once.

EAGLE and Medusa draft several levels from every token of an answer. Level k's draft from token t proposes the token at
t + 2 + k, so the target scores it by its distribution at position t + 1 + k, restricted to the draft vocabulary and
normalised again. One position scores drafts of several levels, and its distribution is computed once for all of them.

Shapes: B conversations, S tokens, R rows that draft, K levels, X drafts, N positions that score them, C ranks, M model
width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from spdbench.training.recipe import Batch, Counts, Teacher, TrainedVocabulary

CHUNK = 2**21
"""Logits held at once: 8 MB in float32, which nearly fits a CPU's cache."""


@dataclass(frozen=True)
class DraftRows:
    """The tokens of a batch that draft: those whose next token (the root) and the one after it are part of an answer.

    `tokens_BR` are their indices in the text, padded with 0. `run_BR` counts a row and the rows directly before it, 0
    on padding: row r's root scores a draft of level k from row r - k if r's run is longer than k.
    """

    tokens_BR: Tensor
    run_BR: Tensor

    @property
    def real(self) -> Tensor:
        """`[B, R]`: false on padding."""
        return self.run_BR > 0

    def scored(self, level: int) -> Tensor:
        """`[B, R]`: rows from which a draft of `level` ends within the answer."""
        return pad(self.run_BR, (0, level))[:, level:] > level

    def ahead(self, values: Tensor, count: int) -> Tensor:
        """The values `[B, S, ...]` that lie `count` tokens behind each row: `[B, R, ...]`; past the end, the last."""
        batch_B1 = torch.arange(len(values), device=values.device)[:, None]
        return values[batch_B1, (self.tokens_BR + count).clamp(max=values.shape[1] - 1)]


def draft_rows(batch: Batch) -> DraftRows:
    """The rows of a batch; at least one column, so that shapes are never empty."""
    starts_BS = batch.answers_BS & pad(batch.answers_BS, (0, 1))[:, 1:]
    index_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    broken_BS = torch.where(starts_BS, -1, index_S).cummax(dim=1).values
    width = max(1, int(starts_BS.sum(dim=1).max()))
    order_BR = (~starts_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    real_BR = starts_BS.gather(1, order_BR)
    runs_BR = (index_S - broken_BS).gather(1, order_BR)
    return DraftRows(order_BR.masked_fill(~real_BR, 0), runs_BR.masked_fill(~real_BR, 0))


@dataclass(frozen=True)
class ScoredDrafts:
    """X drafts of a batch, in the order of the N positions that score them.

    Draft x is of level `levels_X[x]` from row `rows_X[x]` of the batch's B R, and position `positions_X[x]` scores it.
    There, `target_NM` is the target's state after its final norm, and `labels_N` its choice as a draft id. Positions
    whose choice is not in the draft vocabulary score nothing.
    """

    rows_X: Tensor
    levels_X: Tensor
    positions_X: Tensor
    target_NM: Tensor
    labels_N: Tensor

    def only(self, kept_X: Tensor) -> ScoredDrafts:
        """Some of the drafts."""
        rows, levels, positions = (values[kept_X] for values in (self.rows_X, self.levels_X, self.positions_X))
        return ScoredDrafts(rows, levels, positions, self.target_NM, self.labels_N)


def scored_drafts(
    batch: Batch, rows: DraftRows, teacher: Teacher, vocabulary: TrainedVocabulary, levels: int
) -> ScoredDrafts:
    """All drafts of the batch. A row's root scores drafts of the row and of those directly before it."""
    labels_BR = vocabulary.draft_ids(rows.ahead(batch.argmax_BS, 1))
    roots_N = (rows.real & (labels_BR >= 0)).flatten().nonzero()[:, 0]
    runs_N = rows.run_BR.flatten()[roots_N]
    positions_X, levels_X = (runs_N[:, None] > torch.arange(levels, device=runs_N.device)).nonzero().unbind(dim=1)
    last_BRM = rows.ahead(batch.states[teacher.config.num_layers], 1)
    target_NM, labels_N = teacher.normed(last_BRM.flatten(0, 1)[roots_N]), labels_BR.flatten()[roots_N]
    return ScoredDrafts(roots_N[positions_X] - levels_X, levels_X, positions_X, target_NM, labels_N)


def soft_loss(
    drafts_XM: Tensor, head_UM: Tensor, target_head_UM: Tensor, scored: ScoredDrafts, decay: float
) -> tuple[Tensor, dict[str, float]]:
    """The levels' mean cross entropies against the target's softmax, level k weighted by `decay`^k, and log figures.

    `drafts_XM` are the states that `head_UM` is applied to.
    """
    levels_X = scored.levels_X
    counts_K = levels_X.bincount()
    weights_X = decay**levels_X / counts_K[levels_X]
    total, entropy_X, right_X = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        drafts_XM, head_UM, scored.target_NM, target_head_UM, weights_X, scored.positions_X, scored.labels_N
    )
    figures = {}
    for level in counts_K.nonzero()[:, 0].tolist():
        of_level = levels_X == level
        figures[f"loss_{level}"] = float(entropy_X[of_level].mean())
        figures[f"top1_{level}"] = float(right_X[of_level].float().mean())
    return total, figures


def mean_kl(student_NM: Tensor, head_UM: Tensor, teacher_NM: Tensor, teacher_head_UM: Tensor) -> Tensor:
    """The mean over rows of KL(teacher || student) over the heads' tokens, in nats; 0 without rows.

    Gradients reach `student_NM`, and `head_UM` where it is trained: they are those of the cross entropy, as the
    teacher's own entropy is a constant.
    """
    count = len(student_NM)
    ones_N, every_N = student_NM.new_ones(count), torch.arange(count, device=student_NM.device)
    total: Tensor = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        student_NM, head_UM, teacher_NM, teacher_head_UM, ones_N, every_N, None
    )[0]
    return total / max(1, count)


class _SoftCrossEntropy(torch.autograd.Function):
    """The weighted sum of X drafts' cross entropies, each draft's own, and whether its first choice is the label.

    Without labels, draft x has target x, and its entropy is subtracted: the cross entropy becomes the KL divergence.
    Gradients are computed in the forward pass: keeping X U logits for the backward pass would take gigabytes.
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
        labels_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device = gemm_dtype(drafts_XM), drafts_XM.device
        entropy_X = torch.zeros(len(drafts_XM), device=device)
        right_X = torch.zeros(len(drafts_XM), dtype=torch.bool, device=device)
        grad_XM = torch.zeros(drafts_XM.shape, device=device)
        grad_UM = torch.zeros_like(head_UM) if ctx.needs_input_grad[1] else None
        with torch.autocast(device.type, enabled=False):
            drafts_XM, target_NM = drafts_XM.to(dtype), target_NM.to(dtype)
            own_UM, target_UM = head_UM.to(dtype), target_head_UM.to(dtype)
            for at, some in _chunks(positions_X, len(target_NM), len(head_UM)):
                logits_NU = (target_NM[at] @ target_UM.T).float()
                logs_XU = (drafts_XM[some] @ own_UM.T).float().log_softmax(dim=-1)
                if labels_N is None:
                    target_logs_XU = logits_NU.log_softmax(dim=-1)
                    target_XU = target_logs_XU.exp()
                    entropy_X[some] = torch.linalg.vecdot(target_logs_XU.sub_(logs_XU), target_XU)
                else:
                    target_XU = logits_NU.softmax(dim=-1)[positions_X[some] - at.start]
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
    """Cuts positions, and with them the drafts that they score, into parts of few enough logits."""
    per_position = max(1, len(positions_X) // max(1, num_positions))
    step = max(8, CHUNK // (num_logits * per_position))
    edges = torch.arange(0, num_positions + step, step, device=positions_X.device)
    ends = torch.searchsorted(positions_X, edges).tolist()
    for index, start in enumerate(edges[:-1].tolist()):
        yield slice(start, start + step), slice(ends[index], ends[index + 1])


def gemm_dtype(like: Tensor) -> torch.dtype:
    """The dtype of matrix multiplications on the device of `like`: autocast's, or float32.

    Asked once for a whole head: autocast itself would convert the head again for every chunk.
    """
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def best_drafts(states: Tensor, head_UM: Tensor, count: int) -> Tensor:
    """The `count` most probable draft ids of states of any shape, best first: `[..., count]`."""
    dtype = gemm_dtype(states)
    flat_NM, head_UM = states.flatten(0, -2).to(dtype), head_UM.to(dtype)
    chunks = torch.split(flat_NM, max(16, CHUNK // len(head_UM)))
    logits = (chunk_NM @ head_UM.T for chunk_NM in chunks)
    # argmax, as decoding does: of equal logits, which are common in bfloat16, it takes the first, and topk any.
    best = [part.argmax(-1, keepdim=True) if count == 1 else part.topk(count, dim=-1).indices for part in logits]
    return torch.cat(best).view(*states.shape[:-1], count)


def greedy_drafts(states: Tensor, head_UM: Tensor) -> Tensor:
    """The most probable draft id of states of any shape: `[...]`."""
    return best_drafts(states, head_UM, 1)[..., 0]


def rank_counts(batch: Batch, rows: DraftRows, ranked: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How often each level was judged, `[K]`, and how often its draft of each rank was right, `[K, C]`.

    `ranked` are token ids `[B, R, C]` of each level. A level is judged where one of the C drafts of every level before
    it was right: where a tree of them all would have led to it.
    """
    judged, right = [], []
    reached_BR = rows.real
    for level, drafts_BRC in enumerate(ranked):
        judged_BR, target_BR = reached_BR & rows.scored(level), rows.ahead(batch.argmax_BS, 1 + level)
        right_BRC = judged_BR[..., None] & (drafts_BRC == target_BR[..., None])
        judged.append(judged_BR.sum())
        right.append(right_BRC.sum(dim=(0, 1)))
        reached_BR = right_BRC.any(dim=-1) & (rows.ahead(batch.ids_BS, 2 + level) == target_BR)
    return torch.stack(judged).cpu(), torch.stack(right).cpu()


def chain_counts(batch: Batch, rows: DraftRows, drafts: Sequence[Tensor]) -> Counts:
    """First choices as token ids `[B, R]` of each level, judged along the given text as a chain from every row.

    A draft is judged if those before it are the target's choices and the text's tokens. On the target's own text that
    is what decoding does from there; the starts of its rounds are left open, as they depend on how long rounds are.
    """
    judged_K, right_KC = rank_counts(batch, rows, [drafts_BR[..., None] for drafts_BR in drafts])
    return Counts(tuple(judged_K.tolist()), tuple(right_KC[:, 0].tolist()))
