"""Matrix products as decoding needs them: a few rows against weights that are read once a token.

On a CPU such a product is bound by reading the weights, and how they lie in memory decides how fast that goes. Weights
are therefore packed once, when they are loaded, into the layout that oneDNN picks for few rows, and what follows a
product (a residual) is done while its result is still in registers. Where packing is missing, the plain
product serves. Must not know what a layer is.

Shapes: S rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

PACKED_DTYPES = (torch.bfloat16, torch.float32)
ROWS_HINT = 16
"""For how many rows the layout is chosen: decoding feeds one, verification a few. In float32 the layout that oneDNN
picks for one row is half as fast with eight, and no faster with one."""
FEWEST_ROWS = 4
"""Fewer rows are computed beside idle ones: oneDNN takes a sixth longer over one row than over four. It also gives a
row the same bits in any company, but for a row alone, whose long sums it splits among threads."""


class Linear(Protocol):
    """A weight `[N, K]` with an optional bias, ready to multiply."""

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""

    def __call__(self, rows_SK: Tensor) -> Tensor:
        """`[S, N]`."""

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        """The product added to `other_SN`: `[S, N]`."""

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


@dataclass(frozen=True)
class PackedLinear:
    """The weight in oneDNN's own layout; opaque, of the same size."""

    packed: Tensor
    bias: Tensor | None
    nbytes: int

    def __call__(self, rows_SK: Tensor) -> Tensor:
        if (num_rows := rows_SK.shape[0]) < FEWEST_ROWS:
            return self(beside_idle(rows_SK))[:num_rows]
        return _pointwise()(rows_SK, self.packed, self.bias, "none", [], "")

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        if (num_rows := rows_SK.shape[0]) < FEWEST_ROWS:
            return self.plus(beside_idle(rows_SK), beside_idle(other_SN))[:num_rows]
        return _binary()(rows_SK, other_SN, self.packed, self.bias, "add")

    def plain(self) -> Tensor:
        return self.packed.to_dense()


def beside_idle(rows_SK: Tensor) -> Tensor:
    """The rows and behind them as many rows of zeros as products like to have: `[max(S, FEWEST_ROWS), K]`."""
    missing = FEWEST_ROWS - rows_SK.shape[0]
    return functional.pad(rows_SK, (0, 0, 0, missing)) if missing > 0 else rows_SK


def linear(weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear:
    """The weight in the best layout that this machine has for it."""
    if can_pack(weight_NK.dtype, weight_NK.device):
        return _pack(weight_NK, bias_N)
    return PlainLinear(weight_NK, bias_N)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True if oneDNN takes such weights here, which one small product has shown."""
    return device.type == "cpu" and dtype in PACKED_DTYPES and _packing_works(dtype)


def _pack(weight_NK: Tensor, bias_N: Tensor | None) -> PackedLinear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), ROWS_HINT)
    return PackedLinear(packed, bias_N, weight_NK.nbytes + (0 if bias_N is None else bias_N.nbytes))


@cache
def _packing_works(dtype: torch.dtype) -> bool:
    weight, rows = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
    try:
        packed = _pack(weight, None)
        return bool((packed(rows) == rows).all() and (packed.plus(rows, rows) == 2 * rows).all())
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch without oneDNN, or with other operators
        return False


@cache
def _pointwise() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


@cache
def _binary() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.binary)
