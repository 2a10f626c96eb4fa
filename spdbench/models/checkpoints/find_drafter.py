"""Finds a trained drafter for a model: `--drafter auto`. Reads only `config.json`; must not know any method's tensors.

A drafter is a folder whose `config.json` names `method`, `model_sha256` and, for pipelines, `num_stages`. Searched in
this order: `$SPDBENCH_DRAFTERS`, the user's data folder, those that ship with spdbench.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from spdbench.errors import InputError
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench.models.checkpoints.folders import data_folder


def drafter_folders() -> list[Path]:
    """The folders that are searched, first to last; they need not exist."""
    own = os.environ.get("SPDBENCH_DRAFTERS")
    shipped = Path(__file__).parents[2] / "drafters"
    return [*([Path(own)] if own else []), data_folder() / "drafters", shipped]


def find_drafter(model: ModelFiles, method: str, stages: int | None) -> Path:
    """The first drafter trained for these weights and this method; any number of stages if `stages` is None.

    Raises:
        InputError: there is none; names what was looked for and where.
    """
    for folder in drafter_folders():
        for path in sorted(folder.glob("*/config.json")):
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if (
                not isinstance(config, dict)
                or config.get("method") != method
                or config.get("model_sha256") != model.sha256
            ):
                continue
            if stages is None or config.get("num_stages") == stages:
                return path.parent
    cut = f" with {stages} stages" if stages else ""
    raise InputError(
        f"--drafter auto: no trained {method} drafter{cut} for {model.id} is installed (looked in $SPDBENCH_DRAFTERS, "
        f"the user's data folder and spdbench itself). Train one (`spdbench train {method} --help`), give one with "
        "--drafter PATH, or an artificial one: --drafter oracle:0.8, or --drafter random."
    )
