"""A log that only grows: what is whole is kept, what differs is named."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from spdbench.append_log import AppendLog, first_difference, require_same_settings
from spdbench.errors import InputError


class Notes(AppendLog):
    name, elsewhere, resume_with, restart = "notebook", "write elsewhere", "the command again", "begin anew"


def test_a_new_log_is_empty_and_an_existing_one_keeps_its_lines(tmp_path: Path) -> None:
    with Notes(tmp_path / "n") as log:
        assert [log.append_line(b"one\n"), log.append_line(b"two\n")] == [0, 4]
        assert log.size == 8
    with Notes(tmp_path / "n") as log:
        assert log.append_line(b"three\n") == 8


def test_reading_passes_whole_lines_and_drops_a_cut_one(tmp_path: Path) -> None:
    (tmp_path / "n").write_bytes(b"head\none\ntw")
    found = []
    with Notes(tmp_path / "n") as log:
        log.read(lambda *line: found.append(line))
    assert found == [(1, 0, b"head\n"), (2, 5, b"one\n")]
    assert (tmp_path / "n").read_bytes() == b"head\none\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "line 1 is not the header of a notebook"), (b"1\nx\n2", "line 2 is damaged, so it cannot .*; begin anew")],
)
def test_a_line_that_cannot_be_read_is_named_and_nothing_is_lost(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "n").write_bytes(content)
    with Notes(tmp_path / "n") as log, pytest.raises(InputError, match=message):
        log.read(lambda _number, _offset, line: require_number(line))
    assert (tmp_path / "n").read_bytes() == content


def require_number(line: bytes) -> None:
    int(line)


def test_settings_are_compared_as_json_would_keep_them() -> None:
    assert first_difference({"a": [1, 2], "b": 0}, {"a": (1, 2), "b": 0.0}) == ""
    assert first_difference({"a": 1}, {"a": 1, "b": None}) == ""
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}, ignored=["b"]) == ""
    with pytest.raises(InputError, match=r"n: was begun with other settings: b 2, now None\. Begin anew\."):
        require_same_settings("n", {"a": 1, "b": 2}, {"a": 1}, "Begin anew.")


def test_a_log_in_use_is_refused_and_a_file_system_without_locks_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Notes(tmp_path / "n"), pytest.raises(InputError, match="another run is writing this now; write elsewhere"):
        Notes(tmp_path / "n")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Notes(tmp_path / "n") as log:
        log.append_line(b"one\n")
    assert "has no locks" in capsys.readouterr().err


def test_a_lock_that_fails_for_another_reason_names_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Input/output error\)"):
        Notes(tmp_path / "n")
