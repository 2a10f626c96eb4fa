"""Packed layers in the cache: the same numbers as from the weights, and never those of other or damaged files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spdbench.errors import InputError
from spdbench.models import load_decoder
from spdbench.models.checkpoints import packed_layers
from spdbench.models.checkpoints.packed_layers import UNUSED_S
from spdbench.models.cpu.linear import can_pack
from spdbench.models.decoder import Decoder
from spdbench.models.target import Target
from tests import tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="weights cannot be packed here")


@pytest.fixture(autouse=True)
def _small_files_too(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "optional_cache_folder", lambda: own_cache)
    monkeypatch.setattr(packed_layers, "MIN_BYTES", 0)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def refuse_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, layers cannot be read from the model's own files."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a layer was read from the weights")

    return lambda: monkeypatch.setattr(load_decoder._Reader, "layer", refuse)


def loaded(folder: Path, dtype: str = "float32", layers: range | None = None) -> Decoder:
    found = tiny.load(folder, dtype).load_layers(layers)
    assert isinstance(found, Decoder)
    return found


def logits(of: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        hidden_SM, _ = of.forward(of.embed(of.ids(tiny.PROMPT)), 0, of.new_cache(32))
        return of.logits(hidden_SM)


def files(own_cache: Path) -> list[Path]:
    return list((own_cache / "packed").glob("*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"vocab_size": 267, "intermediate_size": 52}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_the_numbers_are_those_of_the_weights(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: str, refuse_weights: Callable[[], None]
) -> None:
    folder = tiny.make_model(tmp_path / "model", family, **changes)
    expected = loaded(folder, dtype)
    refuse_weights()
    found = loaded(folder, dtype)
    assert torch.equal(logits(found), logits(expected))
    assert found.bytes_per_token(found.layers, head=True) == expected.bytes_per_token(expected.layers, head=True)
    assert [found.weights[i].window for i in range(6)] == [expected.weights[i].window for i in range(6)]
    assert found.head is not None
    assert expected.head is not None
    assert torch.equal(found.head.plain(), expected.head.plain())


def test_a_stage_reads_its_own_layers(model: Path, refuse_weights: Callable[[], None]) -> None:
    whole = loaded(model)
    refuse_weights()
    stage, last = loaded(model, layers=range(2, 4)), loaded(model, layers=range(4, 6))
    assert stage.weights.keys() == {2, 3}
    assert stage.head is None
    assert torch.equal(stage.weights[3].out.plain(), whole.weights[3].out.plain())
    assert last.head is not None
    assert last.final_norm is not None


def test_a_stage_alone_leaves_no_file(model: Path, own_cache: Path) -> None:
    loaded(model, layers=range(2, 4))
    assert files(own_cache) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_text"])
def test_experts_and_recurrent_layers_are_not_kept(tmp_path: Path, own_cache: Path, family: str) -> None:
    loaded(tiny.make_model(tmp_path / "model", family))
    assert files(own_cache) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-300],
        lambda content: content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :],
        lambda content: content.replace(b"float32", b"float33", 1),
        lambda content: content[:80],
        lambda content: b"\n" + content,
        lambda _: b"",
    ],
    ids=["cut", "zeros", "header", "header cut", "moved", "empty"],
)
def test_a_damaged_file_is_made_anew(model: Path, own_cache: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = logits(loaded(model))
    (path,) = files(own_cache)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert torch.equal(logits(loaded(model)), expected)
    assert path.read_bytes() == good


def test_changed_weights_are_read_and_the_old_file_is_removed(model: Path, own_cache: Path) -> None:
    loaded(model)
    loaded(model, "bfloat16")
    before = set(files(own_cache))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    found = loaded(model).weights[3].down
    assert found is not None
    assert torch.equal(found.plain(), tensors["model.layers.3.mlp.down_proj.weight"])
    after = set(files(own_cache))
    assert len(before) == len(after) == 2
    assert len(before & after) == 1  # bfloat16's is removed when it is loaded


def test_another_processor_or_layout_has_a_file_of_its_own(
    model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LAYOUT", 0), ("cpu_model", lambda: "another processor")):
        loaded(model)
        before = files(own_cache)
        monkeypatch.setattr(packed_layers, name, value)
        loaded(model)
        assert files(own_cache) != before
        assert len(files(own_cache)) == 1


def test_weights_that_are_refused_are_refused_again(model: Path, own_cache: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.extra": torch.ones(3)}, model / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match="have no place in this model"):
            loaded(model)
    assert files(own_cache) == []


def test_unused_files_are_removed_when_another_one_is_written(model: Path, tmp_path: Path, own_cache: Path) -> None:
    loaded(model)
    (old,) = files(own_cache)
    loaded(model)  # used, so it stays
    os.utime(old, (1, old.stat().st_mtime - UNUSED_S - 60))
    loaded(tiny.make_model(tmp_path / "other", seed=1))
    assert old not in files(own_cache)


def test_a_full_disk_leaves_no_file(model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert torch.equal(logits(loaded(model)), logits(loaded(model)))
    assert files(own_cache) == []


def test_a_cache_that_cannot_be_written_costs_time_only(model: Path, own_cache: Path) -> None:
    own_cache.write_text("a file, in which no folder can be made")
    files_ = tiny.load(model).files
    expected = logits(loaded(model))
    found = Target(files_, "float32", "cpu").own_decoder
    assert torch.equal(logits(found), expected)


def test_several_at_once_do_not_disturb_each_other(model: Path, own_cache: Path) -> None:
    expected = logits(loaded(model))
    for path in files(own_cache):
        path.unlink()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: loaded(model), range(12)))
    assert all(torch.equal(logits(one), expected) for one in found)
    (path,) = files(own_cache)
    assert path.suffix == ".packed"
