"""Decoder layers over tensors that stay in place: the forward pass that a CUDA graph can hold.

Positions, cache slots and visibility are read from device tensors at every replay. Attention covers a fixed number of
slots, a bucket, and a mask hides the slots that a row may not see, so one capture serves every length up to its bucket.
Weights and cache are those of the eager forward pass, and a prompt may go through that pass into the same cache.

Shapes: S new rows, M model width, H query heads, K kv heads, G = H / K, D head size, B slots of the bucket, W slots of
a tree, R = G S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor

from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import Geometry, LayerOps, fold_heads, unfold_heads
from spdbench.models.layers import LayerWeights, after_attention
from spdbench.models.rotary import Rotary

MASKED = float("-inf")
COMPILED_SHAPES = 64
"""Shapes that torch.compile keeps code for: each bucket and each number of rows is one."""
_CACHES: WeakSet[KVCache] = WeakSet()
"""Those that captured layers read."""


@torch.inference_mode()
def clear_captured_caches() -> None:
    """Sets all slots to 0. Attention multiplies masked slots by 0, which gives 0 only where they hold finite numbers:
    NaN of one request would reach the next ones."""
    for kv_cache in _CACHES:
        for layer in kv_cache.layers:
            for part in kv_cache.slots(layer):
                part.zero_()


@dataclass(frozen=True)
class CapturedContext:
    """The attention context of S rows: the slots they are written to, their angles, each `[S, 1, D]`, and by window the
    mask added to attention's scores, `[R, B]`: 0 where a row may look, else minus infinity."""

    slots_S: Tensor
    cos_S1D: Tensor
    sin_S1D: Tensor
    mask_RB: dict[int | None, Tensor]


