"""A layer's operations between its matrix multiplications: norms, rotary positions, the cache, attention, the gate.

`LayerOps` is the reference, for every device and any number of rows. `cpu.cpu_ops.CpuOps` computes the same with
compiled kernels for a few rows on a CPU; tests hold it to the reference within rounding.

Shapes: S rows, M width, F feed-forward width, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from spdbench.models.attention_context import AttentionContext
from spdbench.models.cpu.native import native_functions
from spdbench.models.delta_net import DeltaNet, delta_net
from spdbench.models.kv_cache import HybridCache, KVCache
from spdbench.models.rotary import apply_rotary
from spdbench.models.torch_utils import array, one_thread

COMPILED_DTYPES = torch.bfloat16, torch.float32
COMPILED_ROWS = 64
"""Up to so many rows one thread does norms, rotation and gate; more are worth torch's threads."""
NOT_NUMBERS = -1
"""In place of the token id that follows logits of which one is NaN."""


@dataclass(frozen=True)
class Geometry:
    """How a layer's tensors are cut into heads, and the epsilon of its norms."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float


class NormWeight:
    """The weight `[M]` of an RMS norm, in the model's dtype, or in float32 where that would round it."""

    def __init__(self, weight_M: Tensor) -> None:
        self.weight_M = weight_M

    @property
    def nbytes(self) -> int:
        return self.weight_M.nbytes

    @cached_property
    def array(self) -> Any:
        return array(self.weight_M)

    @cached_property
    def widened(self) -> Tensor:
        """The weight in float32, as kernels read it."""
        return self.weight_M.float().contiguous()


@dataclass(frozen=True)
class HeadNorms:
    """Norms of every query head and of every key head, `[D]` each."""

    query: NormWeight
    key: NormWeight

    @property
    def nbytes(self) -> int:
        return self.query.nbytes + self.key.nbytes


