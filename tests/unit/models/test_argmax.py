"""The likeliest token, by compiled code or by torch."""

from __future__ import annotations

import pytest
import torch

from spdbench.models.layer_ops import argmax


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
