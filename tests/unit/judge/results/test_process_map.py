"""Work shared out over processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spdbench.errors import InputError
from spdbench.judge import loaded
from spdbench.judge.loaded import FILES_AT_ONCE, share_out

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{number:03}" for number in range(5 * FILES_AT_ONCE)]
    for file in made:
        file.write_text(file.name)
    return made


@pytest.fixture
def _two_cores_for_any_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def name_and_process(file: Path) -> tuple[str, int]:
    return file.read_text(), os.getpid()


def refuse_from_12_on(file: Path) -> None:
    if file.name >= "012":
        raise InputError(f"{file.name} is no good")


def test_little_work_stays_in_this_process(files: list[Path]) -> None:
    assert {process for _, process in share_out(name_and_process, files)} == {os.getpid()}


@pytest.mark.usefixtures("_two_cores_for_any_amount")
def test_much_work_is_shared_out_and_comes_back_in_order(files: list[Path]) -> None:
    done = share_out(name_and_process, files)
    assert [name for name, _ in done] == [file.name for file in files]
    assert os.getpid() not in {process for _, process in done}


@pytest.mark.usefixtures("_two_cores_for_any_amount")
def test_the_first_files_error_is_the_one_that_is_told(files: list[Path]) -> None:
    with pytest.raises(InputError, match=r"^012 is no good$"):
        share_out(refuse_from_12_on, files)


def test_a_file_that_is_not_there_is_left_to_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        share_out(name_and_process, [tmp_path / "nowhere"])


def test_a_file_that_is_named_twice_is_worked_on_once(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")
    assert share_out(lambda path: path, [file, tmp_path / ".." / tmp_path.name / "a.json", file]) == [file]
