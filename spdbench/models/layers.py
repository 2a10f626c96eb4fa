"""One decoder layer: its weights, and the arithmetic of the llama family over them.

Serves the target's layers and those of draft modules, which are the same kind. Must not know where weights come from,
how many layers there are, or whose they are.

Shapes: S rows, M model width, H query heads, K kv heads, D head size, F feed-forward width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from spdbench.models.attention import attend
from spdbench.models.kernels import Gated, Linear, rms_norm
from spdbench.models.kv_cache import KVCache
from spdbench.models.rotary import rotate


@dataclass(frozen=True)
class Geometry:
    """Sizes that a layer's tensors are cut by."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float


@dataclass(frozen=True)
class ExpertWeights:
    """A mixture of SwiGLU experts: router `[E, M]`, gate and up `[E, 2F, M]`, down `[E, M, F]`."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    per_token: int
    normalise: bool


@dataclass(frozen=True)
class LayerWeights:
    """Query, key and value stand in one matrix; head norms only where they exist; either a dense feed-forward or
    experts."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    post_norm: Tensor
    gate_up: Gated | None
    down: Linear | None
    experts: ExpertWeights | None
    window: int | None

    def bytes_per_token(self) -> int:
        """Bytes that one token's forward reads: everything, but of the experts only those it is routed to."""
        parts = (self.input_norm, self.qkv, self.q_norm, self.k_norm, self.out, self.post_norm, self.gate_up, self.down)
        total = sum(part.nbytes for part in parts if part is not None)
        if self.experts is not None:
            share = self.experts.per_token / self.experts.router.shape[0]
            total += self.experts.router.nbytes + round(
                (self.experts.gate_up.nbytes + self.experts.down.nbytes) * share
            )
        return total


def layer_forward(
    weights: LayerWeights,
    geometry: Geometry,
    layer: int,
    hidden_SM: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: KVCache,
) -> Tensor:
    """One layer over S new rows whose keys and values go into `cache`: `[S, M]`, before any final norm."""
    num_rows, eps = hidden_SM.shape[0], geometry.norm_eps
    heads, kv_heads, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    normed = rms_norm(hidden_SM, weights.input_norm, eps)
    qkv = weights.qkv(normed).view(num_rows, heads + 2 * kv_heads, head_dim)
    turning = qkv[:, : heads + kv_heads]
    if weights.q_norm is not None and weights.k_norm is not None:
        queries = rms_norm(turning[:, :heads], weights.q_norm, eps)
        turning = torch.cat((queries, rms_norm(turning[:, heads:], weights.k_norm, eps)), dim=1)
    turned = rotate(turning, *rotary)
    all_keys, all_values = cache.write(layer, turned[:, heads:], qkv[:, heads + kv_heads :])
    mixed = attend(turned[:, :heads], all_keys, all_values, weights.window)
    hidden_SM = weights.out.plus(mixed, hidden_SM)
    normed = rms_norm(hidden_SM, weights.post_norm, eps)
    if weights.experts is not None:
        return hidden_SM + _mixture(weights.experts, normed)
    assert weights.gate_up is not None
    assert weights.down is not None
    return weights.down.plus(weights.gate_up(normed), hidden_SM)


def _mixture(experts: ExpertWeights, normed_SM: Tensor) -> Tensor:
    """Top-k experts a row, weighted by the router's softmax. Walks the experts that were chosen, not all of them."""
    scores = linear(normed_SM, experts.router).softmax(dim=-1, dtype=torch.float32)
    weights_SN, chosen_SN = scores.topk(experts.per_token, dim=-1)
    if experts.normalise:
        weights_SN = weights_SN / weights_SN.sum(dim=-1, keepdim=True)
    weights_SN = weights_SN.to(normed_SM.dtype)
    out = torch.zeros_like(normed_SM)
    for expert in torch.unique(chosen_SN).tolist():
        rows, ranks = (chosen_SN == expert).nonzero(as_tuple=True)
        gate, up = linear(normed_SM[rows], experts.gate_up[expert]).chunk(2, dim=-1)
        out.index_add_(0, rows, linear(silu(gate) * up, experts.down[expert]) * weights_SN[rows, ranks, None])
    return out
