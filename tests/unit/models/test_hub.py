"""Models from a hub: a stub on loopback that serves a real one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from spdbench.errors import InputError
from spdbench.models.checkpoints.find_model import find_model
from spdbench.models.target import load_target
from tests import tiny
from tests.cli.run_helpers import small_files
from tests.stub_hub import StubHub

REPO = "somebody/tiny-llama"


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_id_loads_like_the_folder_it_came_from(hub: StubHub, tiny_model: Path) -> None:
    hub.models[REPO] = {"main": {**files_of(tiny_model), "README.md": b"hello", "training.bin": b"x" * 1000}}
    target = load_target(REPO, "float32", "cpu")
    assert target.files.id == REPO
    assert target.files.sha256 == find_model(str(tiny_model)).sha256
    assert target.own_decoder.weights[0].qkv.plain().equal(tiny.load(tiny_model).own_decoder.weights[0].qkv.plain())
    assert target.tokenizer.chat_template
    assert not any("README" in line or "training" in line for line in hub.requests)


def test_a_model_in_the_cache_needs_no_hub(hub: StubHub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models[REPO] = {"main": files_of(tiny_model)}
    first = find_model(REPO)
    hub.close()
    assert find_model(REPO) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(REPO) == first


def test_an_unknown_model_is_named(hub: StubHub) -> None:
    with pytest.raises(InputError, match="-m no/such: the hub has no model of that name"):
        find_model("no/such")
    assert len(hub.requests) == 1


def test_a_hub_out_of_reach_says_what_else_there_is(hub: StubHub) -> None:
    hub.close()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"-m no/such: .* the hub could not be asked .* -m smollm2"):
        find_model("no/such")
    assert time.monotonic() - start < 15


def test_offline_mode_asks_nobody(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        find_model("no/such")
    assert hub.requests == []


def test_a_failing_hub_is_not_asked_again_and_again(hub: StubHub) -> None:
    hub.status = 500
    with pytest.raises(InputError, match="could not be asked"):
        find_model("no/such")
    assert len(hub.requests) <= 3


def test_a_full_disk_is_named_as_such(hub: StubHub, tiny_model: Path) -> None:
    hub.models[REPO] = {"main": files_of(tiny_model)}
    with small_files(10_000), pytest.raises(InputError) as caught:
        find_model(REPO)
    said = str(caught.value)
    assert "cannot be written to" in said
    assert "(File too large); make room there, or set HF_HUB_CACHE" in said
    assert "could not be asked" not in said
    assert find_model(REPO).sha256 == find_model(str(tiny_model)).sha256
