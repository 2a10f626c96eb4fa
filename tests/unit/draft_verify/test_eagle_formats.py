"""EAGLE heads on disk: every layout there and back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.conventions import default_aux
from spdbench_backends.eagle.formats import EagleFile, Layout, read_eagle
from spdbench_backends.eagle.head import EagleWeights
from spdbench_backends.eagle.writing import write_eagle
from tests import tiny

IDS = list(range(1, 262, 3))


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return tiny.load(tiny_model).own_decoder


def published(decoder: Decoder, **config: Any) -> EagleFile:
    """An EAGLE-3 head with a draft vocabulary, as its authors publish one."""
    file = random_eagle(decoder, 4)
    member = torch.zeros(262, dtype=torch.bool)
    member[IDS] = True
    tensors = {
        **file.tensors,
        "d2t": torch.tensor(IDS) - torch.arange(len(IDS)),
        "t2d": member,
        "lm_head.weight": torch.randn(len(IDS), 32),
    }
    updates = {"draft_vocab_size": len(IDS), "aux_ids": None, "trained_tokens": None, **config}
    return replace(file, tensors=tensors, config=file.config.model_copy(update=updates))


def altered(folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """The folder with its tensors and its config changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


@pytest.mark.parametrize("layout", ["safeailab", "specforge", "speculators", "spdbench"])
def test_an_eagle3_head_goes_there_and_back(decoder: Decoder, tmp_path: Path, layout: Layout) -> None:
    file = published(decoder)
    found = read_eagle(write_eagle(file, tmp_path / layout, layout))
    assert found.layout == layout
    assert found.tensors.keys() == file.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in file.tensors.items())
    weights = build_eagle(found, decoder)
    assert weights.aux == default_aux(6) == (2, 3, 3)
    assert weights.token_ids_U is not None
    assert weights.token_ids_U.tolist() == IDS
    assert found.sha256


@pytest.mark.parametrize("layout", ["safeailab", "spdbench"])
def test_an_eagle1_head_goes_there_and_back(decoder: Decoder, tmp_path: Path, layout: Layout) -> None:
    file = random_eagle(decoder, 4, version=1)
    file = replace(
        file, tensors={**file.tensors, "fc.bias": torch.randn(32), "embed_tokens.weight": torch.randn(262, 32)}
    )
    found = read_eagle(write_eagle(file, tmp_path, layout))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in file.tensors.items())
    weights = build_eagle(found, decoder)
    assert not weights.is_eagle3
    assert weights.head is decoder.head
    with pytest.raises(InputError, match="cannot be written as specforge"):
        write_eagle(file, tmp_path, "specforge")


def test_prefixes_of_serving_engines_are_understood(decoder: Decoder, tmp_path: Path) -> None:
    folder = write_eagle(published(decoder), tmp_path, "speculators")

    def prefix(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"draft_model.{name}"] = tensors.pop(name)
        tensors["verifier_norm.weight"] = torch.ones(32)

    assert read_eagle(altered(folder, prefix)).tensors.keys() == published(decoder).tensors.keys()


