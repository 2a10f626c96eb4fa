"""Training sees what decoding sees: the same rows, the same drafts, the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench.training.layers import angles
from spdbench.training.recipe import Batch, Provenance, Teacher
from spdbench.types import Step
from spdbench_backends.spd.drafter import ExitDrafter, HeadDrafter
from spdbench_backends.spd.exit_formats import build_exit, read_exit
from spdbench_backends.spd.formats import build_head, read_head
from spdbench_backends.spd.plan import DeepestRows, FeaturePlan
from spdbench_backends.spd.train import PUBLISHED, SPDRecipe, SPDTrainOptions
from spdbench_backends.spd.train_ppsd import PPSDRecipe
from tests import tiny
from tests.unit.spd.inline import generate

pytestmark = pytest.mark.usefixtures("own_cache")

ABOUT = Provenance("tiny", "a" * 64, "b" * 64, trained_tokens=7, seed=0, acceptance_by_position=(0.5,))
IDS = list(range(30, 46))


@pytest.fixture(scope="module")
def teacher(decoder: Decoder) -> Teacher:
    return Teacher(decoder)


def spd(teacher: Teacher, stages: int | None, ids_U: Tensor | None = None, **options: Any) -> SPDRecipe:
    """A recipe whose weights bfloat16 can hold, so that files lose nothing."""
    torch.manual_seed(1)
    recipe = SPDRecipe(SPDTrainOptions(**options), teacher, ids_U, stages)
    for weight in recipe.module.parameters():
        weight.data = weight.data.bfloat16().float()
    return recipe


def hidden_states(decoder: Decoder, ids: list[int]) -> dict[int, Tensor]:
    hidden_SM = decoder.embed(decoder.ids(ids))
    _, states = decoder.forward(
        hidden_SM, 0, decoder.new_cache(len(ids)), hidden_indices=range(decoder.config.num_layers + 1)
    )
    return states


def decoders_logits(
    recipe: SPDRecipe, plan: FeaturePlan, decoder: Decoder, folder: Path, newest: int, fill: int
) -> Tensor:
    """What decoding computes with `fill` tokens in flight, the newest at `newest`, from the recipe's own files."""
    states = hidden_states(decoder, IDS)
    recipe.write(folder, ABOUT, "spdbench")
    module = build_head(read_head(folder), decoder, plan.stages).new_module(len(IDS))
    rows = DeepestRows(plan)
    finished = newest - fill + 1
    prompt = {index: state[:finished] for index, state in states.items()}
    module.start(len(rows.start(finished)), prompt, finished)
    for depth in range(fill):
        layers_done = plan.stages[depth - 1].stop if depth else 0
        place = newest - depth
        module.observe(place, {k: state[place : place + 1] for k, state in states.items() if k <= layers_done})
    in_flight = [newest - stage if stage < fill else -1 for stage in range(plan.full_depth)]
    return module.logits(rows.next(in_flight, newest))


@pytest.mark.parametrize(
    ("stages", "options"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (3, {"layers": 2}),
        (None, {"stage_layers": "3,1,2", "layers": 2}),
        (3, {"anchors": "0,2,5,6", "layers": 2}),  # two depths share a row type, one type has no depth
        (6, {"layers": 3, "head": "trained"}),
        (None, {"stage_counts": "2,3,6,1"}),
        (None, {"stage_counts": "6,2", "layers": 2, "anchors": "0,2,3,5,6"}),
    ],
)
def test_training_sees_what_decoding_sees_full_and_while_filling(
    decoder: Decoder, teacher: Teacher, tmp_path: Path, stages: int | None, options: dict[str, Any]
) -> None:
    recipe = spd(teacher, stages, **options)
    states = {index: state[None] for index, state in hidden_states(decoder, IDS).items()}
    tables = angles(decoder.rotary, torch.arange(len(IDS)))
    fills = [(plan, fill) for plan in recipe._plans for fill in range(1, plan.full_depth + 1)]
    for plan, fill in fills:
        with torch.no_grad():
            rows = recipe.module(plan, states, *tables, fill)[0][0]
            logits = torch.nn.functional.linear(teacher.normed(rows), recipe._head)
        for newest in (8, 15):
            expected = decoders_logits(recipe, plan, decoder, tmp_path, newest, fill)
            torch.testing.assert_close(logits[newest], expected, atol=1e-4, rtol=1e-4)


