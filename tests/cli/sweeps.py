"""A sweep of the tiny model, written and run by tests of sweeps here and on other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.cli.run_helpers import Said, spdbench, write_suite

EXAMPLE = Path(__file__).parents[2] / "examples" / "spd-stages.yaml"


def tiny_sweep(model: Path, folder: Path) -> dict[str, Any]:
    """A sweep of four points on the tiny model."""
    suite = write_suite(folder, num_prompts=2, decoding={"max_new_tokens": 8})
    return {
        "name": "tiny",
        "fixed": {
            "suite": str(suite),
            "model": str(model),
            "dtype": "float32",
            "threads": 1,
            "backends": ["vanilla", "spd"],
            "options": {"spd.executor": "inline"},
        },
        "grid": {"options.spd.stages": [2, 3], "drafters": ["oracle:0.5", "oracle:0.9"]},
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, content: object, *words: str | Path) -> Said:
    return spdbench("sweep", write(folder, content), "--results", folder / "out", *words)


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("mini__*.json"))
