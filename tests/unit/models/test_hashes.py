"""Hashes of weights: worked out once a file, and forgotten with it."""

from __future__ import annotations

import json
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
