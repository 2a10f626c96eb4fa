"""The Pipeline Draft Module with gradients: every position of a text at every depth at once.

A stream is the rows of all positions at one depth. In a pipeline with F tokens in flight, a row of depth d < n sees the
row `lag` positions back at depth d + lag while that is below F, and completed, of depth n, from there on; a completed
row sees completed rows. So each stream attends to one other stream in full and to a few single lags, and no mask over
all rows of all streams is needed. Source: SPD.md, section 8, with depths where that has row types, which is what
decoding does. Must not know losses or files.

Shapes: B texts, S positions, M model width, H query heads, K kv heads, G queries a kv head, D head size, J lags.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.decoder import Decoder
from spdbench.models.layers import LayerWeights
from spdbench.training.modules import DecoderLayer, RMSNorm, angles
from spdbench.training.recipe import Batch
from spdbench_backends.spd.plan import FeaturePlan

RIDGE = 0.01
"""Of a feature's variance, added to it when projections are fitted."""
WIDEST_FIT = 16_384
"""Features of a row up to which a regression is worth its memory: a gigabyte."""


class Heads(NamedTuple):
    """A stream's turned queries `[B, H, S, D]`, turned keys and values `[B, K, S, D]`."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class TrainableModule(nn.Module):
    """Projections, layers and, where it is trained, the head (it begins as `own_head_UM`), by their published names."""

    def __init__(self, config: ModelConfig, plan: FeaturePlan, num_layers: int, own_head_UM: Tensor | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.plan = plan
        self.aggr_projs = nn.ModuleList(nn.Linear((i + 1) * width, width, bias=False) for i in range(len(plan.anchors)))
        for projection in self.aggr_projs:
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=0.02)
        self.spec_layers = nn.ModuleList(DecoderLayer(config, head_norms=True) for _ in range(num_layers))
        self.lm_head: nn.Linear | None = None
        if own_head_UM is not None:
            self.lm_head = nn.Linear(width, own_head_UM.shape[0], bias=False)
            self.lm_head.weight.data.copy_(own_head_UM)

    def forward(
        self, states: Mapping[int, Tensor], cos_SD: Tensor, sin_SD: Tensor, fill: int, read: Collection[int] = (0,)
    ) -> dict[int, Tensor]:
        """Rows `[B, S, M]` of the depths in `read`, before the final norm, with `fill` tokens in flight.

        `states` are hidden states by index, `[B, S, M]`. Depths are those below `fill`, and n.
        """
        depths = (*range(fill), self.plan.full_depth)
        rows = self._first_rows(states, depths)
        for layer in self.spec_layers:
            needed = read if layer is self.spec_layers[-1] else depths
            rows = self._through(layer, rows, needed, fill, cos_SD, sin_SD)
        return rows

    def _first_rows(self, states: Mapping[int, Tensor], depths: Collection[int]) -> dict[int, Tensor]:
        """Depths that read the same anchors share one tensor."""
        features = torch.cat([states[anchor] for anchor in self.plan.anchors], dim=-1)
        width = features.shape[-1] // len(self.plan.anchors)
        kinds = {self.plan.row_type(depth) for depth in depths}
        by_kind = {kind: self.aggr_projs[kind](features[..., : (kind + 1) * width]).float() for kind in kinds}
        return {depth: by_kind[self.plan.row_type(depth)] for depth in depths}

    def _through(
        self,
        layer: nn.Module,
        rows: Mapping[int, Tensor],
        needed: Collection[int],
        fill: int,
        cos_SD: Tensor,
        sin_SD: Tensor,
    ) -> dict[int, Tensor]:
        assert isinstance(layer, DecoderLayer)
        once: dict[int, Heads] = {}
        for row in rows.values():
            if id(row) not in once:
                once[id(row)] = Heads(*layer.project(layer.input_layernorm(row), cos_SD, sin_SD))
        heads = {depth: once[id(row)] for depth, row in rows.items()}
        return {depth: layer.finish(self._attend(depth, heads, fill), rows[depth]) for depth in needed}

    def _attend(self, depth: int, heads: Mapping[int, Heads], fill: int) -> Tensor:
        """What the queries of a stream gather: `[B, H, S, D]`."""
        own, full = heads[depth], heads[self.plan.full_depth]
        if depth == self.plan.full_depth:
            return scaled_dot_product_attention(own.queries, own.keys, own.values, is_causal=True, enable_gqa=True)
        lags = [heads[depth + lag] for lag in range(min(fill - depth, own.queries.shape[2]))]
        return _attend_with_lags(own.queries, full, lags)


def _attend_with_lags(queries_BHSD: Tensor, full: Heads, lags: list[Heads]) -> Tensor:
    """Attention of position t to `lags[j]` at t - j for each j, and to `full` further back."""
    batch, num_heads, size, width = queries_BHSD.shape
    num_kv = full.keys.shape[1]
    queries = queries_BHSD.reshape(batch, num_kv, num_heads // num_kv, size, width) * width**-0.5
    far = queries.flatten(2, 3) @ full.keys.transpose(-1, -2)
    far = far.view(batch, num_kv, num_heads // num_kv, size, size).float() + _far_mask(size, len(lags), far.device)
    keys = [_shifted(heads.keys, lag) for lag, heads in enumerate(lags)]
    near = torch.stack([(queries * key[:, :, None]).float().sum(dim=-1) for key in keys], dim=-1)
    near = near + _near_mask(size, len(lags), near.device)
    shares = torch.cat((far, near), dim=-1).softmax(dim=-1).to(full.values.dtype)
    mixed = (shares[..., :size].flatten(2, 3) @ full.values).view_as(queries)
    for lag, heads in enumerate(lags):
        mixed = mixed + shares[..., size + lag, None] * _shifted(heads.values, lag)[:, :, None]
    return mixed.reshape(batch, num_heads, size, width)


def _far_mask(size: int, num_lags: int, device: torch.device) -> Tensor:
    """0 where a key lies at least `num_lags` back, else minus infinity: `[S, S]`."""
    places = torch.arange(size, device=device)
    return torch.zeros(size, size, device=device).masked_fill_(
        places[:, None] - places[None, :] < num_lags, float("-inf")
    )


def _near_mask(size: int, num_lags: int, device: torch.device) -> Tensor:
    """0 where the text has begun that far back, else minus infinity: `[S, J]`."""
    ahead = torch.arange(size, device=device)[:, None] < torch.arange(num_lags, device=device)[None, :]
    return torch.zeros(size, num_lags, device=device).masked_fill_(ahead, float("-inf"))


def _shifted(rows_BKSD: Tensor, lag: int) -> Tensor:
    """Row t - lag in the place of row t, zeros where there is none."""
    return pad(rows_BKSD[:, :, : rows_BKSD.shape[2] - lag], (0, 0, lag, 0)) if lag else rows_BKSD


def positions(decoder: Decoder, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The angles of positions 0 to size - 1."""
    cos_SD, sin_SD = angles(decoder.rotary, torch.arange(size))
    return cos_SD.to(device), sin_SD.to(device)


