"""Shared fixtures: one tiny model for all tests, and a cache apart from the user's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path

import hypothesis
import pytest
import torch

from spdbench.models.decoder import Decoder
from tests import tiny
from tests.stub_hub import StubHub

torch.set_num_threads(1)  # tiny matrices gain nothing from a second thread, and lose much on a busy machine
hypothesis.settings.register_profile("no deadline", deadline=None)  # slow on a busy machine is not wrong
hypothesis.settings.load_profile("no deadline")
NUMBERS = count()


@pytest.fixture(scope="session", autouse=True)
def _packages_once() -> Iterator[None]:
    """Nothing is installed while tests run, so that the installed packages are asked for their plugins once and not
    for each backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spdbench.plugins.entry_points", cache(entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def _profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measured costs, and facts about models of tests, are kept apart from the user's."""
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPDBENCH_PROFILES", str(folder))
        patch.setattr("spdbench.models.checkpoints.facts_cache.optional_cache_folder", lambda: folder / "facts")
        yield folder


@pytest.fixture(autouse=True)
def _own_profiles(_profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one measured."""
    monkeypatch.setenv("SPDBENCH_PROFILES", str(_profiles / str(next(NUMBERS))))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A command that runs in this process without `--threads` leaves torch with a thread for each core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of six layers with a byte tokenizer."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return tiny.load(tiny_model).own_decoder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test."""
    monkeypatch.setenv("SPDBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """An empty hub on loopback as HF_ENDPOINT, and a cache for one test."""
    stub = StubHub()
    monkeypatch.setenv("HF_ENDPOINT", stub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield stub
    stub.close()
