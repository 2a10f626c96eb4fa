"""The parts of trainable drafters: the llama family's layer with gradients, under its published names.

Methods differ in which rows attention sees, so a layer has two halves: `project` before attention, `finish` behind it.

Shapes: B conversations, S tokens, R rows with queries, J keys of a row's own, M model width, I input width, H query
heads, K kv heads, G query heads a kv head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.layers import LayerWeights
from spdbench.models.rotary import Rotary


class RMSNorm(nn.Module):
    """Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return rms_norm(rows.float(), (rows.shape[-1],), self.weight, self.eps)  # autocast multiplies in bfloat16


class _Projections(nn.Module):
    def __init__(self, config: ModelConfig, inputs: int, head_norms: bool) -> None:
        super().__init__()
        queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=False)
        self.k_proj = nn.Linear(inputs, kv, bias=False)
        self.v_proj = nn.Linear(inputs, kv, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if head_norms:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.head_norms = head_norms


class _SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu(self.gate_proj(rows)) * self.up_proj(rows))
        return out


class DecoderLayer(nn.Module):
    """A dense layer of the target's sizes. Its user applies `input_layernorm`, as methods differ in what it reads.

    `inputs` is the width that attention reads, M by default. Drawn from N(0, 0.02²), as published draft modules are.
    """

    def __init__(self, config: ModelConfig, *, inputs: int | None = None, head_norms: bool = False) -> None:
        super().__init__()
        self.config = config
        self.self_attn = _Projections(config, inputs or config.hidden_size, head_norms)
        self.mlp = _SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        for name, weight in self.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(weight, std=0.02)

    def project(self, inputs_BSI: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, H, S, D]`, rotated keys and plain values `[B, K, S, D]`."""
        return self.queries(inputs_BSI, cos_SD, sin_SD), *self.keys_and_values(inputs_BSI, cos_SD, sin_SD)

    def queries(self, inputs_BSI: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Rotated queries `[B, H, S, D]`."""
        queries = self._heads(self.self_attn.q_proj, inputs_BSI)
        if self.self_attn.head_norms:
            queries = self.self_attn.q_norm(queries)
        return rotated(queries, cos_SD, sin_SD)

    def keys_and_values(self, inputs_BSI: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and plain values `[B, K, S, D]`."""
        keys, values = self._heads(self.self_attn.k_proj, inputs_BSI), self._heads(self.self_attn.v_proj, inputs_BSI)
        if self.self_attn.head_norms:
            keys = self.self_attn.k_norm(keys)
        return rotated(keys, cos_SD, sin_SD), values

    def _heads(self, projection: nn.Linear, inputs_BSI: Tensor) -> Tensor:
        heads: Tensor = projection(inputs_BSI).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return heads

    def finish(self, mixed_BHSD: Tensor, residual_BSM: Tensor) -> Tensor:
        """Output projection, residual and feed-forward: `[B, S, M]`."""
        hidden = residual_BSM + self.self_attn.o_proj(mixed_BHSD.transpose(1, 2).flatten(2))
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out

    @torch.no_grad()
    def start_from(self, weights: LayerWeights, hidden_norm: RMSNorm | None = None) -> None:
        """Copies a layer of the target. `hidden_norm` is the norm of the hidden state that the layer reads, by default
        `input_layernorm`.

        A weight without a counterpart stays as it was drawn: a layer of experts has no dense feed-forward, recurrent
        and gated layers have another attention, and a layer that reads more than M columns reads the hidden state in
        the last M of them.
        """
        attention, mlp, width = self.self_attn, self.mlp, self.config.hidden_size
        if weights.delta_net is None and weights.output_gate is None:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            parts = torch.split(weights.qkv.plain(), [projection.out_features for projection in projections])
            for projection, part in zip(projections, parts, strict=True):
                projection.weight[:, -width:].copy_(part)
            attention.o_proj.weight.copy_(weights.out.plain())
        self.post_attention_layernorm.weight.copy_(weights.post_norm.weight_M)
        if weights.input_norm is not None:
            (hidden_norm or self.input_layernorm).weight.copy_(weights.input_norm.weight_M)
        if attention.head_norms and weights.head_norms is not None:
            attention.q_norm.weight.copy_(weights.head_norms.query.weight_M)
            attention.k_norm.weight.copy_(weights.head_norms.key.weight_M)
        if weights.gate_up is not None and weights.down is not None:
            gate, up = weights.gate_up.plain().chunk(2)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(weights.down.plain())


def attend_with_own(
    queries_BHRD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    hidden_RS: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    missing_RJ: Tensor | None = None,
) -> Tensor:
    """Attention of each row to S shared keys and to J keys of its own, in one softmax: `[B, H, R, D]`.

    Row r's j-th own key and value are row r of `own[j]`, both `[B, K, R, D]`, so that no mask over all rows of all J is
    needed. `hidden_RS`, or `[B, R, S]`, is true where a row does not see a shared key; `missing_RJ` where it has no
    j-th key. Sums are in the dtype of `values_BKSD`.
    """
    batch, num_heads, num_rows, size = queries_BHRD.shape
    num_kv, num_shared = keys_BKSD.shape[1:3]
    queries = queries_BHRD.reshape(batch, num_kv, num_heads // num_kv, num_rows, size) * size**-0.5
    shared = queries.flatten(2, 3) @ keys_BKSD.transpose(-1, -2)
    shared = shared.view(*queries.shape[:-1], num_shared).float()
    hidden = hidden_RS if hidden_RS.ndim == 2 else hidden_RS[:, None, None]
    scores = [shared.masked_fill(hidden, -torch.inf)]
    for j, (keys, _) in enumerate(own):
        score = (queries * keys[:, :, None]).float().sum(dim=-1, keepdim=True)
        scores.append(score if missing_RJ is None else score.masked_fill(missing_RJ[:, j, None], -torch.inf))
    shares = torch.cat(scores, dim=-1).softmax(dim=-1).to(values_BKSD.dtype)
    mixed: Tensor = (shares[..., :num_shared].flatten(2, 3) @ values_BKSD).view(queries.shape)
    for j, (_, values) in enumerate(own, num_shared):
        mixed = mixed + shares[..., j, None] * values[:, :, None]
    return mixed.flatten(1, 2)


def rotated(heads_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Heads rotated by their positions' angles; the sines include the signs, as in `Rotary`."""
    low, high = heads_BHSD.chunk(2, dim=-1)
    return heads_BHSD * cos_SD + torch.cat((high, low), dim=-1) * sin_SD


def angles(rotary: Rotary, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin in float32 of the positions, each `[S, D]`."""
    cos_PD, sin_PD = rotary.tables(int(positions_S.max()) + 1)
    return cos_PD[positions_S].float(), sin_PD[positions_S].float()
