"""Rotary positions: a table of cosines and sines, grown on demand, and its application to heads.

Source: Su et al., RoFormer, arXiv 2104.09864, in the half-split layout that the llama family uses.
Shapes: S rows, H heads, D head size, P positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdbench.models.torch_utils import array


class Rotary:
    """cos and signed sin by position, computed once in float32 and kept in the model's dtype."""

    def __init__(self, frequencies: Tensor, factor: float, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = frequencies.float()
        self._factor = factor
        self._dtype = dtype
        self._device = device
        self._cos_PD = self._sin_PD = torch.empty(0)
        self._arrays: Any = None

    def on(self, device: torch.device) -> Rotary:
        """The same angles on another device."""
        return Rotary(self._frequencies, self._factor, self._dtype, device)

    @property
    def plain_base(self) -> float | None:
        """The base of the inverse frequencies, rounded to a whole number where it is one; None if they are scaled.
        Pairs that are not rotated, of frequency 0, do not count."""
        rotated = self._frequencies[self._frequencies > 0].cpu()
        pairs = len(rotated)
        if pairs < 2:
            return None
        slowest = float(rotated[-1].double())
        base = slowest ** (-pairs / (pairs - 1))
        base = float(round(base)) if abs(base - round(base)) < 1e-5 * base else base
        plain = plain_frequencies(base, 2 * pairs)
        return base if self._factor == 1.0 and torch.allclose(rotated, plain, rtol=1e-5) else None

    def tables(self, size: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least the first `size` positions, each `[P, D]`."""
        if size > len(self._cos_PD):
            self._grow(max(size, 2 * len(self._cos_PD), 512))
        return self._cos_PD, self._sin_PD

    def arrays(self, size: int) -> Any:
        """`tables` as numpy arrays."""
        if size > len(self._cos_PD) or self._arrays is None:
            self._arrays = tuple(array(table) for table in self.tables(size))
        return self._arrays

    def _grow(self, size: int) -> None:
        angles = torch.outer(torch.arange(size, dtype=torch.float32), self._frequencies.cpu())
        signs = torch.ones(2 * angles.shape[-1])
        signs[: angles.shape[-1]] = -1.0
        angles = torch.cat((angles, angles), dim=-1)
        self._cos_PD = (angles.cos() * self._factor).to(self._device, self._dtype)
        self._sin_PD = (angles.sin() * self._factor * signs).to(self._device, self._dtype)
        self._arrays = None


def plain_frequencies(base: float, head_dim: int) -> Tensor:
    """Inverse frequencies `[D / 2]` in float32: a power of `base` for each pair."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def apply_rotary(heads_SHD: Tensor, cos_S1D: Tensor, sin_S1D: Tensor) -> Tensor:
    """Rotates each pair (d, d + D/2) of every head by its position's angle; the sines carry the signs."""
    num_rows, num_heads, head_dim = heads_SHD.shape
    swapped = heads_SHD.view(num_rows, num_heads, 2, head_dim // 2).flip(2).view(heads_SHD.shape)
    return torch.addcmul(heads_SHD * cos_S1D, swapped, sin_S1D)
