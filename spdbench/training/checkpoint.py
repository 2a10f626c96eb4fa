"""The whole state of a training run on disk, from which a killed run continues to the same numbers.

One file, replaced in one piece: a kill while it is written leaves the previous one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor, nn

from spdbench.append_log import require_same_settings
from spdbench.errors import InputError
from spdbench.output_files import replaced_file
from spdbench.training.log import RESTART

NAME = "checkpoint.pt"
ASIDE = NAME + ".old"
"""The checkpoint of an unfinished run, after a new run began in its folder."""
PART = NAME + ".part"

Generators = Mapping[str, Tensor | None]
"""States of torch's random generators, by their names in a checkpoint."""


Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class State:
    """The progress of a run. `epoch` and `batch` are the position in the data, `log_size` the one in the log, in bytes;
    acceptance is measured on the sequences `held_out`, last at step `evaluated`; `evaluations` counts the planned ones
    that are done; `step_s` and `evaluation_s` are what the last step and evaluation took."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    step: Count = 0
    epoch: Count = 0
    batch: Count = 0
    elapsed_s: Seconds = 0.0
    step_s: Seconds = 0.0
    evaluation_s: Seconds = 0.0
    trained_tokens: Count = 0
    evaluations: Count = 1
    evaluated: int = -1
    log_size: Count = 0
    held_out: list[int] = field(default_factory=list)
    best_score: float = -1.0
    best_rates: tuple[float, ...] = ()
    best_tokens: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def generators(device: torch.device) -> Generators:
    """The current states of the generators that a run on `device` draws from."""
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
    """Writes the checkpoint of a run; `drawn` are the generators' states at the same moment as `state`."""
    with replaced_file(folder / NAME) as file:
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


def restore(
    folder: Path, identity: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer
) -> State | None:
    """Fills module, optimiser and torch's generators from the checkpoint; None where there is none.

    Raises:
        InputError: it is damaged, or was written by a run with other settings or by another version.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(content["identity"])
    except Exception:  # torch raises many types
        raise InputError(f"{path}: cannot be read as a checkpoint; remove it to begin anew") from None
    require_same_settings(f"--resume: {path}", found, identity, RESTART)
    try:
        state = TypeAdapter(State).validate_python(content["state"])
        module.load_state_dict(state.best_weights)  # which it does again, and for good, at the end of the run
        module.load_state_dict(content["module"])
        _restore_optimizer(optimizer, content["optimizer"]["state"])
        torch.set_rng_state(content["rng"])
        if content["cuda_rng"] is not None:
            torch.cuda.set_rng_state(content["cuda_rng"], next(module.parameters()).device)
    except Exception:  # fields or tensors of another version, or of anyone's making: torch raises many types
        raise InputError(
            f"--resume: {path} is damaged, or was written by another version of spdbench. {RESTART}"
        ) from None
    return state


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Fills in the moments of each parameter; the settings are those of this run.

    Raises:
        ValueError: a moment has another shape than its parameter.
    """
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for parameter, moments in optimizer.state.items():
        if any(moment.dim() and moment.shape != parameter.shape for moment in moments.values()):
            raise ValueError("a moment of another shape")


def set_aside(folder: Path) -> bool:
    """Renames an unfinished run's checkpoint before a new run begins; True if there was one."""
    if not (folder / NAME).exists():
        return False
    (folder / NAME).replace(folder / ASIDE)
    return True


def remove(folder: Path) -> None:
    """Removes all checkpoint files from the folder of a finished run."""
    for name in (NAME, ASIDE, PART):
        (folder / name).unlink(missing_ok=True)
