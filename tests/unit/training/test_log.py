"""When a folder holds the end of a run: only what its log says counts, whatever drafter lies there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.training.log import is_finished, mark_finished

IDENTITY: dict[str, Any] = {"schema": "spdbench.train/1", "lr": 0.1}
BEGUN = json.dumps(IDENTITY) + '\n{"step": 1, "loss": 2.0}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a drafter, of whichever run, and the log of one that has begun."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text(BEGUN)
    return tmp_path


def test_a_run_is_finished_when_its_log_says_so(folder: Path) -> None:
    assert not is_finished(folder, IDENTITY, "spdbench")
    mark_finished(folder, "spdbench")
    assert (folder / "train.jsonl").read_text().startswith(BEGUN)
    assert is_finished(folder, IDENTITY, "spdbench")
    (folder / "config.json").unlink()
    assert not is_finished(folder, IDENTITY, "spdbench")


@pytest.mark.parametrize("log", ["", '{"schema": "spd', BEGUN + '{"finished": tr', "[]\n"])
def test_a_log_that_a_kill_cut_is_of_no_finished_run(folder: Path, log: str) -> None:
    (folder / "train.jsonl").write_text(log)
    assert not is_finished(folder, IDENTITY, "spdbench")


def test_another_run_is_told_by_the_first_setting_that_differs(folder: Path) -> None:
    mark_finished(folder, "spdbench")
    with pytest.raises(InputError, match=r"other settings: lr 0\.1, now 0\.2\. Run without --resume"):
        is_finished(folder, {**IDENTITY, "lr": 0.2}, "spdbench")
    with pytest.raises(InputError, match="other settings: format spdbench, now vllm"):
        is_finished(folder, IDENTITY, "vllm")


def test_a_drafter_without_a_log_is_of_no_run(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"no train\.jsonl of a run that could be resumed; choose another --out"):
        is_finished(folder, IDENTITY, "spdbench")
    (folder / "config.json").unlink()
    assert not is_finished(folder, IDENTITY, "spdbench")
