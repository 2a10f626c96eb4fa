"""How far a student's next-token distribution is from its teacher's, without ever holding all logits at once.

The head's product, both softmaxes and the gradient are done chunk by chunk of rows, so that logits stay in the
processor's caches. Must not know whose rows these are.

Shapes: N rows, M model width, U tokens of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

CHUNK = 256
"""Rows at a time: 8 MB of logits for 8,192 tokens."""


def kl_rows(student_NM: Tensor, teacher_NM: Tensor, head_UM: Tensor, teacher_head_UM: Tensor | None = None) -> Tensor:
    """The sum over rows of KL(teacher || student) over the head's tokens, in nats.

    Both rows come after their final norms. `teacher_head_UM` is the student's own head where it is not given. Gradients
    reach `student_NM`, and `head_UM` where it is trained.
    """
    total: Tensor = _KL.apply(student_NM, teacher_NM, head_UM, teacher_head_UM)  # type: ignore[no-untyped-call]
    return total


def greedy_tokens(rows_NM: Tensor, head_UM: Tensor) -> Tensor:
    """The likeliest of the head's tokens for each row, as its index: `[N]`."""
    head_UM = head_UM.to(_product_dtype(rows_NM))
    chosen = [linear(chunk.to(head_UM.dtype), head_UM).argmax(dim=-1) for chunk in torch.split(rows_NM, CHUNK)]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long, device=rows_NM.device)


def _product_dtype(rows: Tensor) -> torch.dtype:
    """What autocast would multiply in; asked once, so that a head is converted once and not for each chunk."""
    kind = rows.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NM: Tensor, teacher_NM: Tensor, head_UM: Tensor, teacher_head_UM: Tensor | None
    ) -> Tensor:
        dtype = _product_dtype(student_NM)
        rows_grad, head_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        head = head_UM.to(dtype)
        teacher_head = head if teacher_head_UM is None else teacher_head_UM.to(dtype)
        total = torch.zeros((), device=student_NM.device)
        grad_NM = torch.zeros_like(student_NM) if rows_grad else None
        grad_UM = torch.zeros_like(head_UM) if head_grad else None
        for start in range(0, student_NM.shape[0], CHUNK):
            chunk = slice(start, start + CHUNK)
            rows = student_NM[chunk].to(dtype)
            student = log_softmax(linear(rows, head).float(), dim=-1)
            teacher = log_softmax(linear(teacher_NM[chunk].to(dtype), teacher_head).float(), dim=-1)
            shares = teacher.exp()
            total += (shares * teacher.sub_(student)).sum()
            if grad_NM is None and grad_UM is None:
                continue
            surplus = student.exp_().sub_(shares).to(dtype)
            if grad_NM is not None:
                grad_NM[chunk] = surplus @ head
            if grad_UM is not None:
                grad_UM += surplus.T @ rows
        ctx.save_for_backward(grad_NM, grad_UM)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_NM, grad_UM = ctx.saved_tensors
        return (
            None if grad_NM is None else grad * grad_NM,
            None,
            None if grad_UM is None else grad * grad_UM,
            None,
        )