def acceptance(decoder: Decoder, path: Path) -> list[Step]:
    drafter = HeadDrafter(build_head(read_head(path), decoder, STAGES))
    return list(generate(decoder, STAGES, drafter, tiny.greedy(tiny.PROMPT, 24)))


STAGES = tuple(range(first, first + 2) for first in (0, 2, 4))


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_both_formats_are_the_same_head(
    decoder: Decoder, teacher: Teacher, tmp_path: Path, head: str, storage: str
) -> None:
    recipe = spd(teacher, 3, torch.arange(0, 262, 2), head=head, storage=storage)
    ours, published = tmp_path / "ours", tmp_path / "published"
    for folder, layout in ((ours, "spdbench"), (published, "spd-v11")):
        folder.mkdir()
        recipe.write(folder, ABOUT, layout)
    assert ("lm_head.weight" in read_head(ours).tensors) == (head == "trained")
    assert acceptance(decoder, ours) == acceptance(decoder, published / PUBLISHED) == acceptance(decoder, published)


def test_a_published_file_has_to_hold_its_head(decoder: Decoder, teacher: Teacher, tmp_path: Path) -> None:
    spd(teacher, 3).write(tmp_path, ABOUT, "spd-v11")
    content = torch.load(tmp_path / PUBLISHED)
    del content["state_dict"]["lm_head.weight"]
    torch.save(content, tmp_path / PUBLISHED)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        build_head(read_head(tmp_path / PUBLISHED), decoder, STAGES)


def test_a_head_says_how_many_layers_it_was_trained_for(teacher: Teacher, tmp_path: Path) -> None:
    """By its anchors alone it would fit: they are within the layers of a deeper model of the same width."""
    deeper = tiny.load(tiny.make_model(tmp_path / "deeper", num_hidden_layers=9)).own_decoder
    spd(teacher, 3).write(tmp_path / "head", ABOUT, "spdbench")
    with pytest.raises(InputError, match=r"config\.num_layers is 6, but here it is 9: it was made for another model"):
        build_head(read_head(tmp_path / "head"), deeper, split_evenly(9, 3))


def test_uneven_stages_have_no_place_in_a_published_file(teacher: Teacher, tmp_path: Path) -> None:
    uneven = spd(teacher, None, stage_layers="1,2,3")
    uneven.require_layout("spdbench")
    spd(teacher, None, stage_layers="2,2,2").require_layout("spd-v11")
    with pytest.raises(InputError, match="equal stages only, not 1,2,3 layers; give --stages N that divides 6"):
        uneven.require_layout("spd-v11")
    with pytest.raises(InputError, match="equal stages only"):
        uneven.write(tmp_path, ABOUT, "spd-v11")
    assert not list(tmp_path.iterdir())


def test_the_config_says_where_a_head_comes_from(teacher: Teacher, tmp_path: Path) -> None:
    spd(teacher, None, torch.arange(100), stage_layers="1,2,3").write(tmp_path, ABOUT, "spdbench")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["stage_layers"] == [1, 2, 3]
    assert config["aggr_feature_bound"] == [0, 1, 3, 6]
    assert config["draft_token_ids"] == list(range(100))
    assert config["model_sha256"] == "a" * 64
    assert config["acceptance_by_position"] == [0.5]


@pytest.mark.parametrize("counts", [(6,), (3, 3), (2, 2, 2), (1, 1, 1, 1, 1, 1), (4, 2), (1, 2, 1, 2)])
def test_a_head_for_any_number_of_stages_drafts_for_every_cut(
    decoder: Decoder, teacher: Teacher, tmp_path: Path, counts: tuple[int, ...]
) -> None:
    """It learned in others, and reads the row types by the layers that tokens have passed."""
    recipe = spd(teacher, None, stage_counts="3,2", layers=2)
    plan = FeaturePlan(recipe._plans[0].anchors, split_by_counts(6, counts), any_stages=True)
    states = {index: state[None] for index, state in hidden_states(decoder, IDS).items()}
    tables = angles(decoder.rotary, torch.arange(len(IDS)))
    for fill in range(1, len(counts) + 1):
        with torch.no_grad():
            rows = recipe.module(plan, states, *tables, fill)[0][0]
            logits = torch.nn.functional.linear(teacher.normed(rows), recipe._head)
        expected = decoders_logits(recipe, plan, decoder, tmp_path, 12, fill)
        torch.testing.assert_close(logits[12], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="is for one number of stages; give --stages in place of"):
        recipe.require_layout("spd-v11")


