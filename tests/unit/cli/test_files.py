"""Text written to files that an option names."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.cli.files import result_paths, write_file
from spdbench.errors import InputError


def test_names_of_files_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    name = b"r\xe9sultat.json".decode("utf-8", "surrogateescape")
    write_file("--summary", tmp_path / "out.md", f"é, {name}\n")
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == "é, r\\udce9sultat.json\n"


def test_a_file_itself_may_have_such_a_name(tmp_path: Path) -> None:
    path = tmp_path / b"r\xe9sultat.json".decode("utf-8", "surrogateescape")
    write_file("--json", path, "{}")
    assert path.read_text() == "{}"


def test_what_cannot_be_written_names_option_and_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--json .*: cannot be written \(Is a directory\)"):
        write_file("--json", tmp_path, "{}")


def test_hidden_files_of_a_folder_are_no_results(tmp_path: Path) -> None:
    """macOS leaves `._NAME.json` next to `NAME.json` on file systems of others."""
    for name in ("a.json", "._a.json", ".hidden.json"):
        (tmp_path / name).touch()
    assert list(result_paths([str(tmp_path)])) == [tmp_path / "a.json"]
    assert list(result_paths([str(tmp_path / ".hidden.json")])) == [tmp_path / ".hidden.json"]
