"""Drafters on disk as folders and files: a config, tensors, and what a result says of where they come from.

Must not know any method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spdbench.backend import DrafterInfo
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.training.recipe import Provenance

VERSION = 1
"""Of our own folders, for methods without a published version to name. A folder that names none is of the first."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a drafter's folder.

    Raises:
        InputError: there is none, or it is no mapping.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder}: is not a drafter folder, it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: is not a mapping")
    return raw


def require_version(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks the version that the config of a folder of ours names.

    Raises:
        InputError: it is not this one.
    """
    found = config.get("version", VERSION)
    if found != VERSION:
        raise InputError(
            f"{folder}/config.json: version {found!r} is not known. Allowed: {VERSION}. A newer spdbench may read it."
        )


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing else.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # both libraries raise types of their own, and torch's message advises what must not be done
        raise InputError(
            f"{file}: cannot be read as weights: it is damaged, or holds more than plain tensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{file}: is not a mapping from names to tensors")
    return {str(name): tensor for name, tensor in content.items()}


def drafter_info(kind: str, name: str, method: str, sha256: str, trained_tokens: int | None) -> DrafterInfo:
    """What a result says of a drafter that was read, or drawn at random where the user's choice is of kind `random`."""
    untrained = kind == "random"
    return DrafterInfo(
        "random" if untrained else name,
        method,
        synthetic=False,
        sha256=sha256 or None,
        trained_tokens=0 if untrained else trained_tokens,
    )


def origin(about: Provenance) -> dict[str, Any]:
    """What a trained drafter's config says of where it comes from."""
    return {
        "model_id": about.model_id,
        "model_sha256": about.model_sha256,
        "data_sha256": about.data_sha256,
        "trained_tokens": about.trained_tokens,
        "seed": about.seed,
        "acceptance_by_position": list(about.acceptance_by_position),
        **about.extra,
    }


def add_origin(folder: Path, about: Provenance) -> None:
    """Says so in a config of a published layout, whose readers pass over keys that they do not know."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **origin(about)}
    file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