@pytest.mark.parametrize("value", [[], [0], ["2"], "2", 2])
def test_stage_counts_that_are_none_are_one_message(teacher: Teacher, tmp_path: Path, value: object) -> None:
    spd(teacher, None, stage_counts="3,2").write(tmp_path, ABOUT, "spdbench")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "stage_counts": value}))
    with pytest.raises(InputError, match=r"config\.stage_counts"):
        read_head(tmp_path)


def test_a_head_goes_on_with_more_anchors_as_it_was(decoder: Decoder, teacher: Teacher) -> None:
    former, wider = spd(teacher, 3, layers=2), spd(teacher, None, stage_counts="3,6", layers=2)
    weights = former.module.state_dict()
    wider._module.load_state_dict(wider._module.widened(weights, former._plans[0].anchors))
    states = {index: state[None] for index, state in hidden_states(decoder, IDS).items()}
    tables = angles(decoder.rotary, torch.arange(len(IDS)))
    with torch.no_grad():
        for fill in (1, 2, 3):
            found = [each.module(each._plans[0], states, *tables, fill)[0] for each in (former, wider)]
            torch.testing.assert_close(*found)
        first, last = (wider._module._first_rows(states, range(6)), former._module._first_rows(states, range(4)))
    for kind, before in enumerate((0, 0, 1, 1, 2, 3)):  # anchors 0 to 4 and 6, of which the former has the even ones
        torch.testing.assert_close(first[kind], last[before])
    with pytest.raises(ValueError, match="are not all among"):
        former._module.widened(wider.module.state_dict(), wider._module.anchors)


def test_several_pipelines_are_learned_in_turn_and_judged_together(decoder: Decoder, teacher: Teacher) -> None:
    recipe, text = spd(teacher, None, stage_counts="6,2"), batch(decoder, IDS)
    torch.manual_seed(3)
    drawn = [recipe.loss(text)[1] for _ in range(24)]
    assert {each["stages"] for each in drawn} == {2, 6}
    assert all(1 <= each["fill"] <= each["stages"] for each in drawn)
    both = recipe.acceptance(text)
    each = []
    for plan in recipe._plans:
        recipe._plans = (plan,)
        each.append(recipe.acceptance(text))
    assert both.judged == (2 * each[0].judged[0],)
    assert both.accepted == (each[0].accepted[0] + each[1].accepted[0],)


def batch(decoder: Decoder, ids: list[int], *, answers_from: int = 4, padding: int = 3) -> Batch:
    """One text, padded, with the decoder's own greedy tokens."""
    states = hidden_states(decoder, ids + [0] * padding)
    size = len(ids) + padding
    greedy = decoder.logits(states[decoder.config.num_layers]).argmax(dim=-1)
    places = torch.arange(size)
    return Batch(
        ids_BS=decoder.ids(ids + [0] * padding)[None],
        valid_BS=(places < len(ids))[None],
        answers_BS=((places >= answers_from) & (places < len(ids) - 1))[None],
        states={index: state[None] for index, state in states.items()},
        argmax_BS=greedy[None],
    )


def test_only_answers_within_the_draft_vocabulary_count(decoder: Decoder, teacher: Teacher) -> None:
    text = batch(decoder, IDS)
    outside = sorted(set(range(262)) - set(text.argmax_BS[0].tolist()))
    recipe = spd(teacher, 3, torch.tensor(outside))
    assert float(recipe.loss(text)[0].detach()) == 0.0
    assert recipe.acceptance(text).judged == (len(IDS) - 5,)
    assert recipe.acceptance(text).accepted == (0,)


