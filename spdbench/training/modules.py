"""The parts that trainable drafters are made of: the llama family's layer with gradients, under its published names.

A layer's attention is the method's own affair (who sees whom differs), so a layer is given to its user in two halves:
`project` before attention, `finish` behind it. Must not know any method.

Shapes: B conversations, S tokens, M model width, I input width, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.rotary import Rotary

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries `[B, H, S, D]`, keys and values `[B, K, S, D]` to the heads' mixed values `[B, H, S, D]`."""


class RMSNorm(nn.Module):
    """Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return rms_norm(rows.float(), (rows.shape[-1],), self.weight, self.eps)  # autocast's products come in half


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
    """A dense layer of the target's sizes; `input_layernorm` is left to the user, as methods differ in what it reads.

    `inputs` is the width that attention reads, M by default. Drawn from N(0, 0.02²), the published draft modules' own.
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
        """Turned queries `[B, H, S, D]`, turned keys and plain values `[B, K, S, D]`."""
        attention, size = self.self_attn, self.config.head_dim
        queries, keys, values = (
            projection(inputs_BSI).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if attention.head_norms:
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        return rotated(queries, cos_SD, sin_SD), rotated(keys, cos_SD, sin_SD), values

    def finish(self, mixed_BHSD: Tensor, residual_BSM: Tensor) -> Tensor:
        """Output projection, residual and feed-forward: `[B, S, M]`."""
        hidden = residual_BSM + self.self_attn.o_proj(mixed_BHSD.transpose(1, 2).flatten(2))
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


def rotated(heads_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Heads turned by their positions' angles; the sines bring signs along, as in `Rotary`."""
    low, high = heads_BHSD.chunk(2, dim=-1)
    return heads_BHSD * cos_SD + torch.cat((high, low), dim=-1) * sin_SD


def angles(rotary: Rotary, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin in float32 of the positions, each `[S, D]`."""
    cos_PD, sin_PD = rotary.tables(int(positions_S.max()) + 1)
    return cos_PD[positions_S].float(), sin_PD[positions_S].float()
