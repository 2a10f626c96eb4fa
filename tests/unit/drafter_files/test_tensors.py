"""A drafter's tensors and vocabulary against a target: what fits, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.errors import InputError
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors
from spdbench.models.cpu.linear import PackedLinear, row_scales
from spdbench.models.decoder import Decoder
from spdbench_backends.drafter_files.folder import DrafterConfig, DrafterFile
from spdbench_backends.drafter_files.tensors import (
    TargetTensors,
    draft_vocabulary,
    mapped_ids,
    random_tensors,
    require_target,
    vocabulary_maps,
)
from tests import tiny

VOCAB = 262
IDS = list(range(1, VOCAB, 3))
EXPECTED = ExpectedTensors({"fc.weight": (4, 8)}, [{"fc.bias": (4,)}, {"q.norm": (3,), "k.norm": (3,)}])
FULL = {"fc.weight": torch.rand(4, 8), "fc.bias": torch.rand(4), "q.norm": torch.rand(3), "k.norm": torch.rand(3)}


def file_of(tensors: dict[str, Tensor]) -> DrafterFile[DrafterConfig]:
    return DrafterFile(Path("head"), "spdbench", DrafterConfig(), tensors)


def test_tensors_that_fit_are_copies_where_the_target_computes(tiny_model: Path) -> None:
    """What was read may lie in a mapped file, also where neither packing nor another dtype makes a copy."""
    for dtype in ("bfloat16", "float32"):
        target = tiny.load(tiny_model, dtype).own_decoder
        found = TargetTensors(file_of(dict(FULL)), EXPECTED, target)
        assert found.keys() == FULL.keys()
        assert found["fc.weight"].dtype == target.dtype
        assert found["fc.weight"].data_ptr() != FULL["fc.weight"].data_ptr()
    some = TargetTensors(file_of({"fc.weight": FULL["fc.weight"]}), EXPECTED, target)
    assert (some.get("fc.bias"), some.norm("q.norm")) == (None, None)
    assert some.head("lm_head.weight", DraftVocabulary(VOCAB)) is target.head
    rows = some.head("lm_head.weight", DraftVocabulary(VOCAB, torch.tensor([5, 3]))).plain()
    assert target.head is not None
    assert torch.equal(rows, target.head.plain()[[5, 3]])


def test_matrices_that_a_file_has_in_8_bits_stay_so(tiny_model: Path) -> None:
    target = tiny.load(tiny_model, "bfloat16").own_decoder
    assert target.head is not None
    scale_O = row_scales(FULL["fc.weight"])
    in_8_bits = {**FULL, "fc.weight.scale": scale_O}
    for tensors, bytes_each in ((FULL, 2), (in_8_bits, 1)):
        found = TargetTensors(file_of(tensors), EXPECTED, target)
        some = DraftVocabulary(VOCAB, torch.arange(0, VOCAB, 2))
        for weight in (found.linear("fc."), found.head("lm_head.weight", some), found.target_head(some)):
            assert isinstance(weight, PackedLinear)
            assert weight.packed.itemsize == bytes_each
        assert (found.target_head(DraftVocabulary(VOCAB)) is target.head) == (bytes_each == 2)
    assert isinstance(target.head, PackedLinear)
    assert target.head.scale is None
    assert torch.equal(found["fc.weight.scale"], scale_O)
    cut = {**in_8_bits, "fc.weight.scale": scale_O[:3]}
    with_less = TargetTensors(file_of(cut), EXPECTED, target)
    assert "fc.weight.scale" not in with_less
    assert with_less.head("lm_head.weight", DraftVocabulary(VOCAB)) is target.head
    exact = TargetTensors(file_of(in_8_bits), EXPECTED, tiny.load(tiny_model).own_decoder)
    assert torch.equal(exact.linear("fc.").plain(), FULL["fc.weight"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fc.weight": None}, r"tensor fc\.weight is missing"),
        ({"k.norm": None}, r"tensor k\.norm is missing"),
        ({"extra": torch.ones(2), "more": torch.ones(2)}, r"unknown tensor extra \(2 in all\)"),
        ({"fc.weight": torch.ones(4, 5)}, r"tensor fc\.weight has shape \[4, 5\], expected \[4, 8\]"),
        ({"q.norm": torch.full((3,), torch.nan)}, r"tensor q\.norm holds numbers that are not finite"),
        ({"q.norm": torch.ones(3).to(torch.float8_e4m3fn)}, r"tensor q\.norm is torch\.float8_e4m3fn; only unqu"),
        ({"fc.weight": torch.ones(2, 2, dtype=torch.int8)}, r"fc\.weight is torch\.int8; only unquantised weights"),
        ({"fc.weight": torch.ones(4, 8).to_sparse()}, r"fc\.weight is not dense"),
        ({"fc.weight": torch.ones(4, 8, device="meta")}, r"fc\.weight is not dense"),
        ({"fc.weight": torch.ones(4, 8, dtype=torch.complex64)}, r"fc\.weight is torch\.complex64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(decoder: Decoder, change: dict[str, Tensor | None], why: str) -> None:
    tensors = {name: tensor for name, tensor in {**FULL, **change}.items() if tensor is not None}
    with pytest.raises(InputError, match=f"head: .*{why}"):
        TargetTensors(file_of(tensors), EXPECTED, decoder)


def test_what_a_drafter_was_made_for_is_compared() -> None:
    require_target(file_of({}), ("config.size", None, 3), ("config.size", 3, 3))
    with pytest.raises(InputError, match=r"head: config\.size is 4, but here it is 3: it was made for another model"):
        require_target(file_of({}), ("config.size", 4, 3))


@pytest.mark.parametrize(
    ("ids", "options", "why"),
    [
        ((5, 3), {}, r"config\.draft_token_ids must hold ascending ids from 0 to 261, each of them once"),
        ((3, 3), {}, "must hold ascending ids"),
        ((), {}, "must hold ascending ids"),
        ((3, VOCAB), {}, "must hold ascending ids"),
        ((3, 2**70), {}, "must hold ascending ids"),
        ((-1, 3), {"ascending": False, "source": "tensor map"}, "tensor map must hold ids from 0 to 261"),
        ((3, 3), {"ascending": False}, "must hold ids from 0 to 261, each of them once"),
        ((3, 5), {"size": 3}, r"config\.draft_vocab_size is 3, but its draft tokens are 2"),
        (None, {"size": 3}, r"config\.draft_vocab_size is 3, but config\.draft_token_ids is missing"),
    ],
)
def test_draft_vocabularies_are_checked(
    decoder: Decoder, ids: tuple[int, ...] | None, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        draft_vocabulary(file_of({}), ids, decoder, **options)


def test_draft_vocabularies_that_fit(decoder: Decoder) -> None:
    assert draft_vocabulary(file_of({}), None, decoder, size=VOCAB).listed is None
    for ids, ascending in (((3, 5), True), ((5, 3), False)):
        found = draft_vocabulary(file_of({}), ids, decoder, ascending=ascending)
        assert (found.listed, found.size) == (ids, 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d2t": torch.ones(len(IDS))}, r"tensor d2t is torch\.float32; expected whole numbers"),
        ({"d2t": torch.zeros(len(IDS), dtype=torch.int64)}, "d2t does not match t2d"),
        ({"d2t": torch.tensor(3)}, r"tensor d2t has shape \[\], expected \[1\]"),
        ({"d2t": torch.zeros(0, dtype=torch.int64)}, "tensor d2t names no draft token"),
        ({"t2d": torch.ones(VOCAB, dtype=torch.bool)}, "names 87 draft tokens, the other 262"),
        ({"t2d": torch.ones(99, dtype=torch.bool)}, r"t2d has shape \[99\], expected \[262\]"),
        ({"d2t": torch.zeros(len(IDS), dtype=torch.int64, device="meta")}, "tensor d2t is not dense"),
        ({"t2d": torch.ones(VOCAB, dtype=torch.complex64)}, r"tensor t2d is torch\.complex64; expected whole numbers"),
    ],
)
def test_maps_that_do_not_match_are_refused(change: dict[str, Tensor | None], why: str) -> None:
    maps: dict[str, Tensor | None] = dict(vocabulary_maps(torch.tensor(IDS), VOCAB))
    assert mapped_ids(file_of({}), VOCAB) is None
    tensors = {name: tensor for name, tensor in maps.items() if tensor is not None}
    assert mapped_ids(file_of(tensors), VOCAB) == IDS
    changed = {name: tensor for name, tensor in (maps | change).items() if tensor is not None}
    with pytest.raises(InputError, match=why):
        mapped_ids(file_of(changed), VOCAB)


def test_random_tensors_are_those_of_the_seed() -> None:
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "norm.weight": (4,)}
    one, again, other = (random_tensors(shapes, seed) for seed in (1, 1, 2))
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == shapes
    assert all(torch.equal(one[name], again[name]) for name in shapes)
    assert not torch.equal(one["a.weight"], other["a.weight"])
    assert one["a.bias"].tolist() == [0, 0, 0]
    assert one["norm.weight"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["d2t", "t2d"])
def test_one_map_is_enough_as_the_other_follows_from_it(name: str) -> None:
    assert mapped_ids(file_of({name: vocabulary_maps(torch.tensor(IDS), VOCAB)[name]}), VOCAB) == IDS
