"""Hashes of weights: worked out once a file, and forgotten with it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spdbench.models.checkpoints.weights import sha256_of_files


def test_a_file_is_hashed_once(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("weights")
    known = sha256_of_files([file])
    memo = own_cache / "hashes.json"
    memo.write_text(memo.read_text().replace(known, "f" * 64))
    assert sha256_of_files([file]) == "f" * 64


def test_hashes_of_files_that_are_gone_are_forgotten(own_cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("gone", "here", "new")]
    for file in files:
        file.write_text(file.name)
    sha256_of_files(files[:2])
    sha256_of_files(files[1:2])
    files[0].unlink()
    sha256_of_files(files[2:])
    memo = json.loads((own_cache / "hashes.json").read_text())
    assert [key.rsplit(":", 2)[0] for key in memo] == [str(files[1]), str(files[2])]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"KEY": 5}', '{"KEY": null}'])
def test_a_damaged_cache_of_hashes_is_made_anew(own_cache: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "weights"
    file.write_text("weights")
    known = sha256_of_files([file])
    memo = own_cache / "hashes.json"
    (key,) = json.loads(memo.read_text())
    memo.write_text(text.replace("KEY", key))
    assert sha256_of_files([file]) == known
    assert json.loads(memo.read_text()) == {key: known}


def test_several_at_once_do_not_disturb_each_other(own_cache: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"weights{number}" for number in range(8)]
    for file in files:
        file.write_text(file.name)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            (own_cache / "hashes.json").unlink(missing_ok=True)
            found = list(pool.map(lambda file: sha256_of_files([file]), files))
            assert len(set(found)) == len(files)
            assert json.loads((own_cache / "hashes.json").read_text()).keys()
    assert os.listdir(own_cache) == ["hashes.json"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_text("weights")
    monkeypatch.setenv("SPDBENCH_CACHE", str(file))  # a file, in which no folder can be made
    assert len(sha256_of_files([file])) == 64
    (tmp_path / "cache" / "hashes.json").mkdir(parents=True)  # a folder in the place of the file
    monkeypatch.setenv("SPDBENCH_CACHE", str(tmp_path / "cache"))
    assert len(sha256_of_files([file])) == 64
    assert os.listdir(tmp_path / "cache") == ["hashes.json"]
