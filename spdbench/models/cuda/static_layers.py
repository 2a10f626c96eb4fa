"""A layer's arithmetic over tensors that stay in place: what a CUDA graph can hold.

Positions, slots and who sees whom are read from the device at each replay, and attention looks at a fixed number of
slots, a bucket, of which a mask hides what is not valid. So one recording serves every length up to its bucket. The
weights and the cache are the plain path's own, and a prompt may go through that path into the same cache. Must not
know what is recorded, nor when.

Shapes: S new rows, M model width, H query heads, K kv heads, G = H / K, D head size, B slots of the bucket, W slots of
a tree, R = G S.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import Geometry, TorchOps
from spdbench.models.layers import LayerWeights, after_attention
from spdbench.models.rotary import Rotary

SMALLEST_BUCKET = 256
NOWHERE = float("-inf")
RECORDED_SHAPES = 64


def buckets(capacity: int) -> tuple[int, ...]:
    """Numbers of slots that attention is recorded for: powers of two, and the capacity."""
    sizes, size = [], SMALLEST_BUCKET
    while size < capacity:
        sizes.append(size)
        size *= 2
    return (*sizes, capacity)


def bucket_for(length: int, sizes: Collection[int]) -> int:
    """The smallest bucket that holds `length` slots."""
    return min(size for size in sizes if size >= length)


@dataclass(frozen=True)
class StaticPlace:
    """Where S rows stand: the slots that they are written to, their angles, each `[S, 1, D]`, and by window what is
    added to attention's scores, `[R, B]`: nothing where a row may look, else minus infinity."""

    slots_S: Tensor
    cos_S1D: Tensor
    sin_S1D: Tensor
    hidden_RB: dict[int | None, Tensor]


class StaticLayers:
    """Layers of one geometry over one cache. `compiled`: torch.compile fuses what lies between products."""

    def __init__(
        self,
        geometry: Geometry,
        rotary: Rotary,
        kv_cache: KVCache,
        windows: Collection[int | None],
        *,
        compiled: bool = False,
    ) -> None:
        self._group = geometry.num_heads // geometry.num_kv_heads
        self._steps = TorchOps(geometry)
        self._cos_PD, self._sin_PD = rotary.tables(kv_cache.capacity)
        self._cache = kv_cache
        self._windows = frozenset(windows)
        self._wide = not compiled and wide_products(self._cos_PD.device, self._cos_PD.dtype)
        self._layer: Callable[..., Tensor] = static_layer
        if compiled:
            allow_shapes(RECORDED_SHAPES)
            self._layer = torch.compile(static_layer, dynamic=False, fullgraph=True)
        for layer in kv_cache.layers:  # what nobody wrote is read too, and multiplied by 0
            for part in kv_cache.slots(layer):
                part.zero_()

    def chain(self, positions_S: Tensor, bucket: int) -> StaticPlace:
        """Rows of a chain, each at the slot of its position; a row sees all slots up to its own."""
        slots_B = torch.arange(bucket, device=positions_S.device)
        own_S1 = positions_S[:, None]
        seen = {
            window: slots_B <= own_S1 if window is None else (slots_B <= own_S1) & (slots_B > own_S1 - window)
            for window in self._windows
        }
        return self._place(positions_S, positions_S, seen)

    def tree(self, first_1: Tensor, depths_S: Tensor, visible_SW: Tensor, bucket: int) -> StaticPlace:
        """Rows of a tree in the last S of the W slots from slot `first_1` on, as `place.TreeRows` has it."""
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
        return self._place(positions_S, first_1 + new_S, seen)

    def forward(self, weights: LayerWeights, layer: int, hidden_SM: Tensor, place: StaticPlace) -> Tensor:
        """One layer: `[S, M]`."""
        normed_SM = hidden_SM
        if weights.input_norm is not None:
            normed_SM = self._steps.norm(hidden_SM, weights.input_norm)
        return self.body(weights, layer, normed_SM, hidden_SM, place)

    def body(
        self, weights: LayerWeights, layer: int, inputs_SI: Tensor, hidden_SM: Tensor, place: StaticPlace
    ) -> Tensor:
        """What follows a layer's input norm, as `layers.layer_body`."""
        keys, values = self._cache.slots(layer)
        hidden_RB = place.hidden_RB[weights.window]
        angles = place.cos_S1D, place.sin_S1D
        return self._layer(
            weights, self._steps, inputs_SI, hidden_SM, keys, values, place.slots_S, angles, hidden_RB, self._wide
        )

    def _place(self, positions_S: Tensor, slots_S: Tensor, seen: dict[int | None, Tensor]) -> StaticPlace:
        return StaticPlace(
            slots_S,
            self._cos_PD.index_select(0, positions_S)[:, None],
            self._sin_PD.index_select(0, positions_S)[:, None],
            {window: _added(seen_SB, self._group) for window, seen_SB in seen.items()},
        )