def test_padding_changes_neither_loss_nor_acceptance(decoder: Decoder, teacher: Teacher) -> None:
    recipe, found = spd(teacher, 3), []
    for padding in (0, 5):
        torch.manual_seed(4)
        text = batch(decoder, IDS, padding=padding)
        found.append((float(recipe.loss(text)[0].detach()), recipe.acceptance(text)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


def test_rows_of_all_depths_can_be_trained_and_are_reported(decoder: Decoder, teacher: Teacher) -> None:
    torch.manual_seed(2)
    recipe, text = spd(teacher, 3, all_depths=0.5), batch(decoder, IDS)
    figures = {key: value for _ in range(8) for key, value in recipe.loss(text)[1].items()}
    assert {"accuracy_1", "accuracy_2", "accuracy_3"} <= figures.keys()


@pytest.mark.parametrize(
    ("options", "stages", "words"),
    [
        ({"stage_layers": "3,2"}, None, "adds up to 5"),
        ({"stage_layers": "3,3"}, 3, "--stages 3"),
        ({}, 4, "cannot be split into 4"),
        ({"anchors": "1,2"}, 3, "must begin with 0"),
        ({"init_layers": "6"}, 3, "expected 1 of the layers 0 to 5"),
        ({"layers": 7}, 3, "the model has 6 layers"),
        ({"stage_counts": "2,3"}, 3, "stage_counts=2,3: is given in place of --stages"),
        ({"stage_counts": "2,3", "stage_layers": "3,3"}, None, "and of -o stage_layers"),
        (
            {"stage_counts": "2,4"},
            None,
            "stage_counts=2,4: expected numbers of equal stages, which divide the model's 6",
        ),
        ({"stage_counts": ""}, None, "expected numbers of equal stages"),
        ({"stage_counts": "0"}, None, "expected numbers of equal stages"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    teacher: Teacher, options: dict[str, Any], stages: int | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        SPDRecipe(SPDTrainOptions(**options), teacher, None, stages)


def test_layers_to_begin_as_are_refused_where_the_target_has_none_of_ours(tmp_path: Path) -> None:
    teacher = Teacher(tiny.load(tiny.make_model(tmp_path, "gemma3_text", seed=1)).ends)
    with pytest.raises(InputError, match="init_layers=5: this model runs on transformers' layers"):
        SPDRecipe(SPDTrainOptions(init_layers="5"), teacher, None, 3)


@pytest.mark.parametrize(("storage", "bytes_each", "tolerance"), [("bfloat16", 2, 1e-5), ("int8", 1, 0.02)])
def test_an_exit_head_drafts_as_it_was_trained(
    decoder: Decoder, teacher: Teacher, tmp_path: Path, storage: str, bytes_each: int, tolerance: float
) -> None:
    torch.manual_seed(1)
    recipe = PPSDRecipe(PPSDRecipe.Options(layers=2, storage=storage), teacher, None, 3)  # type: ignore[call-arg]
    for weight in recipe.module.parameters():
        weight.data = weight.data.bfloat16().float()
    recipe.write(tmp_path, ABOUT, "spdbench")
    matrices = sum(weight.numel() for weight in recipe.module.parameters() if weight.ndim == 2)
    assert bytes_each * matrices < (tmp_path / "model.safetensors").stat().st_size < (bytes_each + 0.5) * matrices
    assert json.loads((tmp_path / "config.json").read_text())["version"] == 1
    head = build_exit(read_exit(tmp_path), decoder, STAGES)
    text = batch(decoder, IDS, padding=0)
    with torch.no_grad():
        logits = torch.nn.functional.linear(recipe._rows(text)[0], teacher.head_VM)
    hidden_SM, _ = head.forward(text.states[2][0], 0, head.new_cache(len(IDS)))
    assert float((logits - head.logits(hidden_SM)).norm() / logits.norm()) < tolerance
    assert ExitDrafter(head, 2).hidden_indices == recipe.hidden_indices


def test_an_exit_head_of_all_that_follows_is_always_right(decoder: Decoder, teacher: Teacher) -> None:
    recipe = PPSDRecipe(PPSDRecipe.Options(layers=4, init_layers="2,3,4,5"), teacher, None, 3)  # type: ignore[call-arg]
    text = batch(decoder, IDS)
    counts = recipe.acceptance(text)
    assert counts.judged == counts.accepted
    assert float(recipe.loss(text)[0].detach()) == pytest.approx(0.0, abs=1e-4)
