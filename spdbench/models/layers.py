"""One decoder layer of the llama family: its weights, and its forward pass.

Serves the target's layers and those of drafters, which are of the same kind.

Shapes: S rows, M model width, F feed-forward width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from spdbench.models.attention_context import AttentionContext
from spdbench.models.cpu.linear import Linear
from spdbench.models.delta_net import DeltaNet
from spdbench.models.kv_cache import HybridCache, KVCache
from spdbench.models.layer_ops import HeadNorms, LayerOps, NormWeight

EXPERT_ROWS = 64
"""Up to so many rows the matrix multiplications of a mixture are computed row by row: a row has the same bits whichever
rows are next to it, and each expert reads its weights once for one or two rows anyway."""


@dataclass(frozen=True)
class SharedExpert:
    """A SwiGLU expert that every token passes, and the weight `[M]` of the gate on its output."""

    gate_up: Linear
    down: Linear
    gate_M: Tensor

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes + self.gate_M.nbytes


@dataclass(frozen=True)
class ExpertWeights:
    """A mixture of SwiGLU experts: router `[E, M]`, gate and up `[E, 2F, M]`, down `[E, M, F]`."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    per_token: int
    normalise: bool
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class LayerWeights:
    """Query, key and value are one matrix, gate and up another. Norms are None where the model has none; the
    feed-forward is either dense or experts. `output_gate` gives the gates on attention's output. In a recurrent layer
    `delta_net` takes the place of attention, and `qkv` is all of its input projections."""

    input_norm: NormWeight | None
    qkv: Linear
    head_norms: HeadNorms | None
    out: Linear
    post_norm: NormWeight
    gate_up: Linear | None
    down: Linear | None
    experts: ExpertWeights | None
    window: int | None
    output_gate: Linear | None = None
    delta_net: DeltaNet | None = None

    def bytes_per_token(self) -> int:
        """Bytes that one token's forward pass reads: all weights, but of the experts only those it is routed to."""
        attention = (self.qkv, self.head_norms, self.output_gate, self.delta_net, self.out)
        parts = (self.input_norm, *attention, self.post_norm, self.gate_up, self.down)
        total = sum(part.nbytes for part in parts if part is not None)
        if self.experts is not None:
            share = self.experts.per_token / self.experts.router.shape[0]
            total += self.experts.router.nbytes + round(
                (self.experts.gate_up.nbytes + self.experts.down.nbytes) * share
            )
            total += self.experts.shared.nbytes if self.experts.shared is not None else 0
        return total


def layer_forward(
    weights: LayerWeights, ops: LayerOps, context: AttentionContext, layer: int, hidden_SM: Tensor, cache: KVCache
) -> Tensor:
    """One layer over S new rows whose keys and values go into `cache`: `[S, M]`, before any final norm."""
    normed_SM = hidden_SM if weights.input_norm is None else ops.norm(hidden_SM, weights.input_norm)
    return layer_body(weights, ops, context, layer, normed_SM, hidden_SM, cache)


def layer_body(
    weights: LayerWeights,
    ops: LayerOps,
    context: AttentionContext,
    layer: int,
    inputs_SI: Tensor,
    hidden_SM: Tensor,
    cache: KVCache,
) -> Tensor:
    """What follows a layer's input norm: attention over `inputs_SI` and the feed-forward, added to `hidden_SM`.

    The inputs' width I is what the query weights read: M in a decoder, 2M in EAGLE-3's first layer.
    """
    if weights.delta_net is not None:
        assert isinstance(cache, HybridCache)
        attended = ops.delta_net(weights.delta_net, weights.qkv(inputs_SI), cache, layer)
    else:
        attended = ops.attention(weights.qkv(inputs_SI), weights.head_norms, weights.window, context, cache, layer)
    if weights.output_gate is not None:
        attended = attended * weights.output_gate(inputs_SI).sigmoid()
    return after_attention(weights, ops, attended, hidden_SM)


def after_attention(weights: LayerWeights, ops: LayerOps, attended: Tensor, hidden_SM: Tensor) -> Tensor:
    """The output projection of `attended` `[S, H D]`, and the feed-forward, added to `hidden_SM`: `[S, M]`."""
    hidden_SM = weights.out.plus(attended, hidden_SM)
    normed_SM = ops.norm(hidden_SM, weights.post_norm)
    if weights.experts is not None:
        mixed_SM = _mixture(weights.experts, normed_SM)
        if weights.experts.shared is not None:
            mixed_SM = mixed_SM + _shared(weights.experts.shared, ops, normed_SM)
        return hidden_SM + mixed_SM
    assert weights.gate_up is not None
    assert weights.down is not None
    return weights.down.plus(ops.gate(weights.gate_up(normed_SM)), hidden_SM)


def _mixture(experts: ExpertWeights, normed_SM: Tensor) -> Tensor:
    """Top-k experts for each row, weighted by the router's softmax. Loops over the chosen experts only."""
    multiply = linear if len(normed_SM) > EXPERT_ROWS else _row_by_row
    scores = multiply(normed_SM, experts.router).softmax(dim=-1, dtype=torch.float32)
    weights_SN, chosen_SN = scores.topk(experts.per_token, dim=-1)
    if experts.normalise:
        weights_SN = weights_SN / weights_SN.sum(dim=-1, keepdim=True)
    weights_SN = weights_SN.to(normed_SM.dtype)
    out = torch.zeros_like(normed_SM)
    for expert in torch.unique(chosen_SN).tolist():
        rows, ranks = (chosen_SN == expert).nonzero(as_tuple=True)
        gate, up = multiply(normed_SM[rows], experts.gate_up[expert]).chunk(2, dim=-1)
        out.index_add_(0, rows, multiply(silu(gate) * up, experts.down[expert]) * weights_SN[rows, ranks, None])
    return out


def _row_by_row(rows_SK: Tensor, weight_NK: Tensor) -> Tensor:
    return torch.cat([linear(row_K[None], weight_NK) for row_K in rows_SK])


def _shared(shared: SharedExpert, ops: LayerOps, normed_SM: Tensor) -> Tensor:
    gates_S1 = (normed_SM * shared.gate_M).sum(dim=-1, keepdim=True).sigmoid()
    return gates_S1 * shared.down(ops.gate(shared.gate_up(normed_SM)))
