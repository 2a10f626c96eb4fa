"""The Pipeline Draft Module with gradients: every position of a text at every depth at once.

A stream is the rows of all positions at one depth. In a pipeline with F tokens in flight, a row of depth d < n sees the
row `lag` positions back at depth d + lag while that is below F, and completed, of depth n, from there on; a completed
row sees completed rows. So each stream attends to one other stream in full and to a few single lags, and no mask over
all rows of all streams is needed. Source: the training code published with arXiv 2605.30852, with depths
where that has row types, which is what decoding does.

Shapes: B texts, S positions, M model width, H query heads, K kv heads, D head size, J lags, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.training.layers import DecoderLayer, attend_with_own
from spdbench.training.recipe import Batch
from spdbench_backends.spd.plan import FeaturePlan

RIDGE = 0.01
"""Share of a feature's variance that is added to it when projections are fitted."""
WIDEST_FIT = 16_384
"""Features of a row up to which a regression is worth its memory: a gigabyte."""


class Heads(NamedTuple):
    """A stream's rotated queries `[B, H, S, D]`, rotated keys and values `[B, K, S, D]`."""

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
        for projection in self.projections:
            nn.init.normal_(projection.weight, std=0.02)
        self.spec_layers = nn.ModuleList(DecoderLayer(config, head_norms=True) for _ in range(num_layers))
        self.lm_head: nn.Linear | None = None
        if own_head_UM is not None:
            self.lm_head = nn.Linear(width, own_head_UM.shape[0], bias=False)
            self.lm_head.weight.data.copy_(own_head_UM)

    @property
    def projections(self) -> list[nn.Linear]:
        """The projection of each row type."""
        return cast("list[nn.Linear]", list(self.aggr_projs))

    def forward(
        self, states: Mapping[int, Tensor], cos_SD: Tensor, sin_SD: Tensor, fill: int, read: Collection[int] = (0,)
    ) -> dict[int, Tensor]:
        """Rows `[B, S, M]` of the depths in `read`, before the final norm, with `fill` tokens in flight.

        `states` are hidden states by index, `[B, S, M]`. Depths are those below `fill`, and n.
        """
        depths = (*range(fill), self.plan.full_depth)
        rows = self._first_rows(states, depths)
        for layer in self.spec_layers:
            assert isinstance(layer, DecoderLayer)
            needed = read if layer is self.spec_layers[-1] else depths
            by_row = {  # depths of one row type share their row in the first layer
                id(row): Heads(*layer.project(layer.input_layernorm(row), cos_SD, sin_SD))
                for row in {id(row): row for row in rows.values()}.values()
            }
            heads = {depth: by_row[id(row)] for depth, row in rows.items()}
            rows = {depth: layer.finish(self._attend(depth, heads, fill), rows[depth]) for depth in needed}
        return rows

    def _first_rows(self, states: Mapping[int, Tensor], depths: Collection[int]) -> dict[int, Tensor]:
        """Depths that read the same anchors share one tensor."""
        features = torch.cat([states[anchor] for anchor in self.plan.anchors], dim=-1)
        width = features.shape[-1] // len(self.plan.anchors)
        kinds = {self.plan.row_type(depth) for depth in depths}
        by_kind = {kind: self.aggr_projs[kind](features[..., : (kind + 1) * width]).float() for kind in kinds}
        return {depth: by_kind[self.plan.row_type(depth)] for depth in depths}

    def _attend(self, depth: int, heads: Mapping[int, Heads], fill: int) -> Tensor:
        """Attention of the queries of a stream: `[B, H, S, D]`.

        At position t, to the stream of depth + j at t - j for each of the J lags, and to completed rows further back.
        """
        stream, full = heads[depth], heads[self.plan.full_depth]
        if depth == self.plan.full_depth:
            return scaled_dot_product_attention(*stream, is_causal=True, enable_gqa=True)
        size = stream.queries.shape[2]
        lags = range(min(fill - depth, size))
        index_S1 = torch.arange(size, device=stream.queries.device)[:, None]
        near_SS = index_S1 - index_S1.T < len(lags)
        missing_SJ = index_S1 < index_S1.T[:, : len(lags)]  # the text begins less than j positions back
        own = [(_shifted(heads[depth + lag].keys, lag), _shifted(heads[depth + lag].values, lag)) for lag in lags]
        return attend_with_own(stream.queries, full.keys, full.values, near_SS, own, missing_SJ)

    @torch.no_grad()
    def fit_projections(self, batches: Iterable[Batch], state: int) -> None:
        """Sets each projection to the ridge regression of hidden state `state` on the anchors that its rows read.

        The target's late layers, as which the module's begin, then read rows of the kind that they know: the loss
        begins at a fifth of its value with random projections. Tokens count alike, whatever the size of their states.
        """
        total, width = self.projections[-1].in_features, self.projections[-1].out_features
        if total > WIDEST_FIT:
            return
        gram = torch.zeros(total, total, device=self.projections[-1].weight.device)
        cross, num_tokens = gram.new_zeros(total, width), 0
        for batch in batches:
            counted_BS = batch.valid_BS.clone()
            counted_BS[:, 0] = False  # the first token's states are of another order of magnitude
            aims_NM = batch.states[state][counted_BS]
            scale_N1 = aims_NM.pow(2).mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
            features = torch.cat([batch.states[anchor][counted_BS] for anchor in self.plan.anchors], dim=-1) * scale_N1
            gram += features.T @ features
            cross += features.T @ (aims_NM * scale_N1)
            num_tokens += len(aims_NM)
        if not num_tokens:
            return
        sizes = (gram.diagonal() / num_tokens).sqrt().clamp_min(1e-6)
        gram = gram / torch.outer(sizes, sizes) + RIDGE * num_tokens * torch.eye(total, device=gram.device)
        cross = cross / sizes[:, None]
        for projection in self.projections:
            read = projection.in_features  # a row type reads the first of all anchors
            solved = torch.linalg.solve(gram[:read, :read].double(), cross[:read].double())
            projection.weight.copy_((solved / sizes[:read, None]).T)


def _shifted(rows_BKSD: Tensor, lag: int) -> Tensor:
    """Row t - lag in the place of row t, zeros where there is none."""
    return pad(rows_BKSD[:, :, : rows_BKSD.shape[2] - lag], (0, 0, lag, 0)) if lag else rows_BKSD
