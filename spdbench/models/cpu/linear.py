"""Matrix multiplications as decoding needs them: a few rows with weights that are read once a token.

On a CPU such a multiplication is bound by reading the weights, and their layout in memory decides how fast that goes.
Weights are therefore packed once, when they are loaded, into the layout that `packed_gemm` reads, and what follows a
multiplication (a bias, a residual) is added while its result is still in registers. Where weights cannot be packed,
torch's serves.

Weights that are whole multiples of a scale for each output, from -127 to 127, are packed in 8 bits for rows in
bfloat16: half as much to read. Drafters may have such weights, a target never.

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

from spdbench.models.cpu.worker_pool import AMX_STEPS, GemmTask, TaskKind, kind_word, worker_pool
from spdbench.processors import may_use_amx

PACKED_DTYPES = torch.bfloat16, torch.float32
BLOCK = 16
"""Outputs of a block of a packed weight."""
PAGES_BYTES = 32 << 20
"""Packed weights share areas of at least so many bytes, which the system may map in large pages."""
LINE_BYTES = 64
MAX_INT8 = 127
ROWS_AT_ONCE = 4096
"""Of a weight whose numbers are computed in float32 while it is packed."""


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
    """The weight in blocks of 16 outputs: `[N / 16, K / 2, 16, 2]` in bfloat16, `[N / 16, K / 2, 2, 16]` in 8 bits, and
    `[N / 16, K, 16, 1]` in float32. In 8 bits `scale` is a float32 for each output, with as many zeros behind them as
    fill the last block."""

    def __init__(self, packed: Tensor, num_outputs: int, bias_N: Tensor | None, scale: Tensor | None = None) -> None:
        self.packed, self.bias, self.scale = packed, bias_N, scale
        self.dtype = packed.dtype if scale is None else torch.bfloat16
        num_inputs = packed[0].numel() // BLOCK
        self.shape = num_outputs, num_inputs
        beside = sum(each.nbytes for each in (bias_N, scale) if each is not None)
        self.nbytes = num_outputs * num_inputs * packed.itemsize + beside
        pool = worker_pool()
        assert pool is not None
        self._pool = pool
        scale_at, bias_at = (0 if each is None else each.data_ptr() for each in (scale, bias_N))
        num_steps = num_inputs * packed.itemsize * BLOCK // LINE_BYTES
        fills_tiles = packed.dtype == torch.bfloat16 and num_steps % AMX_STEPS == 0
        self.uses_amx = fills_tiles and may_use_amx()
        sizes = num_outputs, num_steps, num_inputs * self.dtype.itemsize, int(self.uses_amx)
        self._kind, self._fixed = kind_word(TaskKind.GEMM, self.dtype), (packed.data_ptr(), scale_at, bias_at, *sizes)

    @classmethod
    def pack(cls, weight_NK: Tensor, bias_N: Tensor | None, scale_N: Tensor | None = None) -> PackedLinear:
        """The weight `[N, K]` and its bias, in memory of their own; in 8 bits if there is a scale."""
        num_outputs, num_inputs = weight_NK.shape
        together = 2 if weight_NK.dtype == torch.bfloat16 else 1
        numbers_NK = weight_NK if scale_N is None else in_8_bits(weight_NK, scale_N)
        missing = -num_outputs % BLOCK
        padded_NK = functional.pad(numbers_NK, (0, 0, 0, missing)) if missing else numbers_NK.contiguous()
        in_steps = _in_steps(padded_NK.view(-1, BLOCK, num_inputs // together, together))
        packed = new_pages(tuple(in_steps.shape), numbers_NK.dtype)
        packed.copy_(in_steps)
        scale = None if scale_N is None else functional.pad(scale_N, (0, missing))
        return cls(packed, num_outputs, None if bias_N is None else bias_N.contiguous(), scale)

    def __call__(self, rows_SK: Tensor) -> Tensor:
        return self._multiply(rows_SK)

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        return self._multiply(rows_SK, other_SN.contiguous())

    def plain(self) -> Tensor:
        numbers = self.numbers()
        return (numbers if self.scale is None else from_8_bits(numbers, self.scale))[: self.shape[0]]

    def numbers(self) -> Tensor:
        """What is packed, in the weight's order: `[N, K]` with the rows that fill the last block."""
        packed = self.packed if self.scale is None else self.packed.transpose(2, 3)
        return packed.transpose(1, 2).reshape(-1, self.shape[1])

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


def _in_steps(blocks: Tensor) -> Tensor:
    """`[blocks, outputs, steps, together]` in the order of `PackedLinear`."""
    stepwise = blocks.transpose(1, 2)
    return stepwise.transpose(2, 3) if blocks.dtype == torch.int8 else stepwise


def linear(weight_NK: Tensor, bias_N: Tensor | None = None, scale_N: Tensor | None = None) -> Linear:
    """The weight in the best layout that this machine has for it.

    `scale_N` is in float32: the weight's rows are whole multiples of it. Where nothing multiplies in 8 bits, they stay
    as they are.
    """
    num_inputs, in_pairs = weight_NK.shape[1], weight_NK.dtype == torch.bfloat16
    if not can_pack(weight_NK.dtype, weight_NK.device) or (in_pairs and num_inputs % 2):
        return PlainLinear(weight_NK, bias_N)
    return PackedLinear.pack(weight_NK, bias_N, scale_N if in_pairs and num_inputs % 4 == 0 else None)


def row_scales(weight_NK: Tensor) -> Tensor:
    """For each row the scale `[N]`, in float32, of which its largest number is 127 times as much."""
    return weight_NK.abs().amax(dim=1).float().clamp_min(torch.finfo(torch.float32).tiny) / MAX_INT8


def in_8_bits(weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """The nearest multiples of each row's scale, in int8; exactly those that `from_8_bits` was given."""
    rows = zip(torch.split(weight_NK, ROWS_AT_ONCE), torch.split(scale_N, ROWS_AT_ONCE), strict=True)
    parts = [(some.float() / scale[:, None]).nan_to_num_().round_().to(torch.int8) for some, scale in rows]
    return torch.cat(parts)


def from_8_bits(numbers_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Multiples of a scale in bfloat16, which errs by less than half a scale."""
    return (numbers_NK * scale_N[:, None]).to(torch.bfloat16)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True if such weights can be packed here, which one small multiplication has shown."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and _packing_works(dtype)


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    if worker_pool() is None:
        return False
    weight, rows = torch.eye(BLOCK, dtype=dtype), torch.arange(2.0 * BLOCK).view(2, BLOCK).to(dtype)
    scales = (None, torch.ones(BLOCK)) if dtype == torch.bfloat16 else (None,)
    packed = [PackedLinear.pack(weight, None, scale_N) for scale_N in scales]
    return all(bool((each(rows) == rows).all() and (each.plus(rows, rows) == 2 * rows).all()) for each in packed)


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
