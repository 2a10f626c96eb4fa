"""The likeliest tokens, by compiled code or by torch."""

from __future__ import annotations

import pytest
import torch

from spdbench.models.layer_ops import argmax, has_cpu_kernels, top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (262,), (3, 5), (4, 200), (2, 49152)])
def test_it_is_the_argmax(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = argmax(logits)
    assert found.dtype == torch.long
    assert torch.equal(logits.gather(-1, found[..., None]), logits.max(dim=-1, keepdim=True).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equals_the_first_one_wins(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 300, dtype=dtype)
    logits[0, [7, 130, 299]] = 1.0
    logits[1, [70, 298]] = 2.0
    assert argmax(logits).tolist() == [7, 70]
    assert argmax(torch.full((5,), -torch.inf, dtype=dtype)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "count"), [((1, 1), 1), ((3, 5), 5), ((4, 200), 3), ((2, 8192), 8), ((1, 49152), 64)]
)
def test_the_best_and_their_log_probabilities(dtype: torch.dtype, shape: tuple[int, int], count: int) -> None:
    logits = (5 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    scores, ids = top_k(logits, count)
    expected = logits.double().log_softmax(dim=-1)
    assert (scores.dtype, ids.dtype) == (torch.float32, torch.long)
    assert all(len(set(row)) == count for row in ids.tolist())
    assert torch.equal(logits.gather(-1, ids), logits.topk(count, dim=-1).values)
    torch.testing.assert_close(scores.double(), expected.gather(-1, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_ones_the_first_are_the_best(dtype: torch.dtype) -> None:
    if not has_cpu_kernels(dtype, torch.device("cpu")):
        pytest.skip("there are no compiled kernels here")
    logits = torch.zeros(2, 300, dtype=dtype)
    logits[0, [7, 130, 299]] = 1.0
    logits[1, [298, 70, 3]] = torch.tensor([3.0, 2.0, 2.0], dtype=dtype)
    assert top_k(logits, 5)[1].tolist() == [[7, 130, 299, 0, 1], [298, 3, 70, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_more_than_all_tokens_are_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        top_k(torch.zeros(2, 3, dtype=dtype), 4)


def test_not_numbers_are_no_candidates_of_the_compiled_kernel() -> None:
    if not has_cpu_kernels(torch.float32, torch.device("cpu")):
        pytest.skip("there are no compiled kernels here")
    scores, ids = top_k(torch.tensor([[1.0, torch.nan, 3.0, 2.0]]), 3)
    assert ids.tolist() == [[2, 3, 0]]
    assert scores.isnan().all()
