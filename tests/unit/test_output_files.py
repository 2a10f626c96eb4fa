"""A file is written whole or stays as it was."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest

from spdbench.output_files import cached_file, replaced_file, write_failure, write_obstacle


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError(), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replaced_file(path) as file:
            file.write(b"half")
            file.flush()
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_what_a_killed_run_left_is_replaced_and_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    path, mine = tmp_path / "a.json", tmp_path / "mine"
    mine.write_bytes(b"mine")
    path.with_name("a.json.part").symlink_to(mine)
    with replaced_file(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), mine.read_bytes()) == (b"new", b"mine")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json", "mine"]


@pytest.mark.parametrize("writer", [replaced_file, cached_file])
def test_the_umask_decides_who_may_read_a_file(
    writer: Callable[[Path], AbstractContextManager[IO[bytes]]], tmp_path: Path
) -> None:
    (tmp_path / "usual").write_bytes(b"")
    with writer(tmp_path / "a.bin") as file:
        file.write(b"new")
    modes = {each.name: each.stat().st_mode for each in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("usual", "a.bin"), modes["usual"])


def test_a_folder_is_made_where_files_can_be_and_nothing_stays_in_it(tmp_path: Path) -> None:
    assert write_obstacle(tmp_path / "new" / "folder") is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    assert isinstance(write_obstacle(tmp_path / "file"), FileExistsError)
    assert isinstance(write_obstacle(Path("/proc/here")), OSError)  # where os.access says yes to root


def test_full_disks_are_named_behind_the_errors_of_libraries() -> None:
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert write_failure(wrapped) is None
    assert write_failure(wrapped, behind=True) == "No space left on device"
    assert write_failure(RuntimeError("I/O error (os error 28)")) == "No space left on device"
    assert write_failure(OSError(errno.ENOENT, "missing")) is None
