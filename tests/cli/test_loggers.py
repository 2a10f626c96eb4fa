"""`run --log NAME`: finished results go to an experiment tracker, which cannot spoil them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdbench.cli.run import loggers
from tests.cli.run_helpers import Said, spdbench, write_suite


class Tracker:
    """What MLflow and W&B have in common: runs with parameters, metrics and files, kept here in a list."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    @contextmanager
    def begin(self, name: str, config: dict[str, str] | None = None) -> Iterator[Any]:
        self.runs.append({"name": name, "params": config or {}, "metrics": {}, "files": []})
        yield SimpleNamespace(log=self.metrics, log_artifact=lambda artifact: self.file(artifact.file))

    def params(self, found: dict[str, str]) -> None:
        self.runs[-1]["params"] = found

    def metrics(self, found: dict[str, float]) -> None:
        self.runs[-1]["metrics"] = found

    def file(self, path: str) -> None:
        self.runs[-1]["files"].append(path)

    def as_mlflow(self) -> Any:
        return SimpleNamespace(
            start_run=lambda run_name, nested: self.begin(run_name) if nested else None,
            log_params=self.params,
            log_metrics=self.metrics,
            log_artifact=self.file,
        )

    def as_wandb(self) -> Any:
        class Artifact:
            file: str

            def __init__(self, name: str, type: str) -> None:
                assert (set(name) & set(" /"), type) == (set(), "result")

            def add_file(self, path: str) -> None:
                self.file = path

        return SimpleNamespace(init=lambda name, config, **_: self.begin(name, config), Artifact=Artifact)


@pytest.fixture
def measure(own_cache: Path, tiny_model: Path, tmp_path: Path) -> Any:
    assert own_cache

    def run(*words: str) -> Said:
        common = ("-m", tiny_model, "--dtype", "float32", "--threads", "1", "--results", tmp_path / "results")
        return spdbench("run", write_suite(tmp_path), *common, "-b", "vanilla", "-b", "ngram", *words)

    return run


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_each_label_becomes_a_run_of_the_tracker(
    name: str, measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker.as_mlflow() if name == "mlflow" else tracker.as_wandb())
    said = measure("--log", name)
    assert said.code == 0, said.err
    assert f"Logged 2 results to {name}." in said.err
    assert [run["name"] for run in tracker.runs] == ["mini vanilla", "mini ngram"]
    for run, label in zip(tracker.runs, ("vanilla", "ngram"), strict=True):
        [file] = run["files"]
        summary = json.loads(Path(file).read_text("utf-8"))["summary"]["overall"]
        assert Path(file).parent == tmp_path / "results"
        assert (run["params"]["label"], run["params"]["suite"]) == (label, "mini")
        assert run["metrics"]["decode_tokens_per_s"] == summary["decode_tokens_per_s"]
        assert all(isinstance(value, float) for value in run["metrics"].values())
        assert all(isinstance(value, str) for value in run["params"].values())
    assert tracker.runs[1]["metrics"]["speedup"] > 0


def test_a_tracker_that_fails_leaves_a_note_and_the_results(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("no route to the tracker\nwith details")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(start_run=fail))
    said = measure("--log", "mlflow", "--quiet")
    assert said.code == 0
    assert "NOTE: --log mlflow: failed (ConnectionError: no route to the tracker); the result files are" in said.err
    assert len(list((tmp_path / "results").glob("*.json"))) == 2


def test_what_a_tracker_lacks_is_said_before_anything_is_measured(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = measure("--log", "wandb")
    assert said.code == 2
    assert "--log wandb: cannot be imported" in said.err
    assert "pip install 'wandb>=" in said.err
    said = measure("--log", "mlflw")
    assert said.code == 2
    assert "unknown logger 'mlflw'; did you mean 'mlflow'?" in said.err
    assert not (tmp_path / "results").exists()


class Own:
    """A tracker of another package."""

    seen: list[loggers.Logged] = []  # noqa: RUF012 - a test's own

    def log(self, result: loggers.Logged) -> None:
        self.seen.append(result)


def test_another_package_can_offer_a_tracker(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("own", f"{__name__}:Own", loggers.GROUP)
    monkeypatch.setattr(loggers, "installed", lambda _: {"own": point})
    assert measure("--log", "own").code == 0
    assert [result.params["label"] for result in Own.seen] == ["vanilla", "ngram"]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself_keeps_what_it_is_given(measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    said = measure("--log", "mlflow")
    assert "Logged 2 results to mlflow." in said.err, said.err
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert {run.info.run_name for run in runs} == {"mini vanilla", "mini ngram"}
    for run in runs:
        assert run.data.metrics["decode_tokens_per_s"] > 0
        assert client.list_artifacts(run.info.run_id)[0].path.endswith(".json")
