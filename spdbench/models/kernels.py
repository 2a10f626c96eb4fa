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
    """The weight in oneDNN's own layout; opaque, of the same size.

    oneDNN gives a row the same bits in any company, but for a row alone where it splits long sums among threads.
    `pairs`: a row alone is then computed twice, side by side, which costs no more: the weight is read once.
    """

    packed: Tensor
    bias: Tensor | None
    nbytes: int
    pairs: bool

    def __call__(self, rows_SK: Tensor) -> Tensor:
        if self.pairs and rows_SK.shape[0] == 1:
            return _pointwise()(rows_SK.repeat(2, 1), self.packed, self.bias, "none", [], "")[:1]
        return _pointwise()(rows_SK, self.packed, self.bias, "none", [], "")

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        if self.pairs and rows_SK.shape[0] == 1:
            twice = _binary()(rows_SK.repeat(2, 1), other_SN.repeat(2, 1), self.packed, self.bias, "add")
            return twice[:1]
        return _binary()(rows_SK, other_SN, self.packed, self.bias, "add")

    def plain(self) -> Tensor:
        return self.packed.to_dense()


def linear(weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear:
    """The weight in the best layout that this machine has for it."""
    return _pack(weight_NK, bias_N) if can_pack(weight_NK) else PlainLinear(weight_NK, bias_N)


def can_pack(weight: Tensor) -> bool:
    """True if oneDNN takes this weight here, which one small product has shown."""
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and _packing_works(weight.dtype)


def _pack(weight_NK: Tensor, bias_N: Tensor | None) -> PackedLinear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), ROWS_HINT)
    nbytes = weight_NK.nbytes + (0 if bias_N is None else bias_N.nbytes)
    alone = PackedLinear(packed, bias_N, nbytes, pairs=False)
    pairs = _differs_alone(alone, tuple(weight_NK.shape), weight_NK.dtype, bias_N is None, torch.get_num_threads())
    return PackedLinear(packed, bias_N, nbytes, pairs)


@dataclass(frozen=True)
class _Shape:
    """What oneDNN's choice for a product hangs on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    plain: bool
    threads: int


_DIFFERS: dict[_Shape, bool] = {}
TRIALS = 16
"""Rows tried: sums that differ in their last bits mostly round to the same bfloat16."""


def _differs_alone(
    product: PackedLinear, shape: tuple[int, ...], dtype: torch.dtype, plain: bool, threads: int
) -> bool:
    """True if a row alone gets other bits than beside another one, tried once for each shape."""
    key = _Shape(shape, dtype, plain, threads)
    if key not in _DIFFERS:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(TRIALS, shape[1], generator=generator).to(dtype)
        other = torch.randn(TRIALS, shape[0], generator=generator).to(dtype)
        together, added = product(rows), product.plus(rows, other)
        _DIFFERS[key] = not all(
            torch.equal(product(rows[i : i + 1])[0], together[i])
            and torch.equal(product.plus(rows[i : i + 1], other[i : i + 1])[0], added[i])
            for i in range(TRIALS)
        )
    return _DIFFERS[key]


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
