"""`spdbench results`: what lies in a folder of results, and its deletion."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.builders import make_backend, make_result, make_run, write_result
from tests.cli.run_helpers import Said, spdbench

EVIL = "\x1b[31m\u202e[bold]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three results, a file that is none, and a journal."""
    where = tmp_path / "results"
    where.mkdir()
    for name, label, created in (
        ("old", "vanilla", "2025-12-31T23:30:00-01:00"),  # in UTC it is the new year
        ("new", "mine", "2026-03-01T10:00:00+00:00"),
        ("evil", EVIL, EVIL),
    ):
        result = make_result([make_run()], make_backend(label=label), suite=f"suite-{name}")
        write_result(result.model_copy(update={"created": created}), where / f"{name}.json")
    (where / "broken.json").write_text("{")
    (where / "old.journal.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return where


def listed(*words: str) -> list[str]:
    """The names of the files that are listed, the oldest first."""
    said = spdbench("results", *words, "--json")
    assert said.code == 0, said.err
    return [Path(each["file"]).stem for each in json.loads(said.out)] if said.out else []


def test_all_results_of_the_folder_are_listed_the_unreadable_ones_too(folder: Path) -> None:
    said = spdbench("results")
    assert (said.code, said.err) == (0, "")
    assert listed() == ["broken", "evil", "old", "new"]
    [old] = [line for line in said.out.splitlines() if line.endswith(" old.json")]
    assert said.out.startswith("results:\n")
    assert old.split()[:4] == ["2026-01-01", "00:30", "suite-old", "vanilla"]
    assert "results/broken.json: is not JSON" in said.out
    assert "old.journal.jsonl" not in said.out
    assert listed(str(folder / "new.json")) == ["new"]


def test_texts_of_files_command_nothing(folder: Path) -> None:
    assert folder.exists()
    shown = spdbench("results").out
    assert "\\x1b[31m\\u202e[bold]" in shown
    assert not {"\x1b", "\u202e"} & set(shown)


def test_what_is_not_there_is_an_error_and_no_line_of_the_list(folder: Path) -> None:
    for name in ("absent.json", "absent", "a" * 5000):
        said = spdbench("results", folder / name)
        assert (said.code, said.out) == (2, "")
        assert said.err.endswith("no such file or folder\n") or "(5," in said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--suite", "suite-new"), {"new"}),
        (("--suite", "suite-*"), {"new", "old", "evil"}),
        (("--backend", "mine"), {"new"}),
        (("--backend", "vanilla"), {"new", "old", "evil"}),  # the backend of all; one is labelled so as well
        (("--model", "nothing"), set()),
        (("--since", "2026-01-01"), {"new", "old"}),
        (("--before", "2026-01-01"), set()),
        (("--before", "2026-01-02"), {"old"}),
        (("--since", "2026-01-01", "--before", "2026-02-01"), {"old"}),
        (("--since", "2026-03-01T10:01"), set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_filters_let_pass_what_they_name(words: tuple[str, ...], expected: set[str], folder: Path) -> None:
    assert folder.exists()
    assert set(listed(*words)) == expected


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_nothing_is_deleted_unasked(folder: Path) -> None:
    before = files(folder)
    said = spdbench("results", "--delete")
    assert said.code == 2
    assert "add --yes" in said.err
    assert files(folder) == before


def test_where_no_result_fits_it_says_of_how_many(folder: Path) -> None:
    assert spdbench("results", folder / "new.json", "--suite", "other").err == "No result fits, of 1 file.\n"


def answered(word: str, monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: word)
    return spdbench("results", "--backend", "mine", "--delete")


def test_the_question_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(folder)
    assert answered("n", monkeypatch).err.endswith("Nothing is deleted.\n")
    assert files(folder) == before
    said = answered("y", monkeypatch)
    assert (said.code, said.err.splitlines()[-1]) == (0, "Deleted 1 file.")
    assert before - files(folder) == {"new.json"}


def test_with_yes_results_go_and_nothing_else(folder: Path) -> None:
    said = spdbench("results", "--delete", "--yes")
    assert said.code == 0, said.err
    assert files(folder) == {"broken.json", "old.journal.jsonl"}
    assert spdbench("results", "--delete", "--yes").code == 2  # what is left is none that can be read


@pytest.mark.parametrize("words", [("--yes",), ("--delete", "--json"), ("--since", "soon")], ids=" ".join)
def test_what_makes_no_sense_is_usage(words: tuple[str, ...], folder: Path) -> None:
    before = files(folder)
    assert spdbench("results", *words).code == 2
    assert files(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no permissions there")
def test_a_file_that_cannot_be_deleted_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    said = spdbench("results", "--backend", "mine", "--delete", "--yes")
    assert said.code == 2
    assert "new.json: cannot be deleted (Permission denied)" in said.err
    assert "new.json" in files(folder)
