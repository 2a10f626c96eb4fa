"""Matrix multiplications as decoding needs them: a few rows with weights that are read once a token.

On a CPU such a multiplication is bound by reading the weights, and their layout in memory decides how fast that goes.
Weights are therefore packed once, when they are loaded, into the layout that `packed_gemm` reads, and what follows a
multiplication (a bias, a residual) is added while its result is still in registers. Where weights cannot be packed,
torch's serves.

Shapes: S rows, K inputs, N outputs.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from spdbench.models.cpu.worker_pool import GemmTask, TaskKind, kind_word, worker_pool

PACKED_DTYPES = torch.bfloat16, torch.float32
BLOCK = 16
"""Outputs of a block of a packed weight."""
PAGES_BYTES = 32 << 20
"""Packed weights share areas of at least so many bytes, which the system may map in large pages."""
LINE_BYTES = 64


class Linear(Protocol):
    """A weight `[N, K]` with an optional bias, ready to multiply."""

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""

    def __call__(self, rows_SK: Tensor) -> Tensor:
        """`[S, N]`."""

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        """The outputs added to `other_SN`: `[S, N]`."""

    def plain(self) -> Tensor:
        """The weight `[N, K]` as it was given."""


@dataclass(frozen=True)
class PlainLinear:
    """The weight as it was loaded."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, rows_SK: Tensor) -> Tensor:
        return functional.linear(rows_SK, self.weight, self.bias)

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        return other_SN + functional.linear(rows_SK, self.weight, self.bias)

    def plain(self) -> Tensor:
        return self.weight


class PackedLinear:
    """The weight in blocks of 16 outputs, `[N / 16, K / 2, 16, 2]` in bfloat16 and `[N / 16, K, 16]` in float32."""

    def __init__(self, packed: Tensor, num_outputs: int, bias_N: Tensor | None) -> None:
        self.packed, self.bias = packed, bias_N
        num_inputs = packed.shape[1] * packed.shape[3]
        self.shape = num_outputs, num_inputs
        self.nbytes = num_outputs * num_inputs * packed.itemsize + (0 if bias_N is None else bias_N.nbytes)
        pool = worker_pool()
        assert pool is not None
        self._pool = pool
        bias_at = 0 if bias_N is None else bias_N.data_ptr()
        sizes = num_outputs, packed.shape[1], num_inputs * packed.itemsize
        self._kind, self._fixed = kind_word(TaskKind.GEMM, packed.dtype), (packed.data_ptr(), bias_at, *sizes)

    @classmethod
    def pack(cls, weight_NK: Tensor, bias_N: Tensor | None) -> PackedLinear:
        """The weight `[N, K]` and its bias, in memory of their own."""
        num_outputs, num_inputs = weight_NK.shape
        together = 2 if weight_NK.dtype == torch.bfloat16 else 1
        packed = new_pages((-(-num_outputs // BLOCK), num_inputs // together, BLOCK, together), weight_NK.dtype)
        missing = -num_outputs % BLOCK
        padded_NK = functional.pad(weight_NK, (0, 0, 0, missing)) if missing else weight_NK.contiguous()
        packed.copy_(padded_NK.view(-1, BLOCK, packed.shape[1], together).transpose(1, 2))
        return cls(packed, num_outputs, None if bias_N is None else bias_N.contiguous())

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def __call__(self, rows_SK: Tensor) -> Tensor:
        return self._multiply(rows_SK)

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        return self._multiply(rows_SK, other_SN.contiguous())

    def plain(self) -> Tensor:
        return self.packed.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]]

    def _multiply(self, rows_SK: Tensor, *others: Tensor) -> Tensor:
        rows_SK = rows_SK.contiguous()
        num_rows, num_inputs = rows_SK.shape
        if num_inputs != self.shape[1] or rows_SK.dtype != self.dtype:
            raise ValueError(f"rows {list(rows_SK.shape)} of {rows_SK.dtype} do not fit a weight {list(self.shape)}")
        out = torch.empty((num_rows, self.shape[0]), dtype=self.dtype)
        other_at = others[0].data_ptr() if others else 0
        task = GemmTask(self._kind, num_rows, *self._fixed, rows_SK.data_ptr(), out.data_ptr(), other_at)
        self._pool.run(task, rows_SK, out, *others)
        return out


def linear(weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear:
    """The weight in the best layout that this machine has for it."""
    even = weight_NK.shape[1] % 2 == 0 or weight_NK.dtype != torch.bfloat16
    if even and can_pack(weight_NK.dtype, weight_NK.device):
        return PackedLinear.pack(weight_NK, bias_N)
    return PlainLinear(weight_NK, bias_N)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True if such weights can be packed here, which one small multiplication has shown."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and _packing_works(dtype)


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    if worker_pool() is None:
        return False
    weight, rows = torch.eye(BLOCK, dtype=dtype), torch.arange(2.0 * BLOCK).view(2, BLOCK).to(dtype)
    packed = PackedLinear.pack(weight, None)
    return bool((packed(rows) == rows).all() and (packed.plus(rows, rows) == 2 * rows).all())


@dataclass
class _Area:
    """Memory of which the first `used` bytes are taken."""

    memory: Tensor
    used: int = 0


_areas: list[_Area] = [_Area(torch.empty(0, dtype=torch.uint8))]


def new_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a packed weight that begins with a cache line, where the system may use large pages: these are a tenth
    to a third faster to read, since fewer addresses have to be translated. An area is freed with its last weight."""
    size = math.prod(shape) * dtype.itemsize
    taken = -(-size // LINE_BYTES) * LINE_BYTES
    area = _areas[-1]
    if area.used + taken > len(area.memory):
        area = _areas[-1] = _Area(_large_pages(max(taken, PAGES_BYTES)))
    begin = area.used
    area.used += taken
    return area.memory[begin : begin + size].view(dtype).view(shape)


def _large_pages(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
