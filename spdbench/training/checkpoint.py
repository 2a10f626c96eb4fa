"""A run's whole state on disk, so that a killed one goes on as if nothing had been. Knows files, no method.

One file, replaced in one piece: a kill while it is written leaves the one before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spdbench.errors import InputError

NAME = "checkpoint.pt"
ASIDE = NAME + ".old"
"""An unfinished run's, once a new one has begun in its folder."""
PART = NAME + ".part"

Generators = Mapping[str, Tensor | None]
"""Where torch's generators stand, by the names that they have in a checkpoint."""


@dataclass
class State:
    """Where a run stands. `epoch` and `batch` are the place in the data, `log_size` in the log, in bytes; `held_out`
    is what acceptance is measured on, `evaluated` the step at which it last was, `evaluations` how many of those that
    are planned are over; `step_s` and `evaluation_s` are what the last ones took."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    elapsed_s: float = 0.0
    step_s: float = 0.0
    evaluation_s: float = 0.0
    trained_tokens: int = 0
    evaluations: int = 1
    evaluated: int = -1
    log_size: int = 0
    held_out: list[int] = field(default_factory=list)
    best_score: float = -1.0
    best_rates: tuple[float, ...] = ()
    best_tokens: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def generators(device: torch.device) -> Generators:
    """Those that a run on `device` draws from, as they stand now."""
    return {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def save(
    folder: Path,
    identity: Mapping[str, Any],
    state: State,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    drawn: Generators,
) -> None:
    """Writes the checkpoint of a run; `drawn` are the generators as they were when the rest was."""
    part = folder / PART
    with part.open("wb") as file:
        torch.save(
            {
                "identity": dict(identity),
                "state": {**vars(state)},
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                **drawn,
            },
            file,
        )
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / NAME)


def restore(
    folder: Path, identity: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer
) -> State | None:
    """Fills module, optimiser and torch's generators from the checkpoint; None where there is none.

    Raises:
        InputError: it is damaged, of a run with other settings, or another version's.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["identity"]
    except Exception:  # torch raises many types
        raise InputError(f"{path}: cannot be read as a checkpoint; remove it to begin anew") from None
    require_same(found, identity, path)
    try:
        state = State(**content["state"])
        module.load_state_dict(content["module"])
    except (KeyError, TypeError, RuntimeError):  # fields or tensors that are not ours
        raise InputError(
            f"--resume: {path} was written by another version of spdbench. Run without --resume to begin anew."
        ) from None
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["rng"])
    if content["cuda_rng"] is not None:
        torch.cuda.set_rng_state(content["cuda_rng"], next(module.parameters()).device)
    return state


def require_same(found: Mapping[str, Any], identity: Mapping[str, Any], where: Path) -> None:
    """Raises `InputError` where the run that `where` belongs to had other settings; names the first that differs."""
    for key, value in identity.items():
        if found.get(key) != value:
            raise InputError(
                f"--resume: {where} is of a run with other settings: {key} {found.get(key)}, now {value}. "
                "Run without --resume to begin anew."
            )


def set_aside(folder: Path) -> bool:
    """Puts an unfinished run's checkpoint out of the way of a new run; True if there was one."""
    if not (folder / NAME).exists():
        return False
    (folder / NAME).replace(folder / ASIDE)
    return True


def remove(folder: Path) -> None:
    """Removes what checkpoints leave in the folder of a run that has ended."""
    for name in (NAME, ASIDE, PART):
        (folder / name).unlink(missing_ok=True)
