"""Medusa's training against the heads that decode: the same drafts, the same files, measured accuracies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.target import Target
from spdbench.training.recipe import Batch, Counts, Teacher
from spdbench.training.soft_targets import draft_rows
from spdbench_backends.medusa.drafter import build_medusa
from spdbench_backends.medusa.formats import read_medusa
from spdbench_backends.medusa.train import MedusaRecipe
from tests import tiny
from tests.unit.draft_verify.medusa_files import started
from tests.unit.draft_verify.training import (
    ABOUT,
    DRAFT_IDS,
    answers,
    check_that_bfloat16_changes_little,
    check_that_silence_costs_nothing,
    make_batch,
    round_weights,
    train,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def target(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """With weights that bfloat16 holds exactly: some layouts store the target's head in it, and some borrow it, and
    where they differed, a near tie between two drafts could fall either way."""
    folder = tmp_path_factory.mktemp("target") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: each.bfloat16().float() for name, each in weights.items()}, folder / "model.safetensors")
    return tiny.load(folder)


@pytest.fixture(scope="module")
def decoder(target: Target) -> Decoder:
    return target.own_decoder


def fresh(decoder: Decoder, ids_U: torch.Tensor | None = DRAFT_IDS, **options: Any) -> MedusaRecipe:
    torch.manual_seed(0)
    return MedusaRecipe(MedusaRecipe.Options(**options), Teacher(decoder), ids_U, None)


@pytest.fixture(scope="module")
def batch(decoder: Decoder) -> Batch:
    return make_batch(decoder, answers(decoder), fresh(decoder).hidden_indices)


@pytest.fixture(scope="module")
def trained(decoder: Decoder, batch: Batch) -> MedusaRecipe:
    recipe = fresh(decoder, None, heads=3, layers=2)
    train(recipe, batch, 150)
    round_weights(recipe)
    return recipe


def test_a_fresh_head_is_the_targets_own(decoder: Decoder, batch: Batch, tmp_path: Path) -> None:
    fresh(decoder).write(tmp_path, ABOUT, "spdbench")
    weights = build_medusa(read_medusa(tmp_path), decoder)
    state = decoder.normed(batch.states[6][0, :1])
    assert decoder.head is not None
    with torch.inference_mode():
        for logits in weights.logits(state, 4):
            torch.testing.assert_close(logits, decoder.head(state)[0, DRAFT_IDS])


def test_training_teaches_every_head(decoder: Decoder, batch: Batch, trained: MedusaRecipe) -> None:
    _, before = fresh(decoder, None, heads=3, layers=2).loss(batch)
    _, after = trained.loss(batch)
    for level in range(3):
        assert after[f"loss_{level}"] < 0.9 * before[f"loss_{level}"]
        assert after[f"top1_{level}"] > before[f"top1_{level}"] + 0.1


def test_acceptance_is_what_decoding_does_from_every_token(
    decoder: Decoder, batch: Batch, trained: MedusaRecipe, tmp_path: Path
) -> None:
    trained.write(tmp_path, ABOUT, "spdbench")
    weights = build_medusa(read_medusa(tmp_path), decoder)
    expected, rows = Counts(), draft_rows(batch)
    with torch.inference_mode():
        for row in range(len(batch.ids_BS)):
            for token in rows.tokens_BR[row, rows.real[row]].tolist():
                judged, accepted = [0] * 3, [0] * 3
                drafts = weights.logits(decoder.normed(batch.states[6][row, token][None]), 3).argmax(dim=-1).tolist()
                for level, draft in enumerate(drafts):
                    at = token + 1 + level
                    if at >= batch.ids_BS.shape[1] or not batch.answers_BS[row, at]:
                        break
                    judged[level] = 1
                    if draft != int(batch.argmax_BS[row, at]):
                        break
                    accepted[level] = 1
                expected += Counts(tuple(judged), tuple(accepted))
    assert trained.acceptance(batch) == expected
    assert all(expected.accepted)


@pytest.mark.parametrize("layout", MedusaRecipe.formats)
@pytest.mark.parametrize("tree", ["chain", "mc_sim_7b_63"])
def test_every_layout_drafts_alike(
    target: Target, trained: MedusaRecipe, tmp_path: Path, layout: str, tree: str
) -> None:
    if tree != "chain":
        (tmp_path / "tree.json").write_text("[[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]")
        tree = str(tmp_path / "tree.json")
    runs = []
    request = tiny.greedy(tiny.PROMPT, 24)
    for name in ("spdbench", layout):
        trained.write(tmp_path / name, ABOUT, name)
        backend = started(target, tmp_path / name, tree=tree)
        backend.prepare(request)
        runs.append([(s.drafted, s.judged, s.accepted, s.token_ids) for s in backend.generate(request)])
    assert read_medusa(tmp_path / layout).layout == {"medusa": "v0.1"}.get(layout, layout)
    assert runs[0] == runs[1]
    assert [token for *_, ids in runs[0] for token in ids] == list(decode(target.decoder, request))
    assert sum(accepted for _, _, accepted, _ in runs[0]) > 5


def test_heads_in_8_bits_are_lossless_and_draft_nearly_as_well(
    tiny_model: Path, trained: MedusaRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, request, accepted, sizes = tiny.load(tiny_model, "bfloat16"), tiny.greedy(tiny.PROMPT, 24), [], []
    for storage in ("bfloat16", "int8"):
        options = MedusaRecipe.Options(heads=3, layers=2, storage=storage)  # type: ignore[call-arg]
        monkeypatch.setattr(trained, "_options", options)
        trained.write(tmp_path / storage, ABOUT, "spdbench")
        backend = started(target, tmp_path / storage, tree="chain")
        backend.prepare(request)
        steps = list(backend.generate(request))
        assert [token for step in steps for token in step.token_ids] == list(decode(target.decoder, request))
        accepted.append(sum(step.accepted for step in steps))
        sizes.append(build_medusa(read_medusa(tmp_path / storage), target.own_decoder).nbytes)
    assert sizes[1] < 0.6 * sizes[0]
    assert accepted[1] >= accepted[0] - 2 > 1
    for layout in MedusaRecipe.formats[1:]:
        with pytest.raises(InputError, match=f"--format {layout}: knows no matrices in 8 bits; leave out -o storage="):
            trained.require_layout(layout)


def test_a_draft_vocabulary_is_written_where_a_layout_has_a_place_for_it(decoder: Decoder, tmp_path: Path) -> None:
    recipe = fresh(decoder)
    for layout in ("spdbench", "vllm"):
        recipe.require_layout(layout)
        recipe.write(tmp_path / layout, ABOUT, layout)
        file = read_medusa(tmp_path / layout)
        assert file.config.draft_token_ids == tuple(DRAFT_IDS.tolist())
        assert ("lm_head.weight" in file.tensors) == (layout == "vllm")
    for layout in ("v0.1", "v2"):
        with pytest.raises(InputError, match="knows no draft vocabulary; give --draft-vocab 262"):
            recipe.require_layout(layout)
        fresh(decoder, None).require_layout(layout)
        with pytest.raises(InputError, match="knows no draft vocabulary"):
            recipe.write(tmp_path / layout, ABOUT, layout)


def test_accuracies_are_those_of_the_last_measurement_and_choose_the_tree(
    target: Target, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(tmp_path))
    recipe = fresh(target.own_decoder, heads=2)
    recipe.write(tmp_path / "unmeasured", ABOUT, "spdbench")
    assert read_medusa(tmp_path / "unmeasured").config.head_accuracies == ()
    recipe.acceptance(batch)
    train(recipe, batch, 60)
    counts = recipe.acceptance(batch)
    about = type(ABOUT)("tiny", target.files.sha256, "d", 5, 0, counts.rates)
    recipe.write(tmp_path / "measured", about, "spdbench")
    file = read_medusa(tmp_path / "measured")
    assert [len(ranks) for ranks in file.config.head_accuracies] == [10, 10]
    assert file.config.head_accuracies[0][0] == pytest.approx(counts.rates[0], abs=1e-6)
    config = json.loads((tmp_path / "measured" / "config.json").read_text())
    assert (config["model_id"], config["data_sha256"], config["seed"]) == ("tiny", "d", 0)
    assert config["acceptance_by_position"] == list(counts.rates)
    backend = started(target, "auto")
    info = backend.describe().drafter
    assert info is not None
    assert (info.id, info.method, info.trained_tokens) == ("measured", "medusa", 5)
    assert "nodes" in backend.describe().chosen["tree"]


def test_a_batch_without_answers_costs_nothing(decoder: Decoder, batch: Batch) -> None:
    check_that_silence_costs_nothing(fresh(decoder), batch)


def test_bfloat16_changes_little(decoder: Decoder, batch: Batch) -> None:
    check_that_bfloat16_changes_little(fresh(decoder), batch)
