"""What a kernel computes does not hang on where its memory lies: arrays right behind each other, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spdbench.models.cpu.linear import PackedLinear, row_scales
from spdbench.models.cpu.worker_pool import (
    AttentionTask,
    GateTask,
    GemmTask,
    NormTask,
    RotaryTask,
    Task,
    TaskKind,
    kind_word,
    worker_pool,
)
from tests.tiny import tensor

DTYPES = [torch.float32, torch.bfloat16]
ROWS, HEADS, KV, CAPACITY, SLOT = 3, 4, 2, 9, 5
WIDTHS = (8, 24, 32, 48, 64, 96)
"""Loops are vectorised by so many numbers at once and have other code for the rest."""
SIZES = (8, 16, 32, 64)
GAPS = (0, 64)
ARENA = torch.zeros(1 << 16, dtype=torch.uint8)

pytestmark = pytest.mark.skipif(worker_pool() is None, reason="numba is not installed")


def placed(arrays: Mapping[str, Tensor], order: tuple[str, ...], gap: int) -> dict[str, Tensor]:
    """The arrays in one piece of memory, one behind the other, with `gap` bytes between them."""
    ARENA.zero_()
    found, at = {}, -ARENA.data_ptr() % 64
    for name in order:
        size = arrays[name].nbytes
        found[name] = ARENA[at : at + size].view(arrays[name].dtype).view(arrays[name].shape)
        found[name].copy_(arrays[name])
        at += size + gap
    return found


def require_same_bits(arrays: Mapping[str, Tensor], outputs: tuple[str, ...], task_of: Any) -> None:
    """`task_of` makes the task of arrays that are somewhere; `outputs` are those that it writes."""
    pool, expected = worker_pool(), None
    assert pool is not None
    for order in permutations(arrays):
        for gap in GAPS:
            at = placed(arrays, order, gap)
            task: Task = task_of(at)
            pool.run(task, *at.values())
            found = [at[name].clone() for name in outputs]
            expected = expected or found
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other), (order, gap)


def eps_bits() -> int:
    return int(np.float32(1e-5).view(np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_norm(dtype: torch.dtype, width: int, rows: int) -> None:
    arrays = {
        "rows": tensor(rows, width, dtype=dtype),
        "weight": tensor(width, seed=1),
        "out": torch.zeros(rows, width, dtype=dtype),
    }

    def task(at: Mapping[str, Tensor]) -> NormTask:
        places = {name: at[name].data_ptr() for name in arrays}
        kind = kind_word(TaskKind.NORM, dtype)
        return NormTask(kind=kind, num_rows=rows, eps_bits=eps_bits(), width=width, out_width=width, **places)

    require_same_bits(arrays, ("out",), task)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gate(dtype: torch.dtype, width: int) -> None:
    arrays = {
        "both": tensor(ROWS, 2 * width, dtype=dtype) * 4,
        "out": torch.zeros(ROWS, width, dtype=dtype),
    }

    def task(at: Mapping[str, Tensor]) -> GateTask:
        return GateTask(kind_word(TaskKind.GATE, dtype), ROWS, at["both"].data_ptr(), at["out"].data_ptr(), width)

    require_same_bits(arrays, ("out",), task)


@pytest.mark.parametrize("weights", [*DTYPES, torch.int8])
@pytest.mark.parametrize("outputs", [16, 48, 41])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gemm(weights: torch.dtype, outputs: int, has_bias: bool) -> None:
    width, dtype = 64, torch.bfloat16 if weights == torch.int8 else weights
    plain = tensor(outputs, width, dtype=dtype, seed=3)
    weight = PackedLinear.pack(plain, None, row_scales(plain) if weights == torch.int8 else None)
    arrays = {
        "rows": tensor(ROWS, width, dtype=dtype),
        "bias": tensor(outputs, dtype=dtype, seed=1),
        "other": tensor(ROWS, outputs, dtype=dtype, seed=2),
        "out": torch.zeros(ROWS, outputs, dtype=dtype),
    }

    def task(at: Mapping[str, Tensor]) -> GemmTask:
        places = {name: at[name].data_ptr() for name in arrays}
        sizes = outputs, width * weights.itemsize // 4, width * dtype.itemsize, int(weight.uses_amx)
        given = (
            weight.packed.data_ptr(),
            0 if weight.scale is None else weight.scale.data_ptr(),
            places["bias"] * has_bias,
            *sizes,
            places["rows"],
            places["out"],
            places["other"],
        )
        return GemmTask(kind_word(TaskKind.GEMM, dtype), ROWS, *given)

    require_same_bits(arrays, ("out",), task)


def heads(dtype: torch.dtype, size: int) -> dict[str, Tensor]:
    return {
        "queries": tensor(ROWS, HEADS * size, dtype=dtype, seed=1),
        "keys": tensor(KV, CAPACITY, size, dtype=dtype, seed=2),
        "values": tensor(KV, CAPACITY, size, dtype=dtype, seed=3),
    }


SHAPE = {"num_heads": HEADS, "num_kv_heads": KV, "capacity": CAPACITY, "num_rows": ROWS}
SLOT_AT, DEPTHS = np.array([SLOT]), np.arange(ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotary(dtype: torch.dtype, size: int, normed: bool) -> None:
    arrays = {
        **heads(dtype, size),
        "qkv": tensor(ROWS, (HEADS + 2 * KV) * size, dtype=dtype, seed=4),
        "cos": tensor(CAPACITY, size, dtype=dtype, seed=5),
        "sin": tensor(CAPACITY, size, dtype=dtype, seed=6),
    }
    norm_D, positions = tensor(size, seed=7), DEPTHS + SLOT

    def task(at: Mapping[str, Tensor]) -> RotaryTask:
        norm_at = norm_D.data_ptr() if normed else 0
        return RotaryTask(
            kind=kind_word(TaskKind.ROTARY, dtype),
            q_norm=norm_at,
            k_norm=norm_at,
            eps_bits=eps_bits(),
            positions=positions.ctypes.data,
            num_positions=CAPACITY,
            head_dim=size,
            slot_at=SLOT_AT.ctypes.data,
            **{name: at[name].data_ptr() for name in arrays},
            **SHAPE,
        )

    require_same_bits(arrays, ("queries", "keys", "values"), task)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_attention(dtype: torch.dtype, size: int) -> None:
    arrays = {**heads(dtype, size), "out": torch.zeros(ROWS, HEADS * size, dtype=dtype)}

    def task(at: Mapping[str, Tensor]) -> AttentionTask:
        return AttentionTask(
            kind=kind_word(TaskKind.ATTENTION, dtype),
            depths=DEPTHS.ctypes.data,
            visible=0,
            tree_width=0,
            head_dim=size,
            window=0,
            slot_at=SLOT_AT.ctypes.data,
            **{name: at[name].data_ptr() for name in arrays},
            **SHAPE,
        )

    require_same_bits(arrays, ("out",), task)
