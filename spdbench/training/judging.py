"""How good a recipe's drafts are as it stands, and in which numbers that and its loss are computed.

Must not know any method, nor how steps are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from spdbench.training.features import Features
from spdbench.training.recipe import Counts, Recipe


def judge(recipe: Recipe, features: Features, batches: Iterable[Sequence[int]], device: torch.device) -> Counts:
    """Acceptance on some sequences. Takes nothing from the generators; interrupted, it leaves no trace in the module,
    which may keep counts of its own."""
    before = {name: buffer.clone() for name, buffer in recipe.module.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    counts = Counts()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), fast_numbers(device):
            for indices in batches:
                counts += recipe.acceptance(features.batch(indices))
    except KeyboardInterrupt:
        for name, buffer in recipe.module.named_buffers():
            buffer.copy_(before[name])
        raise
    return counts


def fast_numbers(device: torch.device) -> Any:
    """A context in which products are in bfloat16, where the machine has them and they are faster than in float32."""
    return torch.autocast(device.type, torch.bfloat16) if _has_half_precision(device) else nullcontext()


def _has_half_precision(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())
