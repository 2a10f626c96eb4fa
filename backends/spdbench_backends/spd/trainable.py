"""The Pipeline Draft Module with gradients: every position of a text at every depth at once.

A stream is the rows of all positions at one depth. In a pipeline with F tokens in flight, a row of depth d < n sees the
row `lag` positions back at depth d + lag while that is below F, and completed, of depth n, from there on; a completed
row sees completed rows. So each stream attends to one other stream in full and to a few single lags, and no mask over
all rows of all streams is needed. Source: the training code published with arXiv 2605.30852, with depths
where that has row types, which is what decoding does.

Shapes: B texts, S positions, M model width, H query heads, K kv heads, D head size, J lags, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

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


class Stream(NamedTuple):
    """What attention reads of the rows of one depth: rotated keys and values, `[B, K, S, D]`."""

    keys: Tensor
    values: Tensor


class TrainableModule(nn.Module):
    """Projections, layers and, where it is trained, the head (it begins as `own_head_UM`), by their published names."""

    def __init__(
        self, config: ModelConfig, anchors: Sequence[int], num_layers: int, own_head_UM: Tensor | None
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.anchors = tuple(anchors)
        self.aggr_projs = nn.ModuleList(nn.Linear((i + 1) * width, width, bias=False) for i in range(len(anchors)))
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
        self,
        plan: FeaturePlan,
        states: Mapping[int, Tensor],
        cos_SD: Tensor,
        sin_SD: Tensor,
        fill: int,
        read: Collection[int] = (0,),
    ) -> dict[int, Tensor]:
        """Rows `[B, S, M]` of the depths in `read`, before the final norm, with `fill` tokens in flight.

        `plan` is for the pipeline that is drafted for, with this module's anchors. `states` are hidden states by index,
        `[B, S, M]`. Depths are those below `fill`, and n.
        """
        full = plan.full_depth
        kinds = {depth: plan.row_type(depth) for depth in (*range(fill), full)}
        by_kind = self._first_rows(states, kinds.values())
        rows = {depth: by_kind[kind] for depth, kind in kinds.items()}
        for layer in self.spec_layers:
            assert isinstance(layer, DecoderLayer)
            needed = read if layer is self.spec_layers[-1] else kinds
            normed = _by_row(rows, layer.input_layernorm)
            queries = _by_row({depth: normed[depth] for depth in needed}, layer.queries, cos_SD, sin_SD)
            streams = {
                depth: Stream(*found) for depth, found in _by_row(normed, layer.keys_and_values, cos_SD, sin_SD).items()
            }
            rows = {
                depth: layer.finish(_attend(queries[depth], depth, streams, fill, full), rows[depth])
                for depth in needed
            }
        return rows

    def _first_rows(self, states: Mapping[int, Tensor], kinds: Collection[int]) -> dict[int, Tensor]:
        """The layers' inputs `[B, S, M]` by row type."""
        features = torch.cat([states[anchor] for anchor in self.anchors[: max(kinds) + 1]], dim=-1)
        width = features.shape[-1] // (max(kinds) + 1)
        return {kind: self.aggr_projs[kind](features[..., : (kind + 1) * width]).float() for kind in {*kinds}}

    def widened(self, weights: Mapping[str, Tensor], anchors: Sequence[int]) -> dict[str, Tensor]:
        """The weights of a module with fewer anchors, from which this one computes the same rows.

        A row that reads an anchor which the other module lacks begins as the other's row up to the anchor before it:
        the new columns are zeros.

        Raises:
            ValueError: the other module reads an anchor that this one lacks.
        """
        if not set(anchors) <= set(self.anchors):
            raise ValueError(f"anchors {list(anchors)} are not all among {list(self.anchors)}")
        found, width = dict(weights), self.projections[0].out_features
        for kind, anchor in enumerate(self.anchors):
            former = max(at for at, other in enumerate(anchors) if other <= anchor)
            narrow = dict(zip(anchors, torch.split(weights[f"aggr_projs.{former}.weight"], width, dim=1), strict=False))
            nothing = torch.zeros(width, width)
            wide = [narrow.get(each, nothing).float() for each in self.anchors[: kind + 1]]
            found[f"aggr_projs.{kind}.weight"] = torch.cat(wide, dim=1)
        return found

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
            features = torch.cat([batch.states[anchor][counted_BS] for anchor in self.anchors], dim=-1) * scale_N1
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


def _by_row(rows: Mapping[int, Tensor], work: Callable[..., Any], *more: Tensor) -> dict[int, Any]:
    """`work` on each depth's row, once where depths share one: those of one row type do in the first layer."""
    found = {id(row): work(row, *more) for row in {id(row): row for row in rows.values()}.values()}
    return {depth: found[id(row)] for depth, row in rows.items()}


def _attend(queries_BHSD: Tensor, depth: int, streams: Mapping[int, Stream], fill: int, full_depth: int) -> Tensor:
    """Attention of the rows of one depth: `[B, H, S, D]`.

    At position t, to the stream of depth + j at t - j for each of the J lags, and to completed rows further back.
    """
    full = streams[full_depth]
    if depth == full_depth:
        return scaled_dot_product_attention(queries_BHSD, *full, is_causal=True, enable_gqa=True)
    size = queries_BHSD.shape[2]
    lags = range(min(fill - depth, size))
    index_S1 = torch.arange(size, device=queries_BHSD.device)[:, None]
    near_SS = index_S1 - index_S1.T < len(lags)
    missing_SJ = index_S1 < index_S1.T[:, : len(lags)]  # the text begins less than j positions back
    own = [(_shifted(streams[depth + lag].keys, lag), _shifted(streams[depth + lag].values, lag)) for lag in lags]
    return attend_with_own(queries_BHSD, full.keys, full.values, near_SS, own, missing_SJ)


def _shifted(rows_BKSD: Tensor, lag: int) -> Tensor:
    """Row t - lag in the place of row t, zeros where there is none."""
    return pad(rows_BKSD[:, :, : rows_BKSD.shape[2] - lag], (0, 0, lag, 0)) if lag else rows_BKSD