def build(decoder: Decoder, folder: Path, **options: Any) -> EagleWeights:
    return build_eagle(read_eagle(folder), decoder, **options)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.update({"extra.weight": torch.ones(2)}), {}, "unknown tensor extra.weight"),
        (lambda t: t.pop("norm.weight"), {}, "tensor norm.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), {}, "tensor lm_head.weight is missing"),
        (lambda t: t.update({"norm.weight": torch.ones(31)}), {}, r"norm.weight has shape \[31\], expected \[32\]"),
        (lambda t: t.update({"norm.weight": torch.full((32,), torch.nan)}), {}, "not finite"),
        (lambda t: t.update({"d2t": t["d2t"] + 1}), {}, "d2t does not match t2d"),
        (lambda t: t.pop("t2d"), {}, "tensor t2d is missing"),
        (lambda t: t.update({"fc.weight": torch.ones(32, 95)}), {}, "fc.weight has 95 columns"),
        (lambda t: t.update({"fc.weight": torch.ones(32, 64)}), {}, "reads 2 auxiliary features"),
        (lambda _: None, {"hidden_size": 64}, "config.hidden_size is 64, but here it is 32"),
        (lambda _: None, {"vocab_size": 99}, "config.vocab_size is 99, but here it is 262"),
        (lambda _: None, {"target_family": "qwen3"}, "config.target_family is qwen3"),
        (lambda _: None, {"num_attention_heads": "many"}, "num_attention_heads"),
        (lambda _: None, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 5]}}, "aux_convention"),
        (lambda _: None, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3]}}, "names 2 auxiliary layers"),
        (lambda _: None, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "of type llama3"),
        (lambda t: t.update({"mask_hidden": torch.ones(32)}), {}, "parallel drafting"),
    ],
)
def test_what_does_not_fit_is_named(
    decoder: Decoder, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], config: dict[str, Any], message: str
) -> None:
    folder = altered(write_eagle(published(decoder), tmp_path, "specforge"), change, **config)
    with pytest.raises(InputError, match=message):
        build(decoder, folder)


def test_folders_that_hold_no_head_are_named(tmp_path: Path, decoder: Decoder) -> None:
    with pytest.raises(InputError, match="has no config"):
        read_eagle(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_eagle(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "medusa"}')
    with pytest.raises(InputError, match="a drafter for 'medusa'"):
        read_eagle(tmp_path)
    folder = write_eagle(published(decoder), tmp_path / "head", "specforge")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_eagle(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        read_eagle(folder)


@pytest.mark.parametrize(
    ("ids", "convention", "expected"),
    [
        ((2, 3, 3), "auto", (2, 3, 3)),
        ((1, 2, 2), "auto", (2, 3, 3)),
        ((0, 1, 5), "hidden_states", (0, 1, 5)),
        ((0, 1, 5), "layer_output", (1, 2, 6)),
    ],
)
def test_auxiliary_layers_are_counted_in_two_ways(
    decoder: Decoder, tmp_path: Path, ids: tuple[int, ...], convention: str, expected: tuple[int, ...]
) -> None:
    folder = write_eagle(published(decoder, aux_ids=ids), tmp_path, "specforge")
    assert build(decoder, folder, aux_convention=convention).aux == expected


def test_the_rotary_base_can_be_overridden(decoder: Decoder, tmp_path: Path) -> None:
    folder = write_eagle(published(decoder, rope_theta=1e6), tmp_path, "specforge")
    (own, _), (other, _) = (build(decoder, folder, rope_theta=theta).rotary.tables(9) for theta in (None, 1e4))
    assert own[5, 0] == other[5, 0]
    assert not torch.equal(own[5], other[5])


@pytest.mark.parametrize(("layout", "fed"), [("specforge", False), ("speculators", True), ("spdbench", True)])
def test_norm_output_means_two_things(decoder: Decoder, tmp_path: Path, layout: Layout, fed: bool) -> None:
    folder = write_eagle(published(decoder, norm_output=True), tmp_path, layout)
    assert build(decoder, folder).feed_normed is fed
    assert build(decoder, folder, norm_output="feed").feed_normed
    assert not build(decoder, folder, norm_output="ignore").feed_normed


def test_our_own_folder_takes_head_rows_from_the_target(decoder: Decoder, tmp_path: Path) -> None:
    file = random_eagle(decoder, 4)
    file = replace(file, config=file.config.model_copy(update={"draft_token_ids": tuple(IDS), "trained_tokens": 7}))
    found = read_eagle(write_eagle(file, tmp_path, "spdbench"))
    weights = build_eagle(found, decoder)
    assert decoder.head is not None
    assert torch.equal(weights.head.plain(), decoder.head.plain()[IDS])
    assert found.trained_tokens == 7
