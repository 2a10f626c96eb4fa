"""`run --log NAME`: finished results go to an experiment tracker as well.

Trackers are classes under the entry point group `spdbench.loggers`, for ours and those of other packages alike. Where
results go, and to which project or experiment, is said by the tracker's own settings: `MLFLOW_TRACKING_URI`,
`WANDB_PROJECT` and the like.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from spdbench.console import say
from spdbench.errors import InputError, brief, install_command
from spdbench.judge.comparison.compare import Table
from spdbench.plugins import find_class, installed
from spdbench.render.export import comparison_records

GROUP = "spdbench.loggers"
MAX_PARAM = 500
"""Characters of a parameter that MLflow has always taken."""


class Logged(NamedTuple):
    """One label's result: its `name`, what it was made with (`params`), its numbers, and the result file."""

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    file: Path


class RunLogger(Protocol):
    """A tracker. Made without arguments before anything is measured, so that what it lacks is said at once."""

    def log(self, result: Logged) -> None:
        """Records one result as a run of its own; may raise anything."""


class MLflow:
    """An MLflow run for each label."""

    def __init__(self) -> None:
        self._mlflow = _module("mlflow")

    def log(self, result: Logged) -> None:
        with self._mlflow.start_run(run_name=result.name, nested=True):
            self._mlflow.log_params({name: text[:MAX_PARAM] for name, text in result.params.items()})
            self._mlflow.log_metrics(dict(result.metrics))
            self._mlflow.log_artifact(str(result.file))


class WeightsAndBiases:
    """A W&B run for each label."""

    def __init__(self) -> None:
        self._wandb = _module("wandb")

    def log(self, result: Logged) -> None:
        with self._wandb.init(name=result.name, config=dict(result.params), job_type="spdbench") as run:
            run.log(dict(result.metrics))
            artifact = self._wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", result.file.stem), type="result")
            artifact.add_file(str(result.file))
            run.log_artifact(artifact)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--log {name}: cannot be imported ({error}): {install_command(f'spdbench[{name}]')}"
        ) from None


def find_loggers(names: Sequence[str]) -> dict[str, RunLogger]:
    """The trackers called `names`, ready.

    Raises:
        InputError: one is not known, or its package is missing.
    """
    points = installed(GROUP)
    return {name: find_class("logger", name, points)() for name in names}


def log_results(loggers: Mapping[str, RunLogger], tables: Sequence[Table]) -> None:
    """Gives each row of `tables` to each of the `loggers`. One that fails is a note on stderr: results are in files."""
    results = [_logged(record) for record in comparison_records(tables) if record["category"] is None]
    for name, logger in loggers.items():
        try:
            for result in results:
                logger.log(result)
        except Exception as error:  # a tracker may fail in any way, and must not spoil a finished run
            say(f"NOTE: --log {name}: failed ({brief(error)}); the result files are complete.", error=True)
        else:
            say(f"Logged {len(results)} results to {name}.")


def _logged(record: Mapping[str, Any]) -> Logged:
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    params = {name: str(value) for name, value in record.items() if value is not None and name not in numbers}
    return Logged(f"{record['suite']} {record['label']}", params, numbers, Path(record["file"]))
