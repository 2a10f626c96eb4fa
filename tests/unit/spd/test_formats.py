"""Reading heads: the published file and our folder, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench.types import Sampling, Step
from spdbench_backends.spd.drafter import HeadDrafter
from spdbench_backends.spd.formats import build_head, random_head, read_head
from spdbench_backends.spd.plan import FeaturePlan
from tests import tiny
from tests.unit.spd.inline import generate

pytestmark = pytest.mark.usefixtures("own_cache")

STAGES = split_evenly(6, 3)


def published(
    decoder: Decoder,
    path: Path,
    tensors: dict[str, Tensor] | None = None,
    stages: tuple[range, ...] = STAGES,
    **config: Any,
) -> Path:
    """A version 11 file as the reference code writes it, with a draft vocabulary of every second id."""
    head = random_head(decoder, stages, 5, num_layers=2)
    ids = list(range(0, 262, 2))
    assert decoder.head is not None
    state = {**head.tensors, "lm_head.weight": decoder.head.plain()[ids]}
    state.update(tensors or {})
    full = {
        **head.config.model_dump(),
        "draft_vocab_size": len(ids),
        "draft_token_ids": ids,
        "model_type": "llama",
        **config,
    }
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}, "config": full}, path)
    return path


def drafts(decoder: Decoder, path: Path) -> list[Step]:
    drafter = HeadDrafter(build_head(read_head(path), decoder, STAGES))
    return list(generate(decoder, STAGES, drafter, tiny.greedy(tiny.PROMPT, 20)))


def test_a_published_head_drafts_within_its_vocabulary(decoder: Decoder, tmp_path: Path) -> None:
    head = build_head(read_head(published(decoder, tmp_path / "head.pt")), decoder, STAGES)
    drafter = HeadDrafter(head)
    steps = list(generate(decoder, STAGES, drafter, tiny.greedy(tiny.PROMPT, 20)))
    assert sum(step.judged for step in steps) == 19
    greedy = Sampler(Sampling(), 0)
    assert {drafter._draft(row_U, greedy).token_id for row_U in torch.eye(131)} == set(range(0, 262, 2))


def test_a_folder_of_ours_is_the_same_head(decoder: Decoder, tmp_path: Path) -> None:
    file = read_head(published(decoder, tmp_path / "head.pt"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(file.config.model_dump_json())
    save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, folder / "model.safetensors")
    assert drafts(decoder, folder) == drafts(decoder, tmp_path / "head.pt")


def test_a_file_without_version_is_version_11(decoder: Decoder, tmp_path: Path) -> None:
    path = published(decoder, tmp_path / "head.pt")
    content = torch.load(path, weights_only=True)
    del content["config"]["version"]
    torch.save(content, tmp_path / "old.pt")
    assert drafts(decoder, tmp_path / "old.pt") == drafts(decoder, path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 13}, r"version 13 is not known. Allowed: 11, 12, 10"),
        (
            {"version": 12, "stage_layers": None},
            r"config.stage_layers is missing, which a head of version 12 has to list",
        ),
        ({"num_layers": 8}, r"config.num_layers is 8, but here it is 6"),
        ({"hidden_size": 64}, r"config.hidden_size is 64, but here it is 32: it was made for another model"),
        ({"vocab_size": 100}, r"config.vocab_size is 100, but here it is 262"),
        ({"num_stages": 2}, r"config.num_stages is 2, but here it is 3; use -o spd.stages=2"),
        ({"model_type": "qwen3"}, r"config.model_type is qwen3, but here it is llama"),
        ({"draft_token_ids": [1.5] * 131}, r"config.draft_token_ids.0: Input should be a valid integer"),
        ({"draft_token_ids": [], "draft_vocab_size": 0}, r"config.draft_vocab_size: Input should be greater"),
        ({"aggr_feature_bound": [0, 1.5]}, r"config.aggr_feature_bound.1: Input should be a valid integer"),
        ({"aggr_feature_bound": [0, 2, 9]}, r"aggr_feature_bound: anchor 9 lies beyond"),
        ({"aggr_feature_bound": None}, r"config.aggr_feature_bound: Input should be a valid array"),
        ({"draft_token_ids": [5, 3]}, r"draft_token_ids must hold ascending ids from 0 to 261"),
        ({"draft_token_ids": None}, r"draft_vocab_size is 131, but config.draft_token_ids is missing"),
        ({"num_spec_layers": 1}, r"unknown tensor spec_layers.1."),
        ({"num_spec_layers": 10**9}, r"config.num_spec_layers: Input should be less than or equal to 1000"),
        ({"num_spec_layers": 3}, r"tensor spec_layers.2..* is missing"),
    ],
)
def test_a_head_for_something_else_says_what_differs(
    decoder: Decoder, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputError, match=why):
        build_head(read_head(published(decoder, tmp_path / "head.pt", **change)), decoder, STAGES)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"aggr_projs.1.weight": None}, r"tensor aggr_projs.1.weight is missing"),
        (
            {"aggr_projs.1.weight": torch.zeros(32, 32)},
            r"aggr_projs.1.weight has shape \[32, 32\], expected \[32, 64\]",
        ),
        ({"surprise": torch.zeros(1)}, r"unknown tensor surprise"),
        ({"surprise": "text"}, r"is not a mapping from names to tensors: surprise is a str"),
        ({"spec_layers.0.self_attn.q_norm.weight": None}, r"spec_layers.0.self_attn.q_norm.weight is missing"),
    ],
)
def test_tensors_are_checked_one_by_one(decoder: Decoder, tmp_path: Path, tensors: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        build_head(read_head(published(decoder, tmp_path / "head.pt", tensors)), decoder, STAGES)


@pytest.mark.parametrize("counts", [[3, 2, 1], [1, 3, 2], [4, 1, 1]])
def test_a_cut_that_reaches_other_anchors_is_refused(decoder: Decoder, tmp_path: Path, counts: list[int]) -> None:
    with pytest.raises(InputError, match=r"was trained for stages of 2,2,2 layers; cut into .* anchors \[0, 2, 5, 6\]"):
        build_head(read_head(published(decoder, tmp_path / "head.pt")), decoder, split_by_counts(6, counts))


def test_a_cut_that_reaches_the_same_anchors_is_as_good_as_an_even_one(decoder: Decoder, tmp_path: Path) -> None:
    file = read_head(published(decoder, tmp_path / "head.pt"))
    uneven, even = (build_head(file, decoder, stages).plan for stages in (split_by_counts(6, [3, 1, 2]), STAGES))
    assert isinstance(uneven, FeaturePlan)
    assert isinstance(even, FeaturePlan)
    assert uneven.row_types == even.row_types == (0, 1, 1, 3)


def test_a_head_trained_on_uneven_stages_says_so(decoder: Decoder, tmp_path: Path) -> None:
    stages = split_by_counts(6, [1, 4, 1])
    path = published(decoder, tmp_path / "head.pt", stage_layers=[1, 4, 1])
    assert build_head(read_head(path), decoder, stages).plan.stages == stages
    with pytest.raises(InputError, match="was trained for stages of 1,4,1 layers"):
        build_head(read_head(path), decoder, STAGES)
    for layers, why in (
        ([1, 4, 2], "stage_layers=1,4,2: adds up to 7 layers, but the model has 6"),
        ("1;4;2", "stage_layers=1,4,2: adds up to 7 layers, but the model has 6"),
        ([1, 5], "num_stages is 3, but stage_layers lists 2"),
        ("1;many;2", r"config.stage_layers.1: Input should be a valid integer"),
    ):
        path = published(decoder, tmp_path / "b.pt", version=12, stage_layers=layers)
        with pytest.raises(InputError, match=why):
            build_head(read_head(path), decoder, STAGES)


def test_files_that_are_no_heads(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as weights"):
        read_head(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="expected the keys state_dict and config"):
        read_head(tmp_path / "other.pt")
    contents: list[tuple[dict[str, object], str]] = [
        ({"state_dict": {}, "config": None}, "its config is not a mapping"),
        ({"state_dict": [], "config": {}}, "is not a mapping from names to tensors"),
    ]
    for content, why in contents:
        torch.save(content, tmp_path / "shape.pt")
        with pytest.raises(InputError, match=why):
            read_head(tmp_path / "shape.pt")


def test_a_head_trained_on_nominal_rows_is_lossless_too(decoder: Decoder, tmp_path: Path) -> None:
    from spdbench.decoding.autoregressive import decode

    path = published(decoder, tmp_path / "head.pt", trained_with_use_deepest=False)
    drafter = HeadDrafter(build_head(read_head(path), decoder, STAGES))
    request = tiny.greedy(tiny.PROMPT, 20)
    ids = [token for step in generate(decoder, STAGES, drafter, request) for token in step.token_ids]
    assert ids == list(decode(decoder, request))
