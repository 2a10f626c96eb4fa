"""The shipped drafters: found by `--drafter auto`, complete, small, and better than chance on their model's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.results.schema import Result, read_result
from spdbench.models.checkpoints.folders import cache_folder, drafter_folders

SHIPPED = Path(__file__).parents[2] / "spdbench" / "drafters"
LOGS = Path(__file__).parents[2] / "results" / "training" / "third"
FORMER_LOGS = LOGS.with_name("second")
FOLDERS = sorted(path.parent for path in SHIPPED.glob("*/config.json"))
MAX_BYTES = 45_000_000
LABELS = ("vanilla", "eagle", "medusa", "spd", "spd-5", "ppsd")


def log_of(folder: Path, logs: Path = LOGS) -> list[dict[str, Any]]:
    text = (logs / f"{folder.name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def best_tokens(log: list[dict[str, Any]]) -> int:
    """How many tokens the best weights of a training have learned from, those before it included."""
    place = max(place for place, line in enumerate(log) if line.get("best"))
    return sum(line.get("tokens", line.get("learned_before", 0)) for line in log[:place])


def test_all_are_present_and_small() -> None:
    assert drafter_folders()[-1] == SHIPPED
    assert [folder.name for folder in FOLDERS] == ["eagle3", "medusa", "ppsd-3", "spd"]
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_names_its_model_data_and_training(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    first, *steps = log_of(folder)
    assert config["model_sha256"] == first["model_sha256"]
    assert config["data_sha256"] == first["data_sha256"]
    assert config["version"] == {"spd": 11}.get(config["method"], 1)
    assert config["trained_tokens"] == best_tokens([first, *steps])
    best = [step["acceptance"] for step in steps if step.get("best")][-1]
    assert config["acceptance_by_position"] == pytest.approx(best)


def test_all_were_trained_on_the_same_data_for_as_many_tokens() -> None:
    logs = [log_of(folder) for folder in FOLDERS]
    settings = [log[0] for log in logs]
    same = ("model_sha256", "data_sha256", "conversations", "epochs", "lr", "batch_tokens", "seed")
    assert all(each[key] == settings[0][key] for each in settings for key in same)
    former = [best_tokens(log_of(folder, FORMER_LOGS)) for folder in FOLDERS]
    assert [each["learned_before"] for each in settings] == former  # they go on from the best weights of the run before
    assert len({sum(line.get("tokens", 0) for line in log[1:]) for log in logs}) == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    if not list((cache_folder() / "models").glob("SmolLM2*")):
        pytest.skip("the embedded model is not in the cache: run `python -m spdbench.models`")
    folder = tmp_path_factory.mktemp("shipped")
    words = [word for label in LABELS for word in ("-b", "spd-5=spd" if label == "spd-5" else label)]
    words += ["-o", "spd-5.stages=5", "-o", "spd-5.executor=inline"]
    more = ["--limit", "3", "--max-new-tokens", "32", "--results", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "spdbench", "run", "quick", *words, *more],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {label: read_result(folder / f"quick__{label}__smollm2.json") for label in LABELS}


@pytest.mark.embedded
@pytest.mark.parametrize("label", LABELS[1:])
def test_auto_finds_it_and_its_drafts_are_accepted(results: dict[str, Result], label: str) -> None:
    result = results[label]
    assert result.drafter is not None
    assert not result.drafter.synthetic
    assert result.divergence is not None
    assert result.divergence.identical == len(results["vanilla"].runs)
    judged, accepted = (
        sum(sum(column) for column in columns)
        for columns in zip(*((run.steps.judged, run.steps.accepted) for run in result.runs), strict=True)
    )
    assert accepted > judged / 8
