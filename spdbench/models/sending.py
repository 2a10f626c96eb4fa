"""A few numbers from the host to where a model is, without waiting for it. Must not know what they are for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`numbers` as int64 on `device`. A copy out of ordinary memory would wait until a GPU had done all its work."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.long, device=device)
    return torch.tensor(numbers, dtype=torch.long, pin_memory=True).to(device, non_blocking=True)
