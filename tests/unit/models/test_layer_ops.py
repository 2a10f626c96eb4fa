"""The ops between matrix multiplications: the compiled ones against torch's, and torch's against what is written
down."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from spdbench.models import layer_ops
from spdbench.models.attention_context import AttentionContext, TreeRows
from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import (
    Geometry,
    HeadNorms,
    LayerOps,
    NormWeight,
    has_cpu_kernels,
    rms_norm,
)
from spdbench.models.rotary import Rotary
from spdbench.models.torch_utils import array
from tests import tiny
from tests.tiny import tensor

compiled = pytest.importorskip("spdbench.models.cpu.compile", reason="numba is not installed")
CpuOps = pytest.importorskip("spdbench.models.cpu.cpu_ops").CpuOps

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
TREE = TreeRows(  # 0 -> 1, 2; 1 -> 3; 2 -> 4
    torch.tensor([0, 1, 1, 2, 2]),
    torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]).bool(),
)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    loose = found.dtype == torch.bfloat16
    bound = 2e-2 if loose else 1e-5
    torch.testing.assert_close(found.float(), expected.float(), rtol=bound, atol=bound)


def geometry(heads: int = 6, kv: int = 2, size: int = 8) -> Geometry:
    return Geometry(heads, kv, size, 1e-5)


def rotary(size: int, dtype: torch.dtype) -> Rotary:
    return Rotary(10_000.0 ** -(torch.arange(0, size, 2) / size), 1.0, dtype, CPU)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (2, 5, 40)])
def test_norms_equal_what_is_written_down(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = (tensor(*shape) * 3).to(dtype), tensor(40, dtype=dtype, seed=1)
    wide = x.float()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.float()
    near(rms_norm(x, weight, 1e-5).to(torch.float32 if dtype == torch.float32 else torch.bfloat16), expected)
    if len(shape) == 2 and dtype in DTYPES:
        near(CpuOps(geometry(), dtype).norm(x, NormWeight(weight)), expected)


def test_a_row_of_zeros_stays_finite() -> None:
    zeros, ones = torch.zeros(1, 8), NormWeight(torch.ones(8))
    for ops in (LayerOps(geometry()), CpuOps(geometry(), torch.float32)):
        assert ops.norm(zeros, ones).tolist() == [[0.0] * 8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_gates_equal_what_is_written_down(dtype: torch.dtype, rows: int) -> None:
    both = (tensor(rows, 50) * 8).to(dtype)
    expected = functional.silu(both[:, :25].float()) * both[:, 25:].float()
    near(LayerOps(geometry()).gate(both), expected)
    near(CpuOps(geometry(), dtype).gate(both), expected)


def run(
    ops: LayerOps, dtype: torch.dtype, rows: list[int], window: int | None, norms: bool, tree: TreeRows | None
) -> list[torch.Tensor]:
    """Attention's outputs, and at last the cache, for chunks of so many rows, the last one a tree if given."""
    sizes = geometry()
    cache = KVCache(range(3, 5), 2, 8, 64, dtype, CPU)
    angles, outputs = rotary(8, dtype), []
    weights = HeadNorms(NormWeight(tensor(8, dtype=dtype, seed=8)), NormWeight(tensor(8, dtype=dtype, seed=9)))
    for chunk, count in enumerate(rows):
        is_tree = tree is not None and chunk == len(rows) - 1
        context = AttentionContext(angles, cache.length, count, tree if is_tree else None)
        qkv = tensor(count, (sizes.num_heads + 2 * sizes.num_kv_heads) * 8, dtype=dtype, seed=chunk)
        outputs.append(ops.attention(qkv, weights if norms else None, window, context, cache, 4).clone())
        cache.advance(count)
    return [*outputs, *tiny.rows(cache, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_compiled_attention_equals_torchs(
    dtype: torch.dtype,
    norms: bool,
    window: int | None,
    tree: TreeRows | None,
) -> None:
    chunks = [7, 1, 4, 1, 5]
    found = run(CpuOps(geometry(), dtype), dtype, chunks, window, norms, tree)
    for mine, theirs in zip(found, run(LayerOps(geometry()), dtype, chunks, window, norms, tree), strict=True):
        near(mine, theirs)


@pytest.mark.parametrize("make", [LayerOps, lambda sizes: CpuOps(sizes, torch.float32)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_trees_branch_equals_the_same_tokens_in_a_row(make: type[LayerOps], window: int | None) -> None:
    """Row 4 of the tree (path 0, 2, 4) against a chain of those three rows."""
    sizes = geometry()
    qkv = tensor(5, 80, seed=1)
    prompt = tensor(6, 80, seed=2)

    def after_prompt(rows: torch.Tensor, tree: TreeRows | None) -> torch.Tensor:
        ops, cache, angles = make(sizes), KVCache(range(1), 2, 8, 32, torch.float32, CPU), rotary(8, torch.float32)
        ops.attention(prompt, None, window, AttentionContext(angles, 0, 6), cache, 0)
        cache.advance(6)
        return ops.attention(rows, None, window, AttentionContext(angles, 6, len(rows), tree), cache, 0)

    near(after_prompt(qkv, TREE)[[0, 2, 4]], after_prompt(qkv[[0, 2, 4]].clone(), None))


@pytest.mark.parametrize("make", [LayerOps, lambda sizes: CpuOps(sizes, torch.float32)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_tree_that_grows_level_by_level_equals_one_that_comes_at_once(
    make: type[LayerOps], window: int | None
) -> None:
    sizes, angles = geometry(), rotary(8, torch.float32)
    qkv, prompt = tensor(5, 80, seed=1), tensor(6, 80, seed=2)

    def outputs(levels: list[int]) -> torch.Tensor:
        ops, cache, found = make(sizes), KVCache(range(1), 2, 8, 32, torch.float32, CPU), []
        ops.attention(prompt, None, window, AttentionContext(angles, 0, 6), cache, 0)
        cache.advance(6)
        begin = 0
        for end in levels:
            rows = TreeRows(TREE.depths_S[begin:end], TREE.visible_SW[begin:end, :end])
            context = AttentionContext(angles, 6, end - begin, rows)
            found.append(ops.attention(qkv[begin:end].clone(), None, window, context, cache, 0).clone())
            cache.advance(end - begin)
            begin = end
        return torch.cat(found)

    near(outputs([1, 3, 5]), outputs([5]))


def test_every_bfloat16_survives_and_float32s_round_as_in_torch() -> None:
    @compiled.compiled  # type: ignore[untyped-decorator]
    def through(numbers: object, out: object) -> None:
        for i in range(len(numbers)):  # type: ignore[arg-type]
            out[i] = compiled.narrow(compiled.widen(numbers[i]), out[i])  # type: ignore[index]

    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    everything = everything[~everything.isnan()]
    out = torch.empty_like(everything)
    through(array(everything), array(out))
    assert torch.equal(out, everything)
    wide = torch.cat((tensor(10_000), tensor(10_000, seed=1) * 1e30, torch.tensor([1.00390625, 1.01171875])))
    rounded = torch.empty(len(wide), dtype=torch.bfloat16)
    through(wide.numpy(), array(rounded))
    assert torch.equal(rounded, wide.to(torch.bfloat16))


@given(st.floats(-86.0, 88.0, width=32))
def test_the_exponential_is_right_to_a_few_units_in_the_last_place(x: float) -> None:
    assert compiled.exponential(np.float32(x)) == pytest.approx(math.exp(np.float32(x)), rel=5e-7)


def test_gates_far_from_zero_let_all_or_nothing_through() -> None:
    gates = torch.tensor([[-1e30, -120.0, -89.0, 89.0, 120.0, 1e30, *[2.0] * 6]])
    geometry = layer_ops.Geometry(1, 1, 2, 1e-6)
    found, expected = CpuOps(geometry, torch.float32).gate(gates), LayerOps(geometry).gate(gates)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_exponential_ends_at_minus_87_and_88() -> None:
    for x in (89.0, 1e30):
        assert compiled.exponential(np.float32(x)) == pytest.approx(math.exp(88.0), rel=1e-5)
    assert compiled.exponential(np.float32(-np.inf)) == pytest.approx(math.exp(-87.0), rel=1e-5)
    assert compiled.exponential(np.float32(-1e30)) < 1e-37


def test_without_numba_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_cpu_kernels(torch.bfloat16, CPU)
    assert not has_cpu_kernels(torch.float16, CPU)
    assert not has_cpu_kernels(torch.float32, torch.device("cuda"))
    monkeypatch.setattr(layer_ops, "native_functions", lambda: None)
    assert not has_cpu_kernels(torch.float32, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_pair_of_norms_is_both_next_to_each_other(dtype: torch.dtype, num_rows: int) -> None:
    left, right = tensor(num_rows, 24, dtype=dtype), tensor(num_rows, 16, dtype=dtype, seed=1) * 3
    weights = NormWeight(tensor(24, dtype=dtype, seed=2)), NormWeight(tensor(16, dtype=dtype, seed=3))
    ops, torchs = CpuOps(geometry(), dtype), LayerOps(geometry())
    found = ops.norm_pair(left, weights[0], right, weights[1])
    assert torch.equal(found, torch.cat((ops.norm(left, weights[0]), ops.norm(right, weights[1])), dim=-1))
    near(found, torchs.norm_pair(left, weights[0], right, weights[1]))
