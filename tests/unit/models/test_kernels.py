"""Packed products against plain ones, and the plain ones where packing is missing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from spdbench.models import kernels
from spdbench.models.kernels import FEWEST_ROWS, PackedLinear, PlainLinear, beside_idle, linear

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 8, 33]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose oneDNN operators are not there."""
    monkeypatch.setattr(kernels, "_packing_works", lambda _: False)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    loose = found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=2e-2 if loose else 1e-5, atol=8e-2 if loose else 1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_what_is_fused_to_them(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    weight = tensor(48, 40, dtype=dtype)
    bias = tensor(48, dtype=dtype, seed=2) if with_bias else None
    x, other = tensor(rows, 40, dtype=dtype, seed=3), tensor(rows, 48, dtype=dtype, seed=4)
    product = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    near(linear(weight, bias)(x), product)
    near(linear(weight, bias).plus(x, other), other.float() + product)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_unpacks_to_itself(dtype: torch.dtype) -> None:
    weight = tensor(48, 40, dtype=dtype)
    assert torch.equal(linear(weight).plain(), weight)
    assert linear(weight).nbytes == weight.nbytes


@pytest.mark.usefixtures("unpacked")
def test_without_packing_plain_products_serve() -> None:
    weight, x = tensor(48, 40), tensor(3, 40, seed=2)
    assert isinstance(linear(weight), PlainLinear)
    near(linear(weight)(x), functional.linear(x, weight))
    near(linear(weight).plus(x, tensor(3, 48)), functional.linear(x, weight) + tensor(3, 48))
    assert torch.equal(linear(weight).plain(), weight)


def test_this_machine_packs_what_it_should() -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has no oneDNN")
    assert isinstance(linear(tensor(8, 8)), PackedLinear)
    assert isinstance(linear(tensor(8, 8, dtype=torch.float16)), PlainLinear)


def test_an_operator_that_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(kernels, "_pack", missing)
    assert not kernels._packing_works.__wrapped__(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 1536), (960, 576), (33, 2049)])
def test_a_row_gets_the_same_bits_alone_and_in_company(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """(576, 1536) is such that oneDNN splits the long sum of a row alone, but not of two."""
    weight, rows, other = (
        tensor(*shape, dtype=dtype),
        tensor(8, shape[1], dtype=dtype),
        tensor(8, shape[0], dtype=dtype),
    )
    product = linear(weight)
    for count in (2, 5, 8):
        together, added = product(rows[:count]), product.plus(rows[:count], other[:count])
        for i in range(count):
            assert torch.equal(product(rows[i : i + 1])[0], together[i])
            assert torch.equal(product.plus(rows[i : i + 1], other[i : i + 1])[0], added[i])


def test_few_rows_are_joined_by_idle_ones_and_many_are_left_alone() -> None:
    rows, many = tensor(1, 8), tensor(FEWEST_ROWS, 8)
    assert torch.equal(beside_idle(rows), torch.cat((rows, torch.zeros(FEWEST_ROWS - 1, 8))))
    assert beside_idle(many) is many
