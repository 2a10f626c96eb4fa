"""Medusa's heads and trees: every layout there and back, the arithmetic, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree, from_paths
from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.types import Sampling
from spdbench_backends.medusa.formats import (
    Layout,
    MedusaFile,
    build_medusa,
    holds_medusa_heads,
    random_medusa,
    read_medusa,
    write_medusa,
)
from spdbench_backends.medusa.trees import check_levels, find_tree
from spdbench_backends.medusa.typical import TypicalAcceptance
from tests import tiny

IDS = tuple(range(1, 262, 4))


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return tiny.load(tiny_model).own_decoder


def heads(own: bool = False, shared: bool = False, ids: bool = False, depth: int = 1) -> MedusaFile:
    """Three heads with weights large enough to tell apart."""
    generator, size = torch.Generator().manual_seed(3), len(IDS) if ids else 262
    tensors: dict[str, Tensor] = {}
    for k in range(3):
        for j in range(depth):
            tensors[f"{k}.{j}.linear.weight"] = torch.randn(32, 32, generator=generator) * 0.2
            tensors[f"{k}.{j}.linear.bias"] = torch.randn(32, generator=generator)
        if own:
            tensors[f"{k}.{depth}.weight"] = torch.randn(size, 32, generator=generator)
    if shared:
        tensors["lm_head.weight"] = torch.randn(size, 32, generator=generator)
    return MedusaFile(Path("made"), "v2", tensors, "", draft_token_ids=IDS if ids else None)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("v0.1", {"own": True}),
        ("v0.1", {"own": True, "depth": 2}),
        ("v2", {}),
        ("v2", {"depth": 2}),
        ("vllm", {"own": True}),
        ("vllm", {"shared": True, "ids": True}),
        ("vllm", {"own": True, "depth": 2}),
        ("spdbench", {}),
        ("spdbench", {"ids": True}),
        ("spdbench", {"shared": True, "ids": True}),
    ],
)
def test_heads_go_there_and_back(decoder: Decoder, tmp_path: Path, layout: Layout, shape: dict[str, Any]) -> None:
    file = heads(**shape)
    found = read_medusa(write_medusa(file, tmp_path, layout))
    assert found.layout == layout
    assert found.tensors.keys() == file.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert found.draft_token_ids == file.draft_token_ids
    weights = build_medusa(found, decoder)
    x = torch.randn(1, 32)
    rows = list(IDS) if shape.get("ids") else list(range(262))
    assert decoder.head is not None
    for k, logits in enumerate(weights.logits(x, 3)):
        state = x
        for j in range(shape.get("depth", 1)):
            weight, bias = (file.tensors[f"{k}.{j}.linear.{name}"] for name in ("weight", "bias"))
            state = state + silu(linear(state, weight, bias))
        own = file.tensors.get(f"{k}.{shape.get('depth', 1)}.weight", file.tensors.get("lm_head.weight"))
        expected = linear(state, decoder.head.plain()[rows] if own is None else own)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert weights.token_ids(torch.tensor([0, 2])).tolist() == [rows[0], rows[2]]
    assert weights.logits(x, 2).shape[0] == 2


def test_layouts_that_cannot_hold_the_heads_are_refused(tmp_path: Path) -> None:
    for layout, shape in (("v2", {"own": True}), ("v0.1", {}), ("vllm", {}), ("v0.1", {"own": True, "ids": True})):
        with pytest.raises(InputError, match=f"cannot be written as {layout}"):
            write_medusa(heads(**shape), tmp_path, layout)  # type: ignore[arg-type]


def test_our_own_folder_keeps_what_was_measured(tmp_path: Path) -> None:
    file = replace(heads(), trained_tokens=5, head_accuracies=((0.5, 0.1), (0.3,)))
    found = read_medusa(write_medusa(file, tmp_path, "spdbench"))
    assert (found.trained_tokens, found.head_accuracies) == (5, ((0.5, 0.1), (0.3,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"extra": torch.ones(2)}), "unknown tensor extra"),
        (lambda t: t.pop("1.0.linear.weight"), "tensor 1.0.linear.weight is missing"),
        (lambda t: t.update({"0.0.linear.weight": torch.ones(8, 8)}), r"has shape \[8, 8\], expected \[32, 32\]"),
        (lambda t: t.update({"0.0.linear.bias": torch.full((32,), torch.inf)}), "not finite"),
        (lambda t: t.clear() or t.update({"lm_head.weight": torch.ones(262, 32)}), "holds no heads"),
    ],
)
def test_what_does_not_fit_is_named(
    decoder: Decoder, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = write_medusa(heads(), tmp_path, "v2")
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    change(tensors)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    with pytest.raises(InputError, match=message):
        build_medusa(read_medusa(folder), decoder)


def test_folders_that_hold_no_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config"):
        read_medusa(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no Medusa heads"):
        read_medusa(tmp_path)
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_medusa(tmp_path)
    (tmp_path / "config.json").write_text('{"method": "spd"}')
    with pytest.raises(InputError, match="a drafter for 'spd'"):
        read_medusa(tmp_path)


def test_a_fine_tuned_model_brings_its_heads(tiny_model: Path, tmp_path: Path) -> None:
    """Medusa-2: one folder is the target and its heads, and fits no other target."""
    folder = tiny.make_model(tmp_path / "medusa-2", seed=5)
    file = folder / "model.safetensors"
    target = tiny.load(folder)
    extra = {f"medusa_head.{name}": tensor for name, tensor in random_medusa(target.own_decoder, 2, 1).tensors.items()}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    assert holds_medusa_heads(folder)
    assert not holds_medusa_heads(tiny_model)
    again = tiny.load(folder)
    weights = build_medusa(read_medusa(folder, folder), again.own_decoder)
    assert weights.num_heads == 2
    with pytest.raises(InputError, match="measure it with -m"):
        read_medusa(folder, tiny_model)


def test_the_named_tree_is_the_published_one() -> None:
    paths = find_tree("mc_sim_7b_63")
    assert Counter(map(len, paths)) == {1: 10, 2: 28, 3: 23, 4: 2}
    assert {(0, 9), (1, 6), (2, 2), (0, 0, 9), (0, 1, 2), (1, 0, 1), (2, 0, 0), (0, 0, 0, 1)} <= set(paths)
    assert len(from_paths(paths)) == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [0, 1, 2]]", r"path \[0, 1, 2\] has no parent: \[0, 1\] is missing"),
        ("[[0], [0]]", r"path \[0\] is there twice"),
        ("[[-1]]", "is no path"),
        ("[[0.5]]", "is no path"),
        ("[]", "list of paths"),
        ("{a: 1}", "list of paths"),
        ("[[0", "cannot be read"),
    ],
)
def test_files_that_are_no_tree_say_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tree.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        find_tree(str(tmp_path / "tree.yaml"))


def test_trees_come_from_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(json.dumps([[1], [0], [0, 2]]))
    assert find_tree(str(tmp_path / "tree.json")) == [(0,), (1,), (0, 2)]
    with pytest.raises(InputError, match="did you mean 'mc_sim_7b_63'"):
        find_tree("mc_sim_7b_36")
    with pytest.raises(InputError, match="has 3 levels, but there are 2 heads"):
        check_levels([(0,), (0, 0), (0, 0, 0)], 2)


def test_typical_acceptance_takes_what_is_likely_enough() -> None:
    """By hand: p = softmax of logits at the parent, bound min(epsilon, delta e^-H)."""
    tree = from_paths([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    ids = torch.tensor([0, 1, 2, 3, 1, 2])
    logits = torch.zeros(6, 4)
    logits[0] = torch.tensor([0.0, 2.0, 2.1, -9.0])  # both 1 and 2 pass
    logits[1] = torch.tensor([9.0, 0.0, 0.0, 0.0])  # 3 does not
    logits[2] = torch.tensor([-9.0, 1.0, 3.0, -9.0])  # 1 and 2 pass, 2 is the likelier
    verdict = TypicalAcceptance(0.09, 0.3)(logits, DraftTree(tree, ids), Sampler(Sampling(1.0), 0))
    assert verdict.path == (0, 2, 5)
    assert verdict.token_ids[:2] == (2, 2)
    assert (verdict.drafted, verdict.judged) == (2, 2)
    strict = TypicalAcceptance(0.99, 5.0)(logits, DraftTree(tree, ids), Sampler(Sampling(1.0), 0))
    assert (strict.path, strict.judged) == ((0,), 1)
    greedy = TypicalAcceptance(0.09, 0.3)(logits, DraftTree(tree, ids), Sampler(Sampling(), 0))
    assert greedy.path == (0, 2, 5)