@torch.no_grad()
def fit_projections(module: TrainableModule, batches: Iterable[Batch], state: int) -> None:
    """Sets each projection to the ridge regression of hidden state `state` on the anchors that its rows read.

    The target's late layers, which the module's begin as, then find rows of the kind that they know: the loss begins
    at a fifth of what it is with random projections. Tokens count alike, whatever the size of their states.
    """
    deepest = module.aggr_projs[-1]
    assert isinstance(deepest, nn.Linear)
    total, width, device = deepest.in_features, deepest.out_features, deepest.weight.device
    if total > WIDEST_FIT:
        return
    gram, cross, num_tokens = torch.zeros(total, total, device=device), torch.zeros(total, width, device=device), 0
    for batch in batches:
        counted_BS = batch.valid_BS.clone()
        counted_BS[:, 0] = False  # the first token's states are of a size of their own
        aims_NM = batch.states[state][counted_BS]
        scale_N1 = aims_NM.pow(2).mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
        features = torch.cat([batch.states[anchor][counted_BS] for anchor in module.plan.anchors], dim=-1) * scale_N1
        gram += features.T @ features
        cross += features.T @ (aims_NM * scale_N1)
        num_tokens += len(aims_NM)
    if not num_tokens:
        return
    sizes = (gram.diagonal() / num_tokens).sqrt().clamp_min(1e-6)
    gram = gram / torch.outer(sizes, sizes) + RIDGE * num_tokens * torch.eye(len(gram), device=gram.device)
    cross = cross / sizes[:, None]
    for projection in module.aggr_projs:
        assert isinstance(projection, nn.Linear)
        read = projection.in_features  # a type's anchors are the first of them all
        solved = torch.linalg.solve(gram[:read, :read].double(), cross[:read].double())
        projection.weight.copy_((solved / sizes[:read, None]).T)


@torch.no_grad()
def copy_layer(weights: LayerWeights, layer: DecoderLayer) -> None:
    """A target's layer as the start of a trainable one: every weight that has its place there; the rest stays."""
    config, attention, mlp = layer.config, layer.self_attn, layer.mlp
    queries, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = torch.split(weights.qkv.plain(), [queries, kv, kv])
    for projection, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True):
        projection.weight.copy_(part)
    attention.o_proj.weight.copy_(weights.out.plain())
    norms: list[tuple[RMSNorm, Tensor]] = [(layer.post_attention_layernorm, weights.post_norm.weight_M)]
    if weights.input_norm is not None:
        norms.append((layer.input_layernorm, weights.input_norm.weight_M))
    if attention.head_norms and weights.head_norms is not None:
        norms.append((attention.q_norm, weights.head_norms.query.weight_M))
        norms.append((attention.k_norm, weights.head_norms.key.weight_M))
    for norm, weight in norms:
        norm.weight.copy_(weight)
    if weights.gate_up is not None and weights.down is not None:
        gate, up = weights.gate_up.plain().chunk(2)
        mlp.gate_proj.weight.copy_(gate)
        mlp.up_proj.weight.copy_(up)
        mlp.down_proj.weight.copy_(weights.down.plain())
