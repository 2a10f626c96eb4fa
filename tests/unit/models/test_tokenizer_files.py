"""Ids become text where a cache holds the model's own tokenizer, and only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from spdbench.models.checkpoints.tokenizer_files import find_decoder, tokenizer_sha256


def save(folder: Path, *words: str) -> str:
    """A tokenizer that knows `words`, in `folder`; its hash."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    found = tokenizer_sha256(folder)
    assert found is not None
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "models"


def test_cached_model_with_the_same_hash_decodes(cache: Path) -> None:
    save(cache / "a", "a", "b")
    sha256 = save(cache / "b", "yes", "no")
    decode = find_decoder("some-model", sha256)
    assert decode is not None
    assert decode([1, 0]) == "no yes"


def test_other_or_unknown_hash_gives_nothing(cache: Path) -> None:
    save(cache / "a", "a", "b")
    assert find_decoder("some-model", "0" * 64) is None
    assert find_decoder("some-model", None) is None
    assert find_decoder("not a/hub id", "0" * 64) is None


def test_a_converted_file_decodes_what_an_earlier_conversion_of_it_wrote(cache: Path) -> None:
    """Its tokenizer may cut texts otherwise, and so has another hash."""
    save(cache / "other", "a", "b")
    (cache / "other" / "spdbench.json").write_text(f'{{"sha256": "{"1" * 64}"}}')
    save(cache / "same", "yes", "no")
    (cache / "same" / "spdbench.json").write_text(f'{{"sha256": "{"2" * 64}"}}')
    decode = find_decoder("some-model", "0" * 64, "2" * 64)
    assert decode is not None
    assert decode([1, 0]) == "no yes"
    assert find_decoder("some-model", "0" * 64, "3" * 64) is None


@pytest.mark.usefixtures("cache")
def test_hub_cache_is_searched_by_the_models_id(tmp_path: Path) -> None:
    home = tmp_path / "hub" / "models--owner--name"
    sha256 = save(home / "snapshots" / "abc", "yes", "no")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    decode = find_decoder("owner/name", sha256)
    assert decode is not None
    assert decode([0]) == "yes"
    assert find_decoder("owner/other", sha256) is None


def test_broken_tokenizer_is_none(cache: Path) -> None:
    (cache / "a").mkdir(parents=True)
    (cache / "a" / "tokenizer.json").write_text("{}")
    assert find_decoder("some-model", tokenizer_sha256(cache / "a")) is None


def test_it_loads_no_torch() -> None:
    code = "import sys, spdbench.models.checkpoints.tokenizer_files, tokenizers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
