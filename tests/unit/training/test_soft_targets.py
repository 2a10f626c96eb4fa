"""The fused divergence equals the textbook's, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div, linear

from spdbench.training import soft_targets
from spdbench.training.soft_targets import greedy_drafts, mean_kl


@pytest.mark.parametrize("own_head", [False, True])
def test_divergence_and_gradients_are_those_of_whole_logits(monkeypatch: pytest.MonkeyPatch, own_head: bool) -> None:
    monkeypatch.setattr(soft_targets, "CHUNK", 3)
    torch.manual_seed(0)
    student, teacher = torch.randn(27, 8, requires_grad=True), torch.randn(27, 8)
    head = torch.randn(20, 8, requires_grad=own_head)
    other = torch.randn(20, 8)
    found = mean_kl(student, head, teacher, other)
    found.backward()  # type: ignore[no-untyped-call]
    gradients = [student.grad, head.grad]
    student.grad = head.grad = None
    student_logits, teacher_logits = linear(student, head), linear(teacher, other)
    expected = kl_div(
        student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, [student.grad, head.grad])


def test_no_rows_have_no_divergence() -> None:
    student, head = torch.empty(0, 8, requires_grad=True), torch.randn(20, 8)
    total = mean_kl(student, head, torch.empty(0, 8), head)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert greedy_drafts(student, head).tolist() == []


def test_greedy_draft_is_the_most_probable_and_the_first_of_equals() -> None:
    rows, head = torch.randn(5, 8), torch.randn(20, 8)
    assert greedy_drafts(rows, head).tolist() == linear(rows, head).argmax(-1).tolist()
    assert greedy_drafts(torch.ones(2, 3, 8), torch.ones(20, 8)).tolist() == [[0] * 3] * 2
