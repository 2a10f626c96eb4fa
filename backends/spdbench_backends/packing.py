"""Matrices of a drafter's file in 8 bits a number: half the bytes, and no worse drafts that could be measured.

A row's numbers are whole multiples of its own scale, the largest of them 127. Must not know what matrices are for.

    NAME          int8 [O, I]
    NAME.scale    float32 [O]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["bfloat16", "int8"]
SCALE = ".scale"
MOST = 127


def stored(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Tensors as a file holds them: bfloat16, or matrices in 8 bits and the rest in bfloat16; on the CPU."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu", torch.float32)
        if storage == "int8" and plain.ndim == 2:
            scales_O = plain.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / MOST
            found[name] = (plain / scales_O[:, None]).round_().to(torch.int8)
            found[name + SCALE] = scales_O
        else:
            found[name] = plain.to(torch.bfloat16)
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with what was in 8 bits in bfloat16, as other files have it; all else, and what does not fit,
    as it is."""
    scales = {name: scale for name in tensors if (scale := _scale_of(name, tensors)) is not None}
    found = {name: tensor for name, tensor in tensors.items() if name.removesuffix(SCALE) not in scales}
    return found | {name: (tensors[name] * scale[:, None]).to(torch.bfloat16) for name, scale in scales.items()}


def _scale_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    packed, scale = tensors[name], tensors.get(name + SCALE)
    if scale is None or packed.dtype != torch.int8 or packed.ndim != 2 or scale.shape != packed.shape[:1]:
        return None
    return scale.float()
