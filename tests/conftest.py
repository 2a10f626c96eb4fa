"""Shared fixtures: one tiny model for all tests, and a cache that is not the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of six layers with a byte tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SPDBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
