"""Drafters as folders: what is read, what is refused, and matrices in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench_backends.drafter_files.folder import (
    DrafterConfig,
    checked_config,
    load_content,
    read_config,
    read_tensors,
    require_version,
    store_again,
    stored,
    unpacked,
    write_folder,
)

TENSORS = {"a.weight": torch.rand(2, 3), "b.bias": torch.rand(2)}


class SomeConfig(DrafterConfig):
    size: int = Field(ge=1)
    rate: float = 0.5
    ids: tuple[int, ...] | None = None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_there_and_back(tmp_path: Path, name: str) -> None:
    shared = {**TENSORS, "c.weight": TENSORS["a.weight"], "d.weight": TENSORS["a.weight"].T}
    folder = write_folder(tmp_path / "new" / "folder", {"method": "some", "size": 3}, shared, name)
    assert read_config(folder, "some") == {"method": "some", "size": 3}
    found = read_tensors([folder / name])
    assert found.keys() == shared.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in shared.items())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "config.json: not JSON"),
        ("[" * 100_000, "config.json: nested too deeply"),
        ("[]", "config.json: is not a mapping"),
        ('{"method": "other"}', "is a drafter for 'other', not for some"),
        (None, r"is not a drafter folder, it has no config\.json"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=why):
        read_config(tmp_path, "some", "any")
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_config(tmp_path / "config.json", "some")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 8}', "is a drafter for 'eagle', not for spd"),
        ('{"speculators_model_type": "eagle3"}', "is a drafter for 'eagle', not for spd"),
        ('{"medusa_num_heads": 5, "medusa_num_layers": 1}', "is a drafter for 'medusa', not for spd"),
        (
            '{"architectures": ["LlamaForCausalLM"]}',
            r"a model or of an EAGLE head \(architectures \['LlamaForCausalLM'\]",
        ),
    ],
)
def test_published_drafters_of_other_methods_are_named_as_what_they_are(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=why):
        read_config(tmp_path, "spd", ours_alone=True)


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_version_that_is_not_known_is_refused_and_none_is_the_first(tmp_path: Path, version: object) -> None:
    require_version(tmp_path, {}, 1)
    require_version(tmp_path, {"version": 11}, 10, 11)
    with pytest.raises(InputError, match=rf"version {version!r} is not known\. Allowed: 1\. A newer spdbench"):
        require_version(tmp_path, {"version": version}, 1)


def test_a_config_is_checked(tmp_path: Path) -> None:
    found = checked_config(SomeConfig, {"size": 3, "ids": [1, 2], "unknown": object()}, tmp_path)
    assert (found.size, found.ids, found.trained_tokens) == (3, (1, 2), None)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"size": None}, "config.size: Input should be a valid integer"),
        ({"size": "3"}, "config.size: Input should be a valid integer"),
        ({"size": 0}, "config.size: Input should be greater than or equal to 1"),
        ({"rate": float("inf")}, "config.rate: Input should be a finite number"),
        ({"ids": [1, 1.5]}, "config.ids.1: Input should be a valid integer"),
        ({"trained_tokens": -5}, "config.trained_tokens: Input should be greater than or equal to 0"),
    ]
    for change, why in changes:
        with pytest.raises(InputError, match=f"{tmp_path}: {why}"):
            checked_config(SomeConfig, {"size": 3, **change}, tmp_path)


def test_tensors_come_from_all_files_under_new_names(tmp_path: Path) -> None:
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    files = sorted(tmp_path.iterdir())
    renamed = read_tensors(files, lambda name: name.replace("a.", "z.") if name != "b.bias" else None)
    assert renamed.keys() == {"z.weight"}
    with pytest.raises(InputError, match=r"b\.bias\.safetensors: two tensors are called same"):
        read_tensors(files, lambda _: "same")

    def refuse(name: str) -> str:
        raise ValueError(f"belongs to {name[:1]}")

    with pytest.raises(InputError, match=r"tensor a\.weight belongs to a"):
        read_tensors(files, refuse)


def test_files_that_hold_no_tensors(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "ran",))

    contents: list[tuple[object, str]] = [
        (Evil(), "cannot be read as weights: it is damaged, or holds more than plain tensors"),
        ({"a": Path("code")}, "cannot be read as weights"),
        ([torch.zeros(1)], "is not a mapping from names to tensors"),
        ({"a": "text"}, "is not a mapping from names to tensors: a is a str"),
    ]
    for content, why in contents:
        torch.save(content, tmp_path / "weights.bin")
        with pytest.raises(InputError, match=rf"weights\.bin: {why}"):
            read_tensors([tmp_path / "weights.bin"])
    assert not (tmp_path / "ran").exists()
    for name in ("text.bin", "text.safetensors"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(InputError, match=f"{name}: cannot be read as weights"):
            load_content(tmp_path / name)
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(InputError, match=f"{name}: cannot be read as weights: it is a pointer of Git LFS"):
            load_content(tmp_path / name)
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors([tmp_path / "old.pt"]).keys() == TENSORS.keys()


MATRICES = arrays.arrays(
    "float32", st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32)
).map(torch.from_numpy)


@given(MATRICES)
def test_in_8_bits_every_number_is_within_half_a_step_and_bfloat16s_rounding(matrix: Tensor) -> None:
    found = unpacked(stored({"w": matrix}, "int8"))
    assert found.keys() == {"w"}
    most_O1 = matrix.abs().amax(dim=1, keepdim=True)
    assert bool(((found["w"].float() - matrix).abs() <= most_O1 / 127 / 2 * 1.001 + most_O1 * 2**-8 + 1e-37).all())


@given(MATRICES)
def test_what_was_stored_once_stays_the_same(matrix: Tensor) -> None:
    once = unpacked(stored({"w": matrix}, "int8"))
    assert torch.equal(unpacked(stored(once, "bfloat16"))["w"], once["w"])


def test_only_matrices_are_in_8_bits(tmp_path: Path) -> None:
    packed = stored({"norm.weight": torch.rand(4), "up.weight": torch.rand(3, 4)}, "int8")
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "norm.weight": torch.bfloat16,
        "up.weight": torch.int8,
        "up.weight.scale": torch.float32,
    }
    folder = write_folder(tmp_path, {}, packed)
    assert read_config(folder, "some")["storage"] == "int8"
    found = read_tensors([folder / "model.safetensors"])
    assert found.keys() == {"norm.weight", "up.weight", "up.weight.scale"}
    assert found["up.weight"].dtype == torch.bfloat16
    assert torch.equal(found["up.weight.scale"], packed["up.weight.scale"])


def test_a_folder_is_stored_again(tmp_path: Path) -> None:
    matrix = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    folder = write_folder(tmp_path, {"method": "some", "size": 3}, stored({"up.weight": matrix}))
    sizes = []
    for storage in ("int8", "int8", "bfloat16"):
        store_again(folder, storage)
        assert read_config(folder, "some")["size"] == 3
        sizes.append((folder / "model.safetensors").read_bytes())
    assert sizes[0] == sizes[1] != sizes[2]
    assert read_config(folder, "some") == {"method": "some", "size": 3}
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is not of spdbench's own layout: its config names no method"):
        store_again(folder, "int8")


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.ones(2, 3, dtype=torch.int8)},
        {"w": torch.ones(2, 3), "w.scale": torch.ones(2)},
        {"w": torch.ones(2, 3, dtype=torch.int8), "w.scale": torch.ones(3)},
        {"w.scale": torch.ones(2)},
    ],
    ids=["no scale", "not in 8 bits", "another size", "a scale alone"],
)
def test_what_does_not_fit_is_left_for_the_reader_to_refuse(tensors: dict[str, Tensor]) -> None:
    assert unpacked(tensors).keys() == tensors.keys()
