"""Packed multiplications against plain ones, and the plain ones where packing is missing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from spdbench.models.cpu import linear as linear_module
from spdbench.models.cpu.linear import PackedLinear, PlainLinear, linear
from tests.tiny import tensor

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 5, 8, 11, 16, 33]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without numba."""
    monkeypatch.setattr(linear_module, "_packing_works", lambda _: False)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    loose = found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=2e-2 if loose else 1e-5, atol=8e-2 if loose else 1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_multiplications_and_what_is_fused_to_them(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    weight = tensor(48, 40, dtype=dtype)
    bias = tensor(48, dtype=dtype, seed=2) if with_bias else None
    x, other = tensor(rows, 40, dtype=dtype, seed=3), tensor(rows, 48, dtype=dtype, seed=4)
    multiply = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    near(linear(weight, bias)(x), multiply)
    near(linear(weight, bias).plus(x, other), other.float() + multiply)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_unpacks_to_itself(dtype: torch.dtype) -> None:
    weight = tensor(48, 40, dtype=dtype)
    assert torch.equal(linear(weight).plain(), weight)
    assert linear(weight).nbytes == weight.nbytes


@pytest.mark.usefixtures("unpacked")
def test_without_packing_plain_multiplications_serve() -> None:
    weight, x = tensor(48, 40), tensor(3, 40, seed=2)
    assert isinstance(linear(weight), PlainLinear)
    near(linear(weight)(x), functional.linear(x, weight))
    near(linear(weight).plus(x, tensor(3, 48)), functional.linear(x, weight) + tensor(3, 48))
    assert torch.equal(linear(weight).plain(), weight)


def test_this_machine_packs_what_it_should() -> None:
    assert isinstance(linear(tensor(8, 8)), PackedLinear)
    assert isinstance(linear(tensor(8, 8, dtype=torch.bfloat16)), PackedLinear)
    assert isinstance(linear(tensor(8, 9, dtype=torch.bfloat16)), PlainLinear)  # inputs go in pairs
    assert isinstance(linear(tensor(8, 8, dtype=torch.float16)), PlainLinear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 1536), (960, 576), (33, 2050)])
def test_a_row_gets_the_same_bits_alone_and_in_company(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, rows, other = (
        tensor(*shape, dtype=dtype),
        tensor(20, shape[1], dtype=dtype),
        tensor(20, shape[0], dtype=dtype),
    )
    multiply = linear(weight)
    for count in (2, 5, 8, 20):
        together, added = multiply(rows[:count]), multiply.plus(rows[:count], other[:count])
        for i in range(count):
            assert torch.equal(multiply(rows[i : i + 1])[0], together[i])
            assert torch.equal(multiply.plus(rows[i : i + 1], other[i : i + 1])[0], added[i])


@pytest.mark.parametrize("shape", [(262, 64), (48, 40), (7, 6)])
def test_sizes_that_fill_no_block_are_whole(shape: tuple[int, int]) -> None:
    weight, rows = tensor(*shape), tensor(3, shape[1])
    assert torch.equal(linear(weight).plain(), weight)
    near(linear(weight)(rows), functional.linear(rows, weight))


def test_rows_that_do_not_fit_are_refused() -> None:
    multiply = linear(tensor(32, 16))
    for rows in (tensor(1, 8), tensor(1, 16, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="do not fit a weight"):
            multiply(rows)


def test_processors_without_wide_registers_are_served_too(tmp_path: Path) -> None:
    """The rest of this module's tests, compiled for a processor of 2013 (Haswell)."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86 processor")
    features = "+sse2,+sse4.1,+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+64bit,+cx8,+cmov,+fxsr,+mmx,+sse,+sse3,+ssse3"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not processors"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
