"""Threads follow what the scheduler and the container allow."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdbench import processors
from spdbench.processors import control_groups, cpu_quota, limiting_group, may_use_amx, usable_cores, usable_processors


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors, and no control groups."""
    monkeypatch.setattr(processors, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n", encoding="ascii")


def test_without_groups_every_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (usable_cores(), cpu_quota()) == (8, None)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_processors() == list(range(8))


@pytest.mark.parametrize(
    ("limit", "cores", "quota"),
    [
        ("250000 100000", 2, 2.5),
        ("50000 100000", 1, 0.5),
        ("max 100000", 8, None),
        ("900000 100000", 8, None),
        ("0 0", 8, None),
        ("", 8, None),
    ],
)
def test_version_2_has_one_file(tmp_path: Path, limit: str, cores: int, quota: float | None) -> None:
    write(tmp_path, own="0::/a/b")
    write(tmp_path / "a" / "b", cpu__max=limit)
    assert (usable_cores(), cpu_quota()) == (cores, quota)


@pytest.mark.parametrize("name", ["cpu", "cpu,cpuacct"])
def test_version_1_has_two_files(tmp_path: Path, name: str) -> None:
    write(tmp_path, own=f"4:memory:/m\n3:{name}:/c\n0::/")
    write(tmp_path / name / "c", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert (usable_cores(), cpu_quota()) == (3, 3.0)
    write(tmp_path / name / "c", cpu__cfs_quota_us="-1")
    assert (usable_cores(), cpu_quota()) == (8, None)


def test_the_tightest_of_all_groups_around_counts_even_where_our_own_is_not_seen(tmp_path: Path) -> None:
    write(tmp_path, own="0::/seen/from/outside", cpu__max="400000 100000")
    assert usable_cores() == 4
    write(tmp_path / "seen", cpu__max="200000 100000")
    assert usable_cores() == 2


def test_the_group_that_limits_is_the_one_with_the_smallest_quota(tmp_path: Path) -> None:
    write(tmp_path, own="0::/a/b")
    assert limiting_group() is None
    write(tmp_path / "a" / "b", cpu__max="max 100000")
    write(tmp_path / "a", cpu__max="200000 100000")
    assert limiting_group() == tmp_path / "a"


def test_groups_are_those_of_the_controller_and_all_around_them(tmp_path: Path) -> None:
    write(tmp_path, own="4:memory:/m/n\n3:cpuset,cpu:/c")
    assert list(control_groups("memory"))[:3] == [tmp_path / "memory" / part for part in ("m/n", "m", "")]
    assert tmp_path / "cpu" / "c" in control_groups("cpu")


@pytest.mark.parametrize(
    ("system", "machine", "answer", "granted"),
    [
        ("linux", "x86_64", lambda *_: 0, True),
        ("linux", "x86_64", lambda *_: -1, False),
        ("linux", "x86_64", None, False),
        ("linux", "aarch64", lambda *_: 0, False),
        ("darwin", "x86_64", lambda *_: 0, False),
    ],
    ids=["granted", "refused", "no such call", "another processor", "another system"],
)
def test_amx_is_used_where_the_system_grants_it(
    system: str, machine: str, answer: Any, granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace() if answer is None else SimpleNamespace(syscall=answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert may_use_amx.__wrapped__() is granted
