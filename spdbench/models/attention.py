"""Attention of a few new rows over a key-value cache, grouped-query heads folded into rows.

Shapes: S new rows, H query heads, K kv heads, G = H / K, T slots, D head size. Knows nothing of layers or models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(
    queries_SHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, mask_ST: Tensor | None, window: int | None = None
) -> Tensor:
    """Attention of the newest S rows over all T slots, the last S of which are their own: `[S, H * D]`.

    `mask_ST` is true where a row may look; None for a single row, or where all slots are the rows' own in a chain.

    The G query heads that share a kv head become G rows of it, so that one small product serves them: a one-row
    attention over 1,024 slots costs a sixth of what `enable_gqa` costs on a CPU. With `window` w a row sees itself and
    the w - 1 slots before it.
    """
    num_rows, num_heads, head_dim = queries_SHD.shape
    num_kv, num_slots, _ = keys_KTD.shape
    if num_rows == 1:
        if window is not None and num_slots > window:
            keys_KTD, values_KTD = keys_KTD[:, -window:], values_KTD[:, -window:]
        folded = queries_SHD.view(1, num_kv, num_heads // num_kv, head_dim)
        return scaled_dot_product_attention(folded, keys_KTD[None], values_KTD[None]).view(1, num_heads * head_dim)
    if mask_ST is None:
        out = scaled_dot_product_attention(
            queries_SHD.transpose(0, 1)[None],
            keys_KTD[None],
            values_KTD[None],
            is_causal=True,
            enable_gqa=num_heads != num_kv,
        )
        return out[0].transpose(0, 1).reshape(num_rows, num_heads * head_dim)
    group = num_heads // num_kv
    folded = (
        queries_SHD.view(num_rows, num_kv, group, head_dim)
        .permute(1, 2, 0, 3)
        .reshape(1, num_kv, group * num_rows, head_dim)
    )
    out = scaled_dot_product_attention(folded, keys_KTD[None], values_KTD[None], attn_mask=mask_ST.repeat(group, 1))
    return out.view(num_kv, group, num_rows, head_dim).permute(2, 0, 1, 3).reshape(num_rows, num_heads * head_dim)


def causal_mask(num_rows: int, num_slots: int, window: int | None, device: torch.device) -> Tensor:
    """`[S, T]`, true where a row may look: not ahead of itself, and not `window` or more slots back."""
    slots = torch.arange(num_slots, device=device)
    own = torch.arange(num_slots - num_rows, num_slots, device=device)[:, None]
    visible = slots <= own
    if window is not None:
        visible &= slots > own - window
    return visible
