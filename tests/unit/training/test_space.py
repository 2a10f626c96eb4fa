"""What memory is left, in containers with a limit and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench import processors
from spdbench.training import space


@pytest.fixture(autouse=True)
def _groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text + "\n", encoding="ascii")


def test_without_groups_there_is_no_limit() -> None:
    assert space._cgroup_memory() is None


def test_the_tightest_limit_of_version_2_counts_and_file_cache_is_free(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/pod/box\n")
    write(tmp_path / "pod", max="1000", current="600", stat="anon 500\nfile 100")
    write(tmp_path / "pod" / "box", max="max", current="300", stat="anon 300\nfile 0")
    assert space._cgroup_memory() == 500
    write(tmp_path / "pod" / "box", max="700", current="650", stat="file 50")
    assert space._cgroup_memory() == 100


def test_version_1_has_other_names(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:memory:/box\n")
    write(tmp_path / "memory" / "box", limit_in_bytes="2000", usage_in_bytes="1500", stat="cache 1\ntotal_cache 400")
    assert space._cgroup_memory() == 900
