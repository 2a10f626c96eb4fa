"""Medusa heads on disk: every layout there and back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench_backends.medusa.drafter import build_medusa, random_medusa
from spdbench_backends.medusa.formats import Layout, MedusaFile, holds_medusa_heads, read_medusa, write_medusa
from tests import tiny
from tests.unit.draft_verify.medusa_files import VOCAB, WIDTH, heads

pytestmark = pytest.mark.usefixtures("own_cache")

IDS = (7, 3, 200, 261, 0)
"""A draft vocabulary in no order: published maps have none."""


def same(found: MedusaFile, expected: MedusaFile) -> bool:
    tensors = found.renamed("spdbench")
    return tensors.keys() == expected.tensors.keys() and all(
        torch.equal(tensors[name], tensor) for name, tensor in expected.tensors.items()
    )


def weights_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))


def altered(folder: Path, tensors: dict[str, Tensor | None], **config: Any) -> Path:
    """The folder with tensors replaced, added, or, where None, taken away, and with its config changed."""
    file = weights_file(folder)
    safe = file.suffix == ".safetensors"
    found = load_file(file) if safe else torch.load(file, weights_only=True)
    left = {name: tensor for name, tensor in {**found, **tensors}.items() if tensor is not None}
    if safe:
        save_file(left, file)
    else:
        torch.save(left, file)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


CASES: list[tuple[Layout, MedusaFile, int]] = [
    ("v0.1", heads(), 3),
    ("v0.1", heads(num_heads=5, num_blocks=3, linears=5), 5),
    ("v0.1", heads(num_heads=1, linears=1), 1),
    ("v2", heads(linears=0), 1),
    ("v2", heads(num_blocks=2, linears=0), 1),
    ("vllm", heads(), 3),
    ("vllm", heads(bias=False, num_blocks=2), 3),
    ("vllm", heads(linears=1), 1),
    ("vllm", heads(ids=IDS), 3),
    ("vllm", heads(linears=1, ids=IDS), 1),
    ("spdbench", heads(), 3),
    ("spdbench", heads(linears=1, ids=IDS, bias=False), 1),
    ("spdbench", heads(linears=0, ids=IDS), 1),
    ("spdbench", heads(linears=0, num_blocks=2), 1),
]


@pytest.mark.parametrize(("layout", "file", "num_linears"), CASES)
def test_heads_go_there_and_back(
    decoder: Decoder, tmp_path: Path, layout: Layout, file: MedusaFile, num_linears: int
) -> None:
    found = read_medusa(write_medusa(file, tmp_path / "heads", layout))
    assert found.layout == layout
    assert same(found, file)
    assert found.config.draft_token_ids == file.config.draft_token_ids
    assert len(found.sha256) == 64
    weights = build_medusa(found, decoder)
    assert (weights.num_heads, len(weights.heads)) == (file.counts[0], num_linears)


def test_our_own_folder_keeps_what_it_knows(tmp_path: Path) -> None:
    file = heads(
        head_accuracies=((0.5, 0.2), (0.25,), (0.125, 0.1, 0.0)),
        trained_tokens=1000,
        target_family="llama",
        model_sha256="ab",
        base_model="tiny",
        hidden_size=WIDTH,
    )
    found = read_medusa(write_medusa(file, tmp_path, "spdbench"))
    assert found.config == file.config
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["method"], config["version"]) == ("medusa", 1)


def test_published_files_have_the_published_names(tmp_path: Path) -> None:
    write_medusa(heads(num_heads=2, num_blocks=2, linears=2, base_model="vicuna"), tmp_path / "old", "v0.1")
    names = {f"{k}.{j}.linear.{part}" for k in (0, 1) for j in (0, 1) for part in ("weight", "bias")}
    assert torch.load(tmp_path / "old" / "medusa_lm_head.pt", weights_only=True).keys() == names | {
        "0.2.weight",
        "1.2.weight",
    }
    config = {"base_model_name_or_path": "vicuna", "medusa_num_heads": 2, "medusa_num_layers": 2}
    assert json.loads((tmp_path / "old" / "config.json").read_text()) == config
    write_medusa(heads(linears=1, ids=IDS, bias=False), tmp_path / "vllm", "vllm")
    found = load_file(tmp_path / "vllm" / "model.safetensors")
    assert found.keys() == {*(f"blocks.{k}.layers.0.weight" for k in range(3)), "lm_head.weight", "token_map"}
    assert found["token_map"].tolist() == list(IDS)


def test_heads_are_counted_from_tensors_where_configs_are_wrong(decoder: Decoder, tmp_path: Path) -> None:
    folder = altered(write_medusa(heads(num_heads=5, linears=5), tmp_path, "v0.1"), {}, medusa_num_heads=2)
    assert build_medusa(read_medusa(folder), decoder).num_heads == 5


def test_v01_as_safetensors(tmp_path: Path) -> None:
    file = heads()
    write_medusa(file, tmp_path, "v0.1")
    save_file(torch.load(tmp_path / "medusa_lm_head.pt", weights_only=True), tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "medusa_lm_head.pt").unlink()
    assert same(read_medusa(tmp_path), file)


def test_vllms_prefix_and_its_whole_linear_layer_with_a_map(decoder: Decoder, tmp_path: Path) -> None:
    file = heads(linears=1, ids=IDS)
    folder = write_medusa(file, tmp_path, "vllm")
    whole = torch.randn(VOCAB, WIDTH)
    tensors = {**load_file(folder / "model.safetensors"), "lm_head.weight": whole}
    save_file({"medusa_heads." + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    found = read_medusa(folder)
    assert torch.equal(found.tensors["lm_head.weight"], whole[list(IDS)])
    weights = build_medusa(found, decoder)
    assert weights.vocabulary.to_target(torch.tensor([[0, 2]])).tolist() == [[7, 200]]


def test_vllms_original_head_is_one_whatever_its_name(decoder: Decoder, tmp_path: Path) -> None:
    shared = torch.randn(VOCAB, WIDTH)
    copies = {f"lm_heads.{k}.weight": shared.clone() for k in range(3)}
    folder = write_medusa(heads(linears=1), tmp_path, "vllm")
    found = read_medusa(altered(folder, {"lm_head.weight": None, **copies}))
    assert torch.equal(found.tensors["lm_head.weight"], shared)
    found = read_medusa(altered(folder, {"lm_heads.1.weight": None, "lm_heads.2.weight": None}))
    assert torch.equal(found.tensors["lm_head.weight"], shared)
    bare = read_medusa(altered(folder, {"lm_heads.0.weight": None}))
    assert build_medusa(bare, decoder).heads == (decoder.head,)


def test_a_map_of_the_whole_vocabulary_is_not_used(tmp_path: Path) -> None:
    folder = altered(write_medusa(heads(), tmp_path, "vllm"), {"token_map": torch.arange(VOCAB)})
    assert read_medusa(folder).config.draft_token_ids is None


BAD_TENSORS: list[tuple[Layout, dict[str, Tensor | None], str]] = [
    ("v0.1", {"1.0.linear.weight": None}, r"tensor 1\.0\.linear\.weight is missing"),
    ("v0.1", {"1.0.linear.bias": None}, r"tensor 1\.0\.linear\.bias is missing"),
    ("v0.1", {"2.1.weight": None}, r"tensor 2\.1\.weight is missing"),
    ("v0.1", {"surprise": torch.zeros(1)}, r"unknown tensor surprise \(1 in all\)"),
    ("v0.1", {"01.0.linear.weight": torch.zeros(1)}, r"unknown tensor 01\.0\.linear\.weight"),
    ("v0.1", {"999999.999999.linear.weight": torch.zeros(1)}, r"unknown tensor 999999\.999999\.linear\.weight"),
    ("v0.1", {"4.0.linear.weight": torch.zeros(1)}, r"tensor 3\.0\.linear\.weight is missing"),
    ("v0.1", {"0.1.bias": torch.zeros(VOCAB)}, r"unknown tensor 0\.1\.bias"),
    (
        "v0.1",
        {"0.0.linear.weight": torch.zeros(64, 64)},
        r"0\.0\.linear\.weight has shape \[64, 64\], expected \[32, 32\]",
    ),
    ("v0.1", {"0.0.linear.bias": torch.zeros(31)}, r"0\.0\.linear\.bias has shape \[31\], expected \[32\]"),
    ("v0.1", {"0.1.weight": torch.zeros(9, 32)}, r"0\.1\.weight has shape \[9, 32\], expected \[262, 32\]"),
    ("vllm", {"blocks.2.layers.0.weight": None}, r"tensor blocks\.2\.layers\.0\.weight is missing"),
    ("vllm", {"lm_heads.1.weight": None}, r"tensor lm_heads\.1\.weight is missing"),
    ("vllm", {"lm_heads.1.weight": torch.zeros(8, 32)}, r"lm_heads\.1\.weight has shape \[8, 32\]"),
    ("vllm", {"lm_heads.5.weight": torch.zeros(8, 32)}, r"unknown tensor lm_heads\.5\.weight"),
    ("spdbench", {"0.0.linear.weight": None}, r"tensor 0\.0\.linear\.weight is missing"),
    (
        "spdbench",
        {"lm_head.weight": torch.zeros(VOCAB, WIDTH)},
        r"unknown tensor 0\.1\.weight \(3 in all\)",
    ),
]


@pytest.mark.parametrize(("layout", "tensors", "why"), BAD_TENSORS)
def test_tensors_are_checked_one_by_one(
    decoder: Decoder, tmp_path: Path, layout: Layout, tensors: dict[str, Tensor | None], why: str
) -> None:
    folder = altered(write_medusa(heads(), tmp_path / "heads", layout), tensors)
    with pytest.raises(InputError, match=f"{folder}: .*{why}"):
        build_medusa(read_medusa(folder), decoder)


BAD_CONFIGS: list[tuple[Layout, dict[str, Any], str]] = [
    ("spdbench", {"hidden_size": 64}, r"config\.hidden_size is 64, but here it is 32: it was made for another model"),
    ("spdbench", {"vocab_size": 100}, r"config\.vocab_size is 100, but here it is 262"),
    ("spdbench", {"target_family": "qwen3"}, r"config\.target_family is qwen3, but here it is llama"),
    ("spdbench", {"method": "eagle3"}, r"is a drafter for 'eagle3', not for medusa"),
    (
        "spdbench",
        {"draft_token_ids": [1, 2, 2]},
        r"config\.draft_token_ids must hold ids from 0 to 261, each of them once",
    ),
    ("spdbench", {"draft_token_ids": []}, r"draft_token_ids: Tuple should have at least 1 item"),
    ("spdbench", {"draft_token_ids": [1, 2]}, r"0\.1\.weight has shape \[262, 32\], expected \[2, 32\]"),
    ("spdbench", {"head_accuracies": [[0.5]]}, r"head_accuracies are of 1 heads, but there are 3"),
    ("spdbench", {"head_accuracies": [[0.5], [0.5], []]}, r"head_accuracies\.2: expected one number or more"),
    ("spdbench", {"head_accuracies": [[0.5], [1.5], [0]]}, r"head_accuracies\.1: expected .* from 0 to 1"),
    ("spdbench", {"head_accuracies": [[0.5], [0.1], [0.8, 0.3]]}, r"head_accuracies\.2: .* shares of a whole"),
    ("spdbench", {"head_accuracies": [[0.001] * 300] * 3}, r"head_accuracies are of 300 ranks, but 262 tokens"),
    ("spdbench", {"head_accuracies": "high"}, r"head_accuracies: Input should be"),
    ("vllm", {"hidden_size": 64}, r"config\.hidden_size is 64"),
    ("vllm", {"num_heads": 4}, r"config\.json: num_heads is 4, but the tensors are of 3"),
    ("vllm", {"num_hidden_layers": 2}, r"config\.json: num_hidden_layers is 2, but the tensors are of 1"),
    ("vllm", {"medusa_fc_bias": False}, r"blocks\.0\.layers\.0\.bias is there, but config\.medusa_fc_bias is false"),
    ("vllm", {"truncated_vocab_size": 100}, r"tensor token_map is missing, though config\.truncated_vocab_size is 100"),
    (
        "vllm",
        {"original_lm_head": True},
        r"lm_heads\.1\.weight is not lm_heads\.0\.weight, but .*original_lm_head is true",
    ),
]


@pytest.mark.parametrize(("layout", "config", "why"), BAD_CONFIGS)
def test_a_config_for_something_else_says_what_differs(
    decoder: Decoder, tmp_path: Path, layout: Layout, config: dict[str, Any], why: str
) -> None:
    folder = altered(write_medusa(heads(), tmp_path / "heads", layout), {}, **config)
    with pytest.raises(InputError, match=why):
        build_medusa(read_medusa(folder), decoder)


@pytest.mark.parametrize(
    ("token_map", "why"),
    [
        (torch.zeros(5), r"tensor token_map is torch\.float32 of shape \[5\], expected \[5\] ids"),
        (torch.arange(4), r"tensor token_map is torch\.int64 of shape \[4\], expected \[5\] ids"),
        (torch.tensor([1, 2, 3, 4, 262]), r"tensor token_map must hold ids from 0 to 261"),
        (torch.tensor([1, 2, 3, 4, 1]), r"tensor token_map must hold ids .* each of them once"),
        (None, r"tensor token_map is missing"),
    ],
)
def test_a_token_map_is_checked(decoder: Decoder, tmp_path: Path, token_map: Tensor | None, why: str) -> None:
    folder = altered(write_medusa(heads(ids=IDS), tmp_path, "vllm"), {"token_map": token_map})
    with pytest.raises(InputError, match=why):
        build_medusa(read_medusa(folder), decoder)


def test_a_bias_that_vllms_config_promises_is_missed(tmp_path: Path) -> None:
    folder = altered(write_medusa(heads(bias=False), tmp_path, "vllm"), {}, medusa_fc_bias=True)
    with pytest.raises(InputError, match=r"blocks\.0\.layers\.0\.bias is missing, but config\.medusa_fc_bias is true"):
        read_medusa(folder)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    folder = write_medusa(heads(), tmp_path, "vllm")
    altered(folder, {"medusa_heads.lm_heads.0.weight": torch.zeros(VOCAB, WIDTH)})
    with pytest.raises(InputError, match=r"two tensors are called lm_heads\.0\.weight"):
        read_medusa(folder)


def test_folders_that_hold_no_heads(decoder: Decoder, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no Medusa heads"):
        read_medusa(tiny_model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="without weights"):
        read_medusa(tmp_path)
    torch.save({}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(InputError, match=r"tensor 0\.0\.linear\.weight is missing"):
        build_medusa(read_medusa(tmp_path), decoder)


def test_random_heads_are_the_seeds_and_draft_with_the_targets_head(decoder: Decoder) -> None:
    one, again = (random_medusa(decoder, 4, 1) for _ in range(2))
    assert same(one, again)
    assert one.config.trained_tokens == 0
    weights = build_medusa(one, decoder)
    assert weights.num_heads == 4
    assert weights.heads == (decoder.head,)


@pytest.fixture
def medusa2(tiny_model: Path, tmp_path: Path) -> Path:
    """A whole model with heads in its own weights."""
    return with_heads(Path(shutil.copytree(tiny_model, tmp_path / "medusa-2")), heads())


def with_heads(model: Path, file: MedusaFile) -> Path:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, **file.renamed("medusa2")}, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("linears", [0, 3])
def test_a_medusa2_checkpoint_is_a_model_with_heads(tiny_model: Path, tmp_path: Path, linears: int) -> None:
    file = heads(linears=linears)
    folder = with_heads(Path(shutil.copytree(tiny_model, tmp_path / "model")), file)
    assert holds_medusa_heads(folder)
    assert not holds_medusa_heads(tiny_model)
    found = read_medusa(folder, folder)
    assert found.layout == "medusa2"
    assert same(found, file)
    target = tiny.load(folder)
    assert found.sha256 == target.files.sha256
    assert build_medusa(found, target.own_decoder).num_heads == 3


def test_the_target_of_a_medusa2_checkpoint_is_its_model(tiny_model: Path, medusa2: Path) -> None:
    plain, target = tiny.load(tiny_model), tiny.load(medusa2)
    assert target.num_parameters == plain.num_parameters
    ids = plain.decoder.ids(range(9))
    logits = [
        found.decoder.logits(found.decoder.forward(found.decoder.embed(ids), 0, found.decoder.new_cache(9))[0])
        for found in (plain, target)
    ]
    assert torch.equal(*logits)


def test_a_medusa2_checkpoint_drafts_for_no_other_model(tiny_model: Path, medusa2: Path) -> None:
    with pytest.raises(
        InputError, match=f"{medusa2}: is a whole model, .* use it as the model: -m {medusa2} --drafter"
    ):
        read_medusa(medusa2, tiny_model)


def test_other_leftovers_are_refused_still(medusa2: Path) -> None:
    altered(medusa2, {"medusa_heads.0.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"1 tensors have no place in this model, e\.g\. medusa_heads\.0\.weight"):
        tiny.load(medusa2).decoder  # noqa: B018


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"medusa_head.1.0.linear.bias": None}, r"tensor medusa_head\.1\.0\.linear\.bias is missing"),
        ({"medusa_head.2.1.weight": None}, r"tensor medusa_head\.2\.1\.weight is missing"),
        ({"medusa_head.scale": torch.zeros(1)}, r"unknown tensor medusa_head\.scale"),
    ],
)
def test_heads_within_a_model_are_as_strict(
    decoder: Decoder, medusa2: Path, tensors: dict[str, Tensor | None], why: str
) -> None:
    altered(medusa2, tensors)
    with pytest.raises(InputError, match=why):
        build_medusa(read_medusa(medusa2, medusa2), decoder)
