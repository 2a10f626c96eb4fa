"""Facts about a model folder that are kept in the cache: used while its files are as they were, else made anew."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spdbench.models.checkpoints import facts_cache
from spdbench.models.checkpoints.facts_cache import UNUSED_S, cached_facts

Facts = tuple[int, tuple[float, ...]]


class Maker:
    """Makes the same facts each time, and counts how often."""

    def __init__(self, facts: Facts | None = (7, (0.1, 1e-30))) -> None:
        self.facts, self.count = facts, 0

    def __call__(self) -> Facts | None:
        self.count += 1
        return self.facts


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(facts_cache, "optional_cache_folder", lambda: own_cache)
    found = tmp_path / "model"
    found.mkdir()
    (found / "config.json").write_text("{}")
    (found / "model.safetensors").write_bytes(b"weights")
    return found


def facts_of(folder: Path, make: Maker) -> Facts | None:
    found: Facts | None = cached_facts(folder, "kind", Facts, make)
    return found


def entry(own_cache: Path) -> Path:
    (path,) = (own_cache / "facts").iterdir()
    return path


def test_facts_are_made_once_and_are_the_same_afterwards(folder: Path) -> None:
    make = Maker()
    assert [facts_of(folder, make) for _ in range(3)] == [make.facts] * 3
    assert make.count == 1


def test_kinds_and_folders_are_apart(folder: Path) -> None:
    facts_of(folder, Maker())
    other = Maker((8, ()))
    assert cached_facts(folder, "other", Facts, other) == other.facts
    assert facts_of(folder.rename(folder.with_name("moved")), other) == other.facts


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "templates/tool.jinja"])
def test_a_changed_or_new_file_makes_them_anew(folder: Path, name: str) -> None:
    make = Maker()
    facts_of(folder, make)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("[]")
    facts_of(folder, make)
    assert make.count == 2


def test_changed_weights_make_them_anew(folder: Path) -> None:
    make = Maker()
    facts_of(folder, make)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    facts_of(folder, make)
    assert make.count == 2


def test_another_library_makes_them_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    facts_of(folder, make)
    monkeypatch.setattr(facts_cache, "version", lambda _: "0")
    facts_of(folder, make)
    assert make.count == 2


@pytest.mark.parametrize("damage", [lambda text: text[:-1], lambda text: text.replace(b"7", b"8"), lambda _: b""])
def test_a_damaged_entry_is_made_anew(folder: Path, own_cache: Path, damage: object) -> None:
    assert callable(damage)
    make = Maker()
    facts_of(folder, make)
    path = entry(own_cache)
    path.write_bytes(damage(path.read_bytes()))
    assert facts_of(folder, make) == make.facts
    assert make.count == 2
    facts_of(folder, make)
    assert make.count == 2


def test_no_facts_are_not_kept(folder: Path, own_cache: Path) -> None:
    make = Maker(None)
    assert facts_of(folder, make) is None
    assert facts_of(folder, make) is None
    assert make.count == 2
    assert not (own_cache / "facts").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(folder: Path, own_cache: Path) -> None:
    own_cache.write_text("a file, in which no folder can be made")
    make = Maker()
    assert [facts_of(folder, make) for _ in range(2)] == [make.facts] * 2
    assert make.count == 2


def test_unused_entries_are_removed_when_another_one_is_written(folder: Path, own_cache: Path) -> None:
    facts_of(folder, Maker())
    old = entry(own_cache)
    os.utime(old, (1, old.stat().st_mtime - UNUSED_S - 60))
    (folder / "config.json").write_text("[]")
    facts_of(folder, Maker())
    assert entry(own_cache) != old


def test_several_at_once_do_not_disturb_each_other(folder: Path, own_cache: Path) -> None:
    make = Maker()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: facts_of(folder, make), range(64))) == {make.facts}
    assert entry(own_cache).suffix == ".json"
