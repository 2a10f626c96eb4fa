"""A data file that may be killed at any byte."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.training.conversations import read_conversations
from spdbench.training.datafile import open_data, summary_path
from spdbench.training.distill.talk import Dropped, Kept

HEADER: dict[str, Any] = {"model": {"id": "m"}, "seed": 0, "tokens": 100, "batch": 8}


def kept(index: int) -> Kept:
    messages = ({"role": "user", "content": f"Où est {index}?"}, {"role": "assistant", "content": "\u2028Là."})
    return Kept(index, messages, {"index": index, "temperature": 0.0}, 10)


def filled(path: Path, *indices: int) -> Path:
    with open_data(path, HEADER) as file:
        for index in indices:
            file.add(kept(index))
    return path


def test_file_begins_with_a_header_and_reads_as_conversations(tmp_path: Path) -> None:
    found = read_conversations(filled(tmp_path / "d.jsonl", 0, 1))
    assert found.header == {"schema": "spdbench.data/1", **HEADER}
    assert found.messages == [kept(0).messages, kept(1).messages]


def test_file_cut_at_any_byte_goes_on_without_loss_or_duplicates(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole.jsonl", 0, 1, 2).read_bytes()
    path = tmp_path / "d.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with open_data(path, HEADER) as file:
            found = file.found
            assert len(found) == max(0, whole[:size].count(b"\n") - 1)
            assert file.num_tokens == 10 * len(found)
            for index in range(len(found), 3):
                file.add(kept(index))
        assert path.read_bytes() == whole


def test_counts_of_what_was_dropped_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with open_data(path, HEADER) as file:
        file.add(kept(0))
        file.add(Dropped(1, "loop"))
        file.num_written = 99
        file.write_summary(complete=False)
    with open_data(path, HEADER) as file:
        assert (file.dropped["loop"], file.num_written) == (1, 99)
        file.add(Dropped(2, "overlap"))
        file.write_summary(complete=True)
    summary = json.loads(summary_path(path).read_text())
    assert summary["dropped"] == {"loop": 1, "overlap": 1}
    assert summary["complete"]


def test_conversations_cut_short_are_kept_and_counted_apart_even_without_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    cut = replace(kept(0), sampling={"index": 0, "cut_short": "overlap"})
    with open_data(path, HEADER) as file:
        file.add(cut)
        file.add(kept(1))
        assert file.cut_short == {"overlap": 1}
    with open_data(path, HEADER) as file:
        file.add(replace(cut, index=2))
        file.write_summary(complete=True)
    summary = json.loads(summary_path(path).read_text())
    assert summary["cut_short"] == {"overlap": 2}
    assert (summary["conversations"], summary["num_dropped"], summary["dropped"]) == (3, 0, {})


@pytest.mark.parametrize("damage", ["", "[]", '{"dropped": 3}'])
def test_lost_summary_loses_counts_alone(damage: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "d.jsonl", 0)
    summary_path(path).write_text(damage)
    with open_data(path, HEADER) as file:
        assert file.num_conversations == 1


@pytest.mark.parametrize("line", [b'{"messages": []}', b"{"])
def test_file_with_lines_that_end_in_a_carriage_return_is_refused_as_it_is(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "d.jsonl"
    with open_data(path, HEADER):
        pass
    for content in (path.read_bytes() + line + b"\r" + line, path.read_bytes().replace(b"\n", b"\r") + line):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be resumed"):
            open_data(path, HEADER)
        assert path.read_bytes() == content


def test_link_in_place_of_a_file_that_is_written_first_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "d.jsonl.part").symlink_to("mine")
    with open_data(tmp_path / "d.jsonl", HEADER):
        pass
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "d.jsonl").is_symlink()


def test_file_may_grow_beyond_its_first_target(tmp_path: Path) -> None:
    path = filled(tmp_path / "d.jsonl", 0)
    with open_data(path, {**HEADER, "tokens": 900, "batch": 2}) as file:
        file.add(kept(1))
    found = read_conversations(path)
    assert found.header is not None
    assert found.header["tokens"] == 900
    assert len(found.messages) == 2


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    path = filled(tmp_path / "d.jsonl", 0)
    before = path.read_bytes()
    with pytest.raises(InputError, match="was begun with other settings: seed 0, now 1"):
        open_data(path, {**HEADER, "seed": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["Dear diary", '{"messages": []}\n', "\n", '{"schema": "other"}\n', "[1]\n"])
def test_file_of_somebody_else_is_left_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="choose another --out"):
        open_data(path, HEADER)
    assert path.read_text() == content


def test_damage_in_the_middle_is_named_by_its_line(tmp_path: Path) -> None:
    path = filled(tmp_path / "d.jsonl", 0, 1)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:20], lines[2], b""]))
    with pytest.raises(InputError, match="line 2 is damaged"):
        open_data(path, HEADER)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"messages": 1}'])
def test_a_line_that_is_no_conversation_is_damage(line: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "d.jsonl", 0)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 3"):
        open_data(path, HEADER)


def test_header_without_a_number_of_tokens_is_none(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"schema": "spdbench.data/1", "seed": 0}\n')
    with pytest.raises(InputError, match="line 1 is not the header of a data file"):
        open_data(path, HEADER)


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    with open_data(tmp_path / "d.jsonl", HEADER), pytest.raises(InputError, match="another run is writing this now"):
        open_data(tmp_path / "d.jsonl", HEADER)


def test_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_data(tmp_path / "d.jsonl", HEADER) as file:

        def full(_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(file, "_file", SimpleNamespace(seek=file._file.seek, fileno=file._file.fileno, write=full))
            with pytest.raises(InputError, match="the disk is full"):
                file.add(kept(0))
