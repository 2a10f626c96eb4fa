"""Which of the installed drafters `--drafter auto` takes for a pipeline, by their configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench_backends.drafter_files import folder
from spdbench_backends.drafter_files.folder import find_drafter
from tests import tiny

ANY, THREE, UNEVEN = (
    {"num_stages": 2, "stage_counts": [2, 3]},
    {"num_stages": 3},
    {"num_stages": 3, "stage_layers": [1, 2, 3]},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny.load(tiny.make_model(tmp_path_factory.mktemp("model"))).files


def installed(
    root: Path, model: ModelFiles, monkeypatch: pytest.MonkeyPatch, folders: Sequence[dict[str, dict[str, Any]]]
) -> None:
    """Folders of drafters, each by name, in the order in which they are looked through."""
    paths = [root / str(number) for number in range(len(folders))]
    for path, drafters in zip(paths, folders, strict=True):
        for name, config in drafters.items():
            (path / name).mkdir(parents=True)
            text = json.dumps({"method": "spd", "model_sha256": model.sha256, **config})
            (path / name / "config.json").write_text(text)
    monkeypatch.setattr(folder, "drafter_folders", lambda: paths)


@pytest.mark.parametrize(
    ("stages", "cut", "expected"),
    [
        (None, None, "a-any"),
        (3, None, "three"),
        (2, None, "a-any"),  # which names 2 as the number it drafts for by default
        (6, None, "a-any"),
        (3, (1, 2, 3), "uneven"),
        (3, (1, 4, 1), "a-any"),
        (3, (), "a-any"),  # a cut that is not known yet
    ],
)
def test_a_drafter_for_the_very_cut_comes_before_one_for_any(
    tmp_path: Path,
    model: ModelFiles,
    monkeypatch: pytest.MonkeyPatch,
    stages: int | None,
    cut: tuple[int, ...] | None,
    expected: str,
) -> None:
    installed(tmp_path, model, monkeypatch, [{"a-any": ANY, "three": THREE, "uneven": UNEVEN}])
    assert find_drafter(model, "spd", stages, cut).name == expected


def test_one_for_any_cut_in_a_later_folder_comes_before_one_for_another_cut(
    tmp_path: Path, model: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, model, monkeypatch, [{"mine": UNEVEN}, {"shipped": ANY}])
    assert find_drafter(model, "spd", 3, (1, 2, 3)).name == "mine"
    assert find_drafter(model, "spd", 3).name == "shipped"
    installed(tmp_path / "alone", model, monkeypatch, [{"mine": UNEVEN}])
    assert find_drafter(model, "spd", 3).name == "mine"  # whose load says what it was trained for
    with pytest.raises(InputError, match="no trained spd drafter with 2 stages"):
        find_drafter(model, "spd", 2)


@pytest.mark.parametrize("counts", [[], [0], ["2"], "2", 3, {}])
def test_counts_of_stages_that_are_none_make_no_drafter_for_any(
    tmp_path: Path, model: ModelFiles, monkeypatch: pytest.MonkeyPatch, counts: object
) -> None:
    installed(tmp_path, model, monkeypatch, [{"odd": {"num_stages": 2, "stage_counts": counts}}, {"good": ANY}])
    assert find_drafter(model, "spd", 5).name == "good"
