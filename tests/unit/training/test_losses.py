"""The fused divergence equals the textbook's, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, linear

from spdbench.training import losses
from spdbench.training.losses import greedy_tokens, kl_rows


@pytest.mark.parametrize("own_head", [False, True])
def test_divergence_and_gradients_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, own_head: bool) -> None:
    monkeypatch.setattr(losses, "CHUNK", 3)
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    head = torch.randn(20, 8, requires_grad=own_head)
    other = torch.randn(20, 8)
    found = kl_rows(student, teacher, head, other)
    found.backward()  # type: ignore[no-untyped-call]
    gradients = [student.grad, head.grad]
    student.grad = head.grad = None
    expected = kl_div(
        linear(student, head).log_softmax(-1), linear(teacher, other).log_softmax(-1), log_target=True, reduction="sum"
    )
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, [student.grad, head.grad])


def test_no_rows_have_no_divergence() -> None:
    student, head = torch.empty(0, 8, requires_grad=True), torch.randn(20, 8)
    total = kl_rows(student, torch.empty(0, 8), head)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert greedy_tokens(student, head).tolist() == []


def test_greedy_token_is_the_likeliest() -> None:
    rows, head = torch.randn(5, 8), torch.randn(20, 8)
    assert greedy_tokens(rows, head).tolist() == linear(rows, head).argmax(-1).tolist()