class LayerOps:
    """The operations as torch operators, over rows in one attention context."""

    records_tasks: ClassVar[bool] = False
    """True if all operations are tasks of the worker pool."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def norm(self, rows_SM: Tensor, weight: NormWeight) -> Tensor:
        """Rows over their root mean square, times the weight: `[S, M]`."""
        return rms_norm(rows_SM, weight.weight_M, self.geometry.norm_eps)

    def norm_pair(self, left_SM: Tensor, left_weight: NormWeight, right_SM: Tensor, right_weight: NormWeight) -> Tensor:
        """Two tensors' rows, each normalised by its weight, next to each other: `[S, 2M]`."""
        return torch.cat((self.norm(left_SM, left_weight), self.norm(right_SM, right_weight)), dim=-1)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        window: int | None,
        context: AttentionContext,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        """From queries, keys, values `[S, (H + 2K) D]` to attention's output `[S, H D]`; keys and values are written to
        `cache`, which the caller advances after the last layer."""
        heads = self.geometry.num_heads
        rotated, values_SKD = self.rotate_heads(qkv, norms, *context.angles)
        keys_KTD, values_KTD = cache.write(layer, rotated[:, heads:], values_SKD)
        mask_ST = context.mask(keys_KTD.shape[1], window, qkv.device)
        return attend(rotated[:, :heads], keys_KTD, values_KTD, mask_ST, window)

    def rotate_heads(
        self, qkv: Tensor, norms: HeadNorms | None, cos_S1D: Tensor, sin_S1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, normalised and rotated by their rows' angles, `[S, H + K, D]`; and values `[S, K, D]`."""
        heads, kv, eps = self.geometry.num_heads, self.geometry.num_kv_heads, self.geometry.norm_eps
        split = qkv.view(qkv.shape[0], heads + 2 * kv, self.geometry.head_dim)
        unrotated = split[:, : heads + kv]
        if norms is not None:
            queries = rms_norm(unrotated[:, :heads], norms.query.weight_M, eps)
            unrotated = torch.cat((queries, rms_norm(unrotated[:, heads:], norms.key.weight_M, eps)), dim=1)
        return apply_rotary(unrotated, cos_S1D, sin_S1D), split[:, heads + kv :]

    def delta_net(self, net: DeltaNet, projected: Tensor, cache: HybridCache, layer: int) -> Tensor:
        """See `delta_net.delta_net`."""
        return delta_net(net, projected, cache, layer)

    def gate(self, both_S2F: Tensor) -> Tensor:
        """silu(gate) * up of rows in which the gate comes before up: `[S, F]`."""
        gate, up = both_S2F.chunk(2, dim=-1)
        return functional.silu(gate) * up


def ops_by_rows(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Callable[[int], LayerOps]:
    """Returns a function from a number of rows to the operations that are fastest for them."""
    torch_ops = LayerOps(geometry)
    if not has_cpu_kernels(dtype, device):
        return lambda _: torch_ops
    from spdbench.models.cpu.cpu_ops import CpuOps

    cpu_ops = CpuOps(geometry, dtype)
    return lambda num_rows: cpu_ops if num_rows <= COMPILED_ROWS else torch_ops


def has_cpu_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """True if `CpuOps` works: on a CPU, in a dtype that it supports, where numba is installed."""
    return device.type == "cpu" and dtype in COMPILED_DTYPES and native_functions() is not None


def rms_norm(rows_SM: Tensor, weight_M: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square, times the weight (Zhang and Sennrich, arXiv 1910.07467): `[S, M]`."""
    if weight_M.dtype != rows_SM.dtype:
        return functional.rms_norm(rows_SM.float(), weight_M.shape, weight_M, eps).to(rows_SM.dtype)
    return functional.rms_norm(rows_SM, weight_M.shape, weight_M, eps)


def attend(
    queries_SHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, mask_ST: Tensor | None, window: int | None = None
) -> Tensor:
    """Attention of the newest S rows over T slots, of which the last S are their own: `[S, H * D]`.

    `mask_ST` is true where a row may look; None for a single row, or where all slots are the rows' own in a chain. With
    `window` w a row sees itself and the w - 1 slots before it.

    Query heads that share a kv head are folded into rows of it, so that one small multiplication serves them: one row's
    attention over 1,024 slots takes a sixth of the time that it takes with `enable_gqa` on a CPU.
    """
    num_rows, num_heads, _ = queries_SHD.shape
    num_kv, num_slots, _ = keys_KTD.shape
    if num_rows == 1 and window is not None and num_slots > window:
        keys_KTD, values_KTD = keys_KTD[:, -window:], values_KTD[:, -window:]
    if num_rows > 1 and mask_ST is None:
        out = scaled_dot_product_attention(
            queries_SHD.transpose(0, 1)[None],
            keys_KTD[None],
            values_KTD[None],
            is_causal=True,
            enable_gqa=num_heads != num_kv,
        )
        return out[0].transpose(0, 1).flatten(1)
    mask = None if num_rows == 1 or mask_ST is None else mask_ST.repeat(num_heads // num_kv, 1)
    folded = fold_heads(queries_SHD, num_kv)[None]
    out = scaled_dot_product_attention(folded, keys_KTD[None], values_KTD[None], attn_mask=mask)
    return unfold_heads(out[0], num_rows)


def fold_heads(queries_SHD: Tensor, num_kv: int) -> Tensor:
    """The G = H / K query heads that share a kv head as G S rows of it: `[K, G S, D]`."""
    num_rows, _, head_dim = queries_SHD.shape
    return queries_SHD.reshape(num_rows, num_kv, -1, head_dim).permute(1, 2, 0, 3).reshape(num_kv, -1, head_dim)


def unfold_heads(folded_KRD: Tensor, num_rows: int) -> Tensor:
    """What `fold_heads` gave, as rows of all heads: `[S, H D]`."""
    num_kv, _, head_dim = folded_KRD.shape
    return folded_KRD.view(num_kv, -1, num_rows, head_dim).permute(2, 0, 1, 3).reshape(num_rows, -1)


def argmax(logits: Tensor) -> Tensor:
    """The argmax over the last dimension of `[V]` or `[S, V]`; on a CPU the first of several equal ones. NaN counts as
    the greatest number, as in torch.

    By a kernel of one thread where there is one: torch's threads, once they are woken for a few rows of a large
    vocabulary, keep their processors busy for some milliseconds more, and delay the next token's kernels.
    """
    if logits.dim() == 0 or logits.dim() > 2 or not has_cpu_kernels(logits.dtype, logits.device):
        return logits.argmax(dim=-1)
    functions = native_functions()
    assert functions is not None
    rows_SV = (logits if logits.dim() == 2 else logits[None]).contiguous()
    ids_S = torch.empty(len(rows_SV), dtype=torch.long)
    num_rows, size = rows_SV.shape
    functions.argmax(rows_SV.data_ptr(), num_rows, size, ids_S.data_ptr(), logits.dtype == torch.float32)
    return ids_S if logits.dim() == 2 else ids_S[0]


def top_k(logits_SV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities `[S, count]` of the likeliest tokens, in float32, and their ids, the likeliest first; by a
    kernel of one thread where there is one, for the reason that `argmax` gives, and then of equal ones the first.

    Raises:
        RuntimeError: there are fewer tokens than `count`.
    """
    if count > logits_SV.shape[-1] or not has_cpu_kernels(logits_SV.dtype, logits_SV.device):
        with one_thread():
            best = logits_SV.topk(count, dim=-1)
            return best.values.float() - logits_SV.float().logsumexp(dim=-1, keepdim=True), best.indices
    functions = native_functions()
    assert functions is not None
    rows_SV = logits_SV.contiguous()
    num_rows, size = rows_SV.shape
    values_SK, ids_SK = torch.empty(num_rows, count), torch.empty(num_rows, count, dtype=torch.long)
    totals_S = torch.empty(num_rows)
    out = values_SK.data_ptr(), ids_SK.data_ptr(), totals_S.data_ptr()
    functions.top_k(rows_SV.data_ptr(), num_rows, size, count, *out, logits_SV.dtype == torch.float32)
    return values_SK - (values_SK[:, :1] + totals_S[:, None].log()), ids_SK


def next_tokens(logits: Tensor) -> Tensor:
    """`argmax`, but `NOT_NUMBERS` for a row that holds NaN, after which nothing that follows would mean anything."""
    best = argmax(logits)
    return best.masked_fill(logits.gather(-1, best[..., None])[..., 0].isnan(), NOT_NUMBERS)
