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
from spdbench.models.cpu.linear import Linear, PackedLinear, PlainLinear, linear, row_scales
from spdbench.processors import may_use_amx
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


def in_8_bits(*shape: int, bias: torch.Tensor | None = None, seed: int = 0) -> Linear:
    weight = tensor(*shape, dtype=torch.bfloat16, seed=seed)
    return linear(weight, bias, row_scales(weight))


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


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_weights_in_8_bits(rows: int, with_bias: bool) -> None:
    bias = tensor(41, dtype=torch.bfloat16, seed=2) if with_bias else None
    multiply = in_8_bits(41, 40, bias=bias)
    assert isinstance(multiply, PackedLinear)
    assert multiply.packed.dtype == torch.int8
    assert multiply.scale is not None
    numbers = multiply.numbers()
    assert numbers[:41].abs().amax(dim=1).eq(127).all()
    exact = numbers * multiply.scale[:, None]
    x, other = (tensor(rows, size, dtype=torch.bfloat16, seed=size) for size in (40, 41))
    sums = functional.linear(x.float(), exact[:41], None if bias is None else bias.float())
    torch.testing.assert_close(multiply(x).float(), sums, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(multiply.plus(x, other).float(), other.float() + sums, rtol=2**-8, atol=1e-5)


def test_numbers_of_8_bits_come_through_bfloat16_unchanged() -> None:
    """A drafter's file is read as bfloat16, next to its scales; from these the file's own numbers are packed."""
    numbers = torch.arange(-128, 128, dtype=torch.int8).expand(50, 256)
    scale_N = torch.rand(50, generator=torch.Generator().manual_seed(0)) ** 9
    found = PackedLinear.pack(linear_module.from_8_bits(numbers, scale_N), None, scale_N)
    assert torch.equal(found.numbers()[:50], numbers)
    assert torch.equal(found.plain(), linear_module.from_8_bits(numbers, scale_N))
    assert found.nbytes == 50 * 256 + 64 * 4
    odd = linear(numbers[:, :6].bfloat16(), None, torch.ones(50))
    assert isinstance(odd, PackedLinear)
    assert odd.scale is None  # in 8 bits inputs go in fours
    assert not PackedLinear.pack(torch.zeros(2, 4).bfloat16(), None, torch.zeros(2)).packed.any()


@pytest.mark.usefixtures("unpacked")
def test_weights_in_8_bits_are_what_they_were_where_nothing_is_packed() -> None:
    weight = tensor(48, 40, dtype=torch.bfloat16)
    assert in_8_bits(48, 40).plain() is not weight
    assert torch.equal(in_8_bits(48, 40).plain(), weight)


def test_rows_in_float32_have_weights_in_float32() -> None:
    weight = tensor(48, 40)
    found = linear(weight, None, row_scales(weight))
    assert isinstance(found, PackedLinear)
    assert torch.equal(found.plain(), weight)


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


@pytest.mark.parametrize("weights", [*DTYPES, torch.int8])
@pytest.mark.parametrize("shape", [(576, 1536), (960, 576), (33, 2052)])
def test_a_row_gets_the_same_bits_alone_and_in_company(weights: torch.dtype, shape: tuple[int, int]) -> None:
    dtype = torch.bfloat16 if weights == torch.int8 else weights
    rows, other = tensor(20, shape[1], dtype=dtype), tensor(20, shape[0], dtype=dtype)
    multiply = in_8_bits(*shape) if weights == torch.int8 else linear(tensor(*shape, dtype=dtype))
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


@pytest.mark.parametrize("shape", [(48, 64), (83, 576), (576, 1536)])
@pytest.mark.parametrize("rows", ROWS)
def test_amx_multiplies_as_other_instructions_do(
    shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_use_amx():
        pytest.skip("needs a processor with AMX")
    weight, bias = tensor(*shape, dtype=torch.bfloat16), tensor(shape[0], dtype=torch.bfloat16, seed=2)
    x, other = (tensor(rows, size, dtype=torch.bfloat16, seed=size) for size in (shape[1], shape[0]))
    multiply = linear(weight, bias)
    monkeypatch.setattr(linear_module, "may_use_amx", lambda: False)
    without = linear(weight, bias)
    assert isinstance(multiply, PackedLinear)
    assert isinstance(without, PackedLinear)
    assert (multiply.uses_amx, without.uses_amx) == (True, False)
    sums = functional.linear(x.float(), weight.float(), bias.float())
    for found in (multiply, without):
        torch.testing.assert_close(found(x).float(), sums, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(found.plus(x, other).float(), other.float() + sums, rtol=2**-8, atol=1e-3)


def test_weights_that_do_not_fill_tiles_do_without_amx() -> None:
    for shape, dtype in (((48, 40), torch.bfloat16), ((48, 64), torch.float32)):
        found = linear(tensor(*shape, dtype=dtype))
        assert isinstance(found, PackedLinear)
        assert not found.uses_amx
    found = in_8_bits(48, 64)
    assert isinstance(found, PackedLinear)
    assert not found.uses_amx


def test_numbers_of_8_bits_stay_in_wide_registers(tmp_path: Path) -> None:
    """On processors with 16-bit floats they went through general registers one by one, which took ten times as long."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86 processor")
    code = (
        "import numpy as np\n"
        "from numba import cfunc, types\n"
        "from spdbench.models.cpu.compile import record_at\n"
        "from spdbench.models.cpu.packed_gemm import multiply_blocks\n"
        "from spdbench.models.cpu.parallel_for import GEMM\n"
        "@cfunc(types.void(types.int64))\n"
        "def multiply(task):\n"
        "    multiply_blocks(record_at(task, GEMM), 0, 1, np.uint16(0), 0, 0)\n"
        "print(multiply._library.get_asm_str())"
    )
    wide = "avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vbmi,+avx512bf16,+avx512fp16"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": f"+sse2,+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+64bit,+cx8,+{wide}",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    instructions = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("\t")]
    assert instructions.count("vdpbf16ps") > 10
    assert instructions.count("vpextrw") < 10


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