def allow_shapes(count: int) -> None:
    """Lets torch.compile keep code for so many shapes of one function: every bucket and every number of rows is one."""
    torch._dynamo.config.recompile_limit = max(count, torch._dynamo.config.recompile_limit)


def _added(seen_SB: Tensor, group: int) -> Tensor:
    return torch.zeros_like(seen_SB, dtype=torch.float32).masked_fill_(~seen_SB, NOWHERE).repeat(group, 1)


def static_layer(
    weights: LayerWeights,
    steps: TorchOps,
    inputs_SI: Tensor,
    hidden_SM: Tensor,
    keys_KTD: Tensor,
    values_KTD: Tensor,
    slots_S: Tensor,
    angles: tuple[Tensor, Tensor],
    hidden_RB: Tensor,
    wide: bool,
) -> Tensor:
    """A layer from behind its input norm on: `[S, M]`. Writes keys and values to the rows' slots."""
    num_heads, bucket = steps.geometry.num_heads, hidden_RB.shape[1]
    rotated, values_SKD = steps.rotate_heads(weights.qkv(inputs_SI), weights.head_norms, *angles)
    keys_KTD.index_copy_(1, slots_S, rotated[:, num_heads:].transpose(0, 1))
    values_KTD.index_copy_(1, slots_S, values_SKD.transpose(0, 1))
    mixed = attend_masked(rotated[:, :num_heads], keys_KTD[:, :bucket], values_KTD[:, :bucket], hidden_RB, wide)
    return after_attention(weights, steps, mixed, hidden_SM)


def attend_masked(queries_SHD: Tensor, keys_KBD: Tensor, values_KBD: Tensor, hidden_RB: Tensor, wide: bool) -> Tensor:
    """Attention over all slots of a bucket, scores and softmax in float32: `[S, H D]`.

    Two plain products: the fused kernels do not split a few rows' slots over a GPU's processors where there is a mask.
    `wide`: a product of 16-bit numbers can be had in float32.
    """
    num_rows, num_heads, head_dim = queries_SHD.shape
    num_kv = keys_KBD.shape[0]
    group = num_heads // num_kv
    folded_KRD = (
        queries_SHD.reshape(num_rows, num_kv, group, head_dim)
        .permute(1, 2, 0, 3)
        .reshape(num_kv, group * num_rows, head_dim)
    )
    keys_KDB = keys_KBD.transpose(1, 2)
    if wide:
        scores_KRB = torch.bmm(folded_KRD, keys_KDB, out_dtype=torch.float32)
    else:
        scores_KRB = torch.bmm(folded_KRD.float(), keys_KDB.float())
    shares_KRB = torch.add(hidden_RB, scores_KRB, alpha=head_dim**-0.5).softmax(dim=-1)
    out_KRD = torch.bmm(shares_KRB.to(values_KBD.dtype), values_KBD)
    return out_KRD.view(num_kv, group, num_rows, head_dim).permute(2, 0, 1, 3).reshape(num_rows, num_heads * head_dim)


@cache
def wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """True if 16-bit factors give a float32 product here, which one small product has shown."""
    if device.type != "cuda" or dtype == torch.float32:
        return False
    ones = torch.ones(2, 8, 8, dtype=dtype, device=device)
    try:
        return bool((torch.bmm(ones, ones, out_dtype=torch.float32) == 8).all())
    except (RuntimeError, TypeError):  # older than the argument, or not on this device
        return False
