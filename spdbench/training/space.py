"""Memory and disk that a run needs, checked before it starts. Rough estimates, on the safe side."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from spdbench.errors import InputError
from spdbench.models.checkpoints.config import ModelConfig, Sizes
from spdbench.processors import control_groups

MASTER_BYTES = 16
"""Bytes of a trained number, its gradient and two moments. The best weights so far are a fifth float."""
ROW_FLOATS = 100
"""Floats that a step keeps for each element of a token's hidden state, over all rows computed from it."""
SHARE_OF_MEMORY = 0.8
"""Share of the free memory that a run may plan to fill: the rest is for its steps and for other processes."""
SMALLER_TRAINING = "Give a smaller --batch-tokens, --draft-vocab or model."
GB = 1e9


def training_bytes(module: nn.Module, config: ModelConfig, batch_tokens: int) -> int:
    """Bytes that training takes in addition to the target."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained * (MASTER_BYTES + 4) + batch_tokens * config.hidden_size * 4 * ROW_FLOATS


def checkpoint_bytes(module: nn.Module) -> int:
    """Bytes on disk of a checkpoint, its replacement, and the drafter."""
    return 2 * sum(p.numel() for p in module.parameters()) * (MASTER_BYTES + 1)


def teacher_bytes(target_bytes: int, config: Sizes) -> int:
    """Bytes of the frozen target: its weights, and head and embedding once more in float32."""
    tied = isinstance(config, ModelConfig) and config.tied
    return target_bytes + config.vocab_size * config.hidden_size * 4 * (1 if tied else 2)


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; a huge number where it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_system_memory(), _cgroup_memory()]
    return min((size for size in free if size is not None), default=1 << 62)


def require_memory(needed: int, device: torch.device, what: str, remedy: str = SMALLER_TRAINING) -> None:
    """Raises `InputError` where `needed` bytes are more than is free; `remedy` is its last sentence."""
    free = available_bytes(device)
    if needed > free:
        raise InputError(
            f"{what} needs about {needed / GB:.1f} GB of memory on {device}, {free / GB:.1f} GB are free. {remedy}"
        )


def how_many_fit(each: int, most: int, device: torch.device) -> int:
    """How many items of `each` bytes the free memory holds, from 1 to `most`."""
    return max(1, min(most, int(available_bytes(device) * SHARE_OF_MEMORY) // each))


def require_disk(needed: int, folder: Path, what: str) -> None:
    """Raises `InputError` where `needed` bytes are more than is free in `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: {what} needs about {needed / GB:.1f} GB, {free / GB:.1f} GB are free")


def _system_memory() -> int | None:
    """Bytes that the system has available."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup_memory() -> int | None:
    """Bytes that the memory limits of our control groups, as containers have them, leave free."""
    free = (_left_in(folder) for folder in control_groups("memory"))
    return min((each for each in free if each is not None), default=None)


def _left_in(folder: Path) -> int | None:
    """Bytes that one group's limit leaves, its file cache not counted as used; None without a limit."""
    for limit, usage, cache in (("max", "current", "file"), ("limit_in_bytes", "usage_in_bytes", "total_cache")):
        try:
            most, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            return most - used + int(stat.get(cache, 0))
        except (OSError, ValueError):  # no limit reads "max"
            continue
    return None
