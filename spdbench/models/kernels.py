"""Matrix products as decoding needs them: a few rows against weights that are read once a token.

On a CPU such a product is bound by reading the weights, and how they lie in memory decides how fast that goes. Weights
are therefore packed once, when they are loaded, into the layout that oneDNN picks for few rows, and what follows a
product (a residual, a gate) is done while its result is still in registers. Where packing is missing, the plain
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
ROWS_HINT = 1
"""For how many rows the layout is chosen: decoding feeds one, verification a few."""


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


class Gated(Protocol):
    """Two weights `[N, K]`, gate and up, that give silu(gate x) * (up x)."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, rows_SK: Tensor) -> Tensor:
        """`[S, N]`."""


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
class PlainGated:
    """Gate above up in one matrix `[2N, K]`."""

    both: PlainLinear

    @property
    def nbytes(self) -> int:
        return self.both.nbytes

    def __call__(self, rows_SK: Tensor) -> Tensor:
        gate, up = self.both(rows_SK).chunk(2, dim=-1)
        return functional.silu(gate) * up


@dataclass(frozen=True)
class PackedLinear:
    """The weight in oneDNN's own layout; opaque, of the same size."""

    packed: Tensor
    bias: Tensor | None
    nbytes: int

    def __call__(self, rows_SK: Tensor) -> Tensor:
        return _pointwise()(rows_SK, self.packed, self.bias, "none", [], "")

    def silu(self, rows_SK: Tensor) -> Tensor:
        return _pointwise()(rows_SK, self.packed, self.bias, "swish", [], "")

    def plus(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        return _binary()(rows_SK, other_SN, self.packed, self.bias, "add")

    def times(self, rows_SK: Tensor, other_SN: Tensor) -> Tensor:
        return _binary()(rows_SK, other_SN, self.packed, self.bias, "mul")

    def plain(self) -> Tensor:
        return self.packed.to_dense()


@dataclass(frozen=True)
class PackedGated:
    """Gate and up packed one by one, so that each product ends in its half of the gating."""

    gate: PackedLinear
    up: PackedLinear

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes

    def __call__(self, rows_SK: Tensor) -> Tensor:
        return self.up.times(rows_SK, self.gate.silu(rows_SK))


def linear(weight_NK: Tensor, bias_N: Tensor | None = None) -> Linear:
    """The weight in the best layout that this machine has for it."""
    return _pack(weight_NK, bias_N) if can_pack(weight_NK) else PlainLinear(weight_NK, bias_N)


def gated(gate_NK: Tensor, up_NK: Tensor, gate_bias_N: Tensor | None = None, up_bias_N: Tensor | None = None) -> Gated:
    """Gate and up in the best layout that this machine has for them."""
    if can_pack(gate_NK):
        return PackedGated(_pack(gate_NK, gate_bias_N), _pack(up_NK, up_bias_N))
    bias = None if gate_bias_N is None or up_bias_N is None else torch.cat((gate_bias_N, up_bias_N))
    return PlainGated(PlainLinear(torch.cat((gate_NK, up_NK)), bias))


def rms_norm(rows_SK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square, times the weight (Zhang and Sennrich, arXiv 1910.07467): `[S, K]`.

    torch composes this of seven operators on a CPU. For one row the scale is a number, so two are enough.
    """
    if rows_SK.numel() != rows_SK.shape[-1] or rows_SK.device.type != "cpu":
        return functional.rms_norm(rows_SK, weight_K.shape, weight_K, eps)
    norm = torch.linalg.vector_norm(rows_SK, dtype=torch.float32).item()
    scale = (norm * norm / rows_SK.shape[-1] + eps) ** -0.5
    return torch.addcmul(_zero(rows_SK.dtype), rows_SK, weight_K, value=scale)


def can_pack(weight: Tensor) -> bool:
    """True if oneDNN takes this weight here, which one small product has shown."""
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and _packing_works(weight.dtype)


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
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)


@cache
def _pointwise() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


@cache
def _binary() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.binary)
