"""A few numbers from the host to where a model is, without waiting for it. Must not know what they are for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """`numbers` on `device`. A copy out of ordinary memory would wait until a GPU had done all its work."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