class CapturedLayers:
    """The layers `weights`, by index, over one cache. `compiled`: torch.compile fuses the operations between matrix
    multiplications."""

    def __init__(
        self,
        weights: Mapping[int, LayerWeights],
        geometry: Geometry,
        rotary: Rotary,
        kv_cache: KVCache,
        *,
        compiled: bool = False,
    ) -> None:
        self._weights = weights
        self._group = geometry.num_heads // geometry.num_kv_heads
        self._ops = LayerOps(geometry)
        self._cos_PD, self._sin_PD = rotary.tables(kv_cache.capacity)
        self._cache = kv_cache
        self._windows = {layer.window for layer in weights.values()}
        self._widen = not compiled and can_widen(self._cos_PD.device, self._cos_PD.dtype)
        self._layer: Callable[..., Tensor] = captured_layer
        if compiled:
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, limit)
            self._layer = torch.compile(captured_layer, dynamic=False, fullgraph=True)
        _CACHES.add(kv_cache)
        clear_captured_caches()

    def chain(self, positions_S: Tensor, bucket: int) -> CapturedContext:
        """Rows of a chain, each at the slot of its position; a row sees all slots up to its own."""
        slots_B = torch.arange(bucket, device=positions_S.device)
        own_S1 = positions_S[:, None]
        seen = {
            window: slots_B <= own_S1 if window is None else (slots_B <= own_S1) & (slots_B > own_S1 - window)
            for window in self._windows
        }
        return self._context(positions_S, positions_S, seen)

    def tree(self, first_1: Tensor, depths_S: Tensor, visible_SW: Tensor, bucket: int) -> CapturedContext:
        """Rows of a tree in the last S of the W slots from slot `first_1` on; see `attention_context.TreeRows`."""
        num_rows, width = visible_SW.shape
        slots_B = torch.arange(bucket, device=depths_S.device)
        offsets_B = slots_B - first_1
        inside_B = (offsets_B >= 0) & (offsets_B < width)
        own_SB = visible_SW.index_select(1, offsets_B.clamp(0, width - 1)) & inside_B
        before_B = offsets_B < 0
        positions_S = depths_S + first_1
        seen = {
            window: own_SB | (before_B if window is None else before_B & (slots_B > positions_S[:, None] - window))
            for window in self._windows
        }
        new_S = torch.arange(width - num_rows, width, device=depths_S.device)
        return self._context(positions_S, first_1 + new_S, seen)

    def forward(
        self,
        hidden_SM: Tensor,
        context: CapturedContext,
        layers: Iterable[int],
        on_hidden: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Rows through `layers`: `[S, M]`. `on_hidden` gets each layer's output and its hidden-state index."""
        for layer in layers:
            norm, normed_SM = self._weights[layer].input_norm, hidden_SM
            if norm is not None:
                normed_SM = self._ops.norm(hidden_SM, norm)
            hidden_SM = self.body(layer, normed_SM, hidden_SM, context)
            if on_hidden is not None:
                on_hidden(layer + 1, hidden_SM)
        return hidden_SM

    def body(self, layer: int, inputs_SI: Tensor, hidden_SM: Tensor, context: CapturedContext) -> Tensor:
        """A layer after its input norm; see `layers.layer_body`."""
        weights, (keys, values) = self._weights[layer], self._cache.slots(layer)
        mask_RB, angles = context.mask_RB[weights.window], (context.cos_S1D, context.sin_S1D)
        return self._layer(
            weights, self._ops, inputs_SI, hidden_SM, keys, values, context.slots_S, angles, mask_RB, self._widen
        )

    def _context(self, positions_S: Tensor, slots_S: Tensor, seen: dict[int | None, Tensor]) -> CapturedContext:
        return CapturedContext(
            slots_S,
            self._cos_PD.index_select(0, positions_S)[:, None],
            self._sin_PD.index_select(0, positions_S)[:, None],
            {window: _added_mask(seen_SB, self._group) for window, seen_SB in seen.items()},
        )


def _added_mask(seen_SB: Tensor, group: int) -> Tensor:
    return torch.zeros_like(seen_SB, dtype=torch.float32).masked_fill_(~seen_SB, MASKED).repeat(group, 1)


def captured_layer(
    weights: LayerWeights,
    ops: LayerOps,
    inputs_SI: Tensor,
    hidden_SM: Tensor,
    keys_KTD: Tensor,
    values_KTD: Tensor,
    slots_S: Tensor,
    angles: tuple[Tensor, Tensor],
    mask_RB: Tensor,
    widen: bool,
) -> Tensor:
    """A layer after its input norm: `[S, M]`. Writes keys and values to the rows' slots."""
    num_heads, bucket = ops.geometry.num_heads, mask_RB.shape[1]
    rotated, values_SKD = ops.rotate_heads(weights.qkv(inputs_SI), weights.head_norms, *angles)
    keys_KTD.index_copy_(1, slots_S, rotated[:, num_heads:].transpose(0, 1))
    values_KTD.index_copy_(1, slots_S, values_SKD.transpose(0, 1))
    mixed = attend_masked(rotated[:, :num_heads], keys_KTD[:, :bucket], values_KTD[:, :bucket], mask_RB, widen)
    return after_attention(weights, ops, mixed, hidden_SM)


def attend_masked(queries_SHD: Tensor, keys_KBD: Tensor, values_KBD: Tensor, mask_RB: Tensor, widen: bool) -> Tensor:
    """Attention over all slots of a bucket, scores and softmax in float32: `[S, H D]`.

    Two plain matrix multiplications: with a mask, the fused attention kernels do not split the slots of a few rows over
    the processors of a GPU. `widen`: the device multiplies 16-bit matrices into a float32 result.
    """
    folded_KRD = fold_heads(queries_SHD, keys_KBD.shape[0])
    keys_KDB = keys_KBD.transpose(1, 2)
    if widen:
        scores_KRB = torch.bmm(folded_KRD, keys_KDB, out_dtype=torch.float32)
    else:
        scores_KRB = torch.bmm(folded_KRD.float(), keys_KDB.float())
    shares_KRB = torch.add(mask_RB, scores_KRB, alpha=queries_SHD.shape[-1] ** -0.5).softmax(dim=-1)
    out_KRD = torch.bmm(shares_KRB.to(values_KBD.dtype), values_KBD)
    return unfold_heads(out_KRD, len(queries_SHD))


@cache
def can_widen(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the device multiplies 16-bit matrices into a float32 result, found out by one small multiplication."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    ones = torch.ones(2, 8, 8, dtype=dtype, device=device)
    try:
        return bool((torch.bmm(ones, ones, out_dtype=torch.float32) == 8).all())
    except (RuntimeError, TypeError):  # older than the argument, or not on this device
        return False
