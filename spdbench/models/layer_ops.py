"""What a layer does between its products: norms, rotation, the cache, attention, the gate. Two ways, one meaning.

`TorchOps` serves every device and any number of rows; `CpuOps` a few rows on a CPU, where an operator's call
costs more than its arithmetic. Must not know of products or of where weights come from.

Shapes: S rows, M width, F feed-forward width, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from spdbench.models.attention import attend
from spdbench.models.attention_context import AttentionContext
from spdbench.models.cpu.worker_pool import Attention, TaskKind, worker_pool
from spdbench.models.kv_cache import KVCache, array
from spdbench.models.rotary import apply_rotary

COMPILED_DTYPES = {torch.bfloat16: TaskKind.ATTENTION_PAIRS, torch.float32: TaskKind.ATTENTION_FLOATS}
COMPILED_ROWS = 64
"""Up to so many rows one thread does norms, rotation and gate; more are worth torch's threads."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that a layer's tensors are cut by."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float


class NormWeight:
    """The weight `[M]` of an RMS norm."""

    def __init__(self, weight_M: Tensor) -> None:
        self.weight_M = weight_M

    @property
    def nbytes(self) -> int:
        return self.weight_M.nbytes

    @cached_property
    def array(self) -> Any:
        return array(self.weight_M)


@dataclass(frozen=True)
class HeadNorms:
    """Norms of every query head and of every key head, `[D]` each."""

    query: NormWeight
    key: NormWeight

    @property
    def nbytes(self) -> int:
        return self.query.nbytes + self.key.nbytes


class LayerOps(Protocol):
    """The steps of a layer, over rows in one attention context."""

    def norm(self, rows_SM: Tensor, weight: NormWeight) -> Tensor:
        """Rows over their root mean square, times the weight: `[S, M]`."""

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        window: int | None,
        context: AttentionContext,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        """From queries, keys, values `[S, (H + 2K) D]` to attention's output `[S, H D]`; the cache takes the rows."""

    def gate(self, both_S2F: Tensor) -> Tensor:
        """silu(gate) * up, gate standing before up: `[S, F]`."""


@dataclass(frozen=True)
class TorchOps:
    """The steps as torch operators."""

    geometry: Geometry

    def norm(self, rows_SM: Tensor, weight: NormWeight) -> Tensor:
        return rms_norm(rows_SM, weight.weight_M, self.geometry.norm_eps)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        window: int | None,
        context: AttentionContext,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        heads = self.geometry.num_heads
        rotated, values_SKD = self.rotate_heads(qkv, norms, *context.angles)
        keys_KTD, values_KTD = cache.write(layer, rotated[:, heads:], values_SKD)
        mask_ST = context.mask(keys_KTD.shape[1], window, qkv.device)
        return attend(rotated[:, :heads], keys_KTD, values_KTD, mask_ST, window)

    def rotate_heads(
        self, qkv: Tensor, norms: HeadNorms | None, cos_S1D: Tensor, sin_S1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, normalised and turned by their rows' angles, `[S, H + K, D]`; and values `[S, K, D]`."""
        heads, kv, eps = self.geometry.num_heads, self.geometry.num_kv_heads, self.geometry.norm_eps
        split = qkv.view(qkv.shape[0], heads + 2 * kv, self.geometry.head_dim)
        turning = split[:, : heads + kv]
        if norms is not None:
            queries = rms_norm(turning[:, :heads], norms.query.weight_M, eps)
            turning = torch.cat((queries, rms_norm(turning[:, heads:], norms.key.weight_M, eps)), dim=1)
        return apply_rotary(turning, cos_S1D, sin_S1D), split[:, heads + kv :]

    def gate(self, both_S2F: Tensor) -> Tensor:
        gate, up = both_S2F.chunk(2, dim=-1)
        return functional.silu(gate) * up


class CpuOps:
    """The operations as compiled kernels over the tensors' memory.

    What an operation returns holds until the same operation, or a norm with the same weight, is called again with as
    many rows: a pass writes to the same buffers all the time.
    """

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        kernels, pool = cpu_kernels(), worker_pool()
        assert kernels is not None
        assert pool is not None
        self._kernels = kernels
        self._pool = pool
        self._geometry = geometry
        self._dtype = dtype
        self._no_norm = array(torch.empty(0, dtype=dtype))
        self._buffers: dict[tuple[object, tuple[int, ...]], tuple[Tensor, Any]] = {}

    def norm(self, rows_SM: Tensor, weight: NormWeight) -> Tensor:
        out, out_array = self._buffer(weight, *rows_SM.shape)
        self._kernels.rms_norm(array(rows_SM), weight.array, self._geometry.norm_eps, out_array)
        return out

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        window: int | None,
        context: AttentionContext,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        geometry, num_rows = self._geometry, context.num_rows
        width = geometry.num_heads * geometry.head_dim
        queries, queries_array = self._buffer("queries", num_rows, width)
        out, _ = self._buffer("attention", num_rows, width)
        slot, keys_KTD, values_KTD = cache.room(layer, num_rows)
        q_norm, k_norm = (self._no_norm,) * 2 if norms is None else (norms.query.array, norms.key.array)
        eps, angles = geometry.norm_eps, context.angle_arrays
        self._kernels.apply_rotary(
            array(qkv), q_norm, k_norm, eps, context.positions, *angles, keys_KTD, values_KTD, slot, queries_array
        )
        task = Attention(
            kind=COMPILED_DTYPES[self._dtype],
            queries=queries.data_ptr(),
            keys=keys_KTD.ctypes.data,
            values=values_KTD.ctypes.data,
            depths=context.depths.ctypes.data,
            visible=context.visible.ctypes.data,
            out=out.data_ptr(),
            slot=slot,
            num_rows=num_rows,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            capacity=keys_KTD.shape[1],
            tree_width=context.visible.shape[1],
            window=window or 0,
        )
        self._pool.run(task)
        return out

    def gate(self, both_S2F: Tensor) -> Tensor:
        out, out_array = self._buffer("gate", both_S2F.shape[0], both_S2F.shape[1] // 2)
        self._kernels.gate(array(both_S2F), out_array)
        return out

    def _buffer(self, operation: object, *shape: int) -> tuple[Tensor, Any]:
        """A tensor and its memory as numpy sees it."""
        key = (operation, shape)
        if key not in self._buffers:
            tensor = torch.zeros(shape, dtype=self._dtype)
            self._buffers[key] = (tensor, array(tensor))
        return self._buffers[key]


def ops_by_rows(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Callable[[int], LayerOps]:
    """From a number of rows to the steps that serve them best."""
    torch_steps = TorchOps(geometry)
    if not has_cpu_kernels(dtype, device):
        return lambda _: torch_steps
    compiled_steps = CpuOps(geometry, dtype)
    return lambda num_rows: compiled_steps if num_rows <= COMPILED_ROWS else torch_steps


def has_cpu_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """True if `CpuOps` can serve: on a CPU, in a dtype it knows, where numba is installed."""
    return device.type == "cpu" and dtype in COMPILED_DTYPES and cpu_kernels() is not None


def rms_norm(rows_SM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square, times the weight (Zhang and Sennrich, arXiv 1910.07467): `[S, M]`."""
    return functional.rms_norm(rows_SM, weight_M.shape, weight_M, eps)


@cache
def cpu_kernels() -> ModuleType | None:
    """The module of compiled functions, if this machine can have them."""
    if worker_pool() is None:
        return None
    try:
        from spdbench.models.cpu import kernels
    except ImportError:  # numba is missing, or does not fit this Python or numpy
        return None
    return kernels
