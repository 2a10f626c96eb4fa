"""The attention context of new rows: their positions, the slots that they see, and their rotary angles. Computed once a
forward pass, on demand, for all layers.

Shapes: S new rows, T slots, D head size, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdbench.models.rotary import Rotary


@dataclass(frozen=True)
class TreeRows:
    """New rows that belong to a tree.

    `depths_S` says how many positions each row is behind the first slot of the tree. `visible_SW` says which of the
    last W slots it sees, its own at least: W = S where the whole tree is new, more where older slots belong to it as
    well. Every slot before those is visible to all rows.
    """

    depths_S: Tensor
    visible_SW: Tensor


NO_TREE = np.zeros((0, 0), dtype=np.bool_)


@dataclass(frozen=True)
class AttentionContext:
    """`num_rows` rows, the first at position `start`; a chain unless `tree` says otherwise, whose depths count from
    there."""

    rotary: Rotary
    start: int
    num_rows: int
    tree: TreeRows | None = None
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    @cached_property
    def depths(self) -> Any:
        """How many positions each row is behind the first: `[S]`."""
        return np.arange(self.num_rows) if self.tree is None else np.ascontiguousarray(self.tree.depths_S.numpy())

    @cached_property
    def slot(self) -> Any:
        """Where a kernel that runs later reads which slot is the first new one: `[1]`."""
        return np.zeros(1, np.int64)

    @cached_property
    def positions(self) -> Any:
        """`[S]`."""
        return self.depths + self.start

    @cached_property
    def visible(self) -> Any:
        """Which of the last W slots the rows see, `[S, W]`; empty for a chain."""
        return NO_TREE if self.tree is None else np.ascontiguousarray(self.tree.visible_SW.numpy())

    @cached_property
    def angles(self) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the rows, each `[S, 1, D]`."""
        cos_PD, sin_PD = self.rotary.tables(self._end)
        if self.tree is None:
            rows = slice(self.start, self.start + self.num_rows)
            return cos_PD[rows, None], sin_PD[rows, None]
        positions_S = self.tree.depths_S.to(cos_PD.device) + self.start
        return cos_PD[positions_S][:, None], sin_PD[positions_S][:, None]

    @cached_property
    def angle_arrays(self) -> Any:
        """cos and signed sin of all positions so far, as numpy arrays."""
        return self.rotary.arrays(self._end)

    @property
    def _end(self) -> int:
        """More than the greatest position. Does not read the tree's depths, which may be on a device: a tree is no
        deeper than it is wide."""
        return self.start + (self.num_rows if self.tree is None else self.tree.visible_SW.shape[1])

    def mask(self, num_slots: int, window: int | None, device: torch.device) -> Tensor | None:
        """`[S, T]`, true where a row may look, the rows being in the last S slots; None where plain causality is
        enough."""
        key = (num_slots, window)
        if key not in self._masks:
            self._masks[key] = self._new_mask(num_slots, window, device)
        return self._masks[key]

    def _new_mask(self, num_slots: int, window: int | None, device: torch.device) -> Tensor | None:
        if self.tree is None:
            if self.num_rows == 1 or (self.num_rows == num_slots and (window is None or window >= num_slots)):
                return None
            depths_S = torch.arange(self.num_rows, device=device)
            visible_SW = depths_S <= depths_S[:, None]
            if window is not None:
                visible_SW &= depths_S > depths_S[:, None] - window
        else:
            depths_S, visible_SW = self.tree.depths_S, self.tree.visible_SW
        before = num_slots - visible_SW.shape[1]
        mask = torch.ones(self.num_rows, num_slots, dtype=torch.bool, device=visible_SW.device)
        if window is not None:  # of the slots before the rows' own, those that are near enough to a row's position
            first = before + depths_S[:, None] + 1 - window
            mask &= torch.arange(num_slots, device=mask.device) >= first.clamp(max=before)
        mask[:, before:] = visible_SW
        return mask.to(device)
