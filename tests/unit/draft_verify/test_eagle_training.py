"""EAGLE-3's training agrees with the head that decodes: logits, acceptance, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models.attention_context import TreeRows
from spdbench.models.decoder import Decoder
from spdbench.models.target import Target
from spdbench.training.recipe import Batch, Counts, Teacher
from spdbench.training.soft_targets import draft_rows
from spdbench_backends.eagle.backend import Eagle
from spdbench_backends.eagle.build import build_eagle
from spdbench_backends.eagle.formats import read_eagle
from spdbench_backends.eagle.head import EagleModule
from spdbench_backends.eagle.train import Eagle3Recipe
from tests import tiny
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
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


@pytest.fixture(scope="module")
def decoder(target: Target) -> Decoder:
    return target.own_decoder


def fresh(decoder: Decoder, ids_U: torch.Tensor | None = DRAFT_IDS, **options: Any) -> Eagle3Recipe:
    torch.manual_seed(0)
    recipe = Eagle3Recipe(Eagle3Recipe.Options(**options), Teacher(decoder), ids_U, None)
    round_weights(recipe)
    return recipe


@pytest.fixture(scope="module")
def batch(decoder: Decoder) -> Batch:
    return make_batch(decoder, answers(decoder), fresh(decoder).hidden_indices)


@pytest.fixture(scope="module")
def trained(decoder: Decoder, batch: Batch) -> Eagle3Recipe:
    recipe = fresh(decoder, None, ttt=4)
    train(recipe, batch, 150)
    round_weights(recipe)
    return recipe


def engine_chain(recipe: Eagle3Recipe, module: EagleModule, batch: Batch, row: int, token: int) -> list[torch.Tensor]:
    """Logits of the levels that decoding drafts behind the root at `token` + 1, fed with the text's own tokens."""
    aux = torch.cat([batch.states[index][row, : token + 1] for index in module.weights.aux], dim=-1)
    ids = batch.ids_BS[row]
    logits, state = module.extend(aux, ids[1 : token + 2])
    found = [logits[0]]
    for level in range(1, recipe._options.ttt):
        if token + 1 + level >= len(ids):
            break
        rows = TreeRows(torch.tensor([level - 1]), torch.ones(1, level, dtype=torch.bool))
        logits, state = module.extend_tree(state, ids[token + 1 + level][None], rows)
        found.append(logits[0])
    return found


@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"head": "trained"}])
def test_every_levels_logits_are_those_of_the_head_that_decodes(
    decoder: Decoder, batch: Batch, tmp_path: Path, options: dict[str, Any]
) -> None:
    recipe = fresh(decoder, ttt=3, **options)
    recipe.write(tmp_path, ABOUT, "spdbench")
    weights = build_eagle(read_eagle(tmp_path), decoder)
    rows = draft_rows(batch)
    with torch.inference_mode():
        states = [
            recipe._head.norm(state) for state in recipe._states(batch, rows, torch.arange(rows.tokens_BR.shape[1]))
        ]
        for row in range(len(batch.ids_BS)):
            for column in (0, 1, 7):
                token = int(rows.tokens_BR[row, column])
                for level, logits in enumerate(engine_chain(recipe, EagleModule(weights, 64), batch, row, token)):
                    trained = linear(states[level][row, column], recipe._output_head)
                    torch.testing.assert_close(trained, logits, rtol=1e-4, atol=1e-4)


def test_gradients_and_loss_are_those_of_the_formula_written_out(decoder: Decoder, batch: Batch) -> None:
    """Sum of 0.5^i times the mean cross entropy at level i, over those positions whose greedy token can be drafted."""
    recipe = fresh(decoder, ttt=3, decay=0.5, head="trained", unrolled=1)
    loss, figures = recipe.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad.clone() for name, parameter in recipe.module.named_parameters()}  # type: ignore[union-attr]
    recipe.module.zero_grad()
    rows, teacher, last_BSM = draft_rows(batch), recipe._teacher, batch.states[decoder.config.num_layers]
    states, total = recipe._states(batch, rows, torch.arange(rows.tokens_BR.shape[1])), torch.tensor(0.0)
    for level, state in enumerate(states):
        entropies = []
        for row in range(len(batch.ids_BS)):
            for column in range(int(rows.real[row].sum())):
                at = int(rows.tokens_BR[row, column]) + 1 + level
                if (
                    at >= batch.ids_BS.shape[1]
                    or not batch.answers_BS[row, at]
                    or int(batch.argmax_BS[row, at]) not in DRAFT_IDS
                ):
                    continue
                wanted = linear(teacher.normed(last_BSM[row, at]), teacher.head_VM[DRAFT_IDS]).softmax(dim=-1)
                logits = linear(recipe._head.norm(state[row, column]), recipe._output_head)
                entropies.append(-(wanted * logits.log_softmax(dim=-1)).sum())
        mean = torch.stack(entropies).mean()
        assert figures[f"loss_{level}"] == pytest.approx(mean.item(), rel=1e-4)
        total = total + 0.5**level * mean
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    total.backward()  # type: ignore[no-untyped-call]
    for name, parameter in recipe.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_training_learns(decoder: Decoder, batch: Batch) -> None:
    recipe = fresh(decoder, ttt=3)
    before = recipe.acceptance(batch)
    losses = train(recipe, batch, 30)
    after = recipe.acceptance(batch)
    assert losses[-1] < 0.7 * losses[0]
    assert after.accepted[0] > before.accepted[0]


def test_acceptance_is_what_decoding_does_from_every_token(
    decoder: Decoder, batch: Batch, trained: Eagle3Recipe, tmp_path: Path
) -> None:
    trained.write(tmp_path, ABOUT, "spdbench")
    weights = build_eagle(read_eagle(tmp_path), decoder)
    expected, rows = Counts(), draft_rows(batch)
    with torch.inference_mode():
        for row in range(len(batch.ids_BS)):
            for column in range(int(rows.real[row].sum())):
                token = int(rows.tokens_BR[row, column])
                judged, accepted = [0] * 4, [0] * 4
                for level, logits in enumerate(engine_chain(trained, EagleModule(weights, 64), batch, row, token)):
                    at = token + 1 + level
                    if not batch.answers_BS[row, at]:
                        break
                    judged[level] = 1
                    if int(logits.argmax()) != int(batch.argmax_BS[row, at]):
                        break
                    accepted[level] = 1
                expected += Counts(tuple(judged), tuple(accepted))
    found = trained.acceptance(batch)
    assert found == expected
    assert all(found.accepted)


def emitted(target: Target, folder: Path, **options: str) -> list[tuple[int, int, int, tuple[int, ...]]]:
    context = BackendContext("eagle", target, str(folder), ("cpu",), 1, seed=0)
    backend = Eagle(parse_options("eagle", Eagle.Options, options), context)
    backend.load()
    request = tiny.greedy(tiny.PROMPT, 24)
    backend.prepare(request)
    return [(step.drafted, step.judged, step.accepted, step.token_ids) for step in backend.generate(request)]


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
def test_every_layout_drafts_alike(target: Target, trained: Eagle3Recipe, tmp_path: Path, tree: str) -> None:
    options = {"tree": tree, "depth": "4"}
    runs = {}
    for layout in Eagle3Recipe.formats:
        trained.write(tmp_path / layout, ABOUT, layout)
        runs[layout] = emitted(target, tmp_path / layout, **options)
    vanilla = list(decode(target.decoder, tiny.greedy(tiny.PROMPT, 24)))
    assert [token for *_, ids in runs["spdbench"] for token in ids] == vanilla
    assert all(run == runs["spdbench"] for run in runs.values())
    assert sum(accepted for _, _, accepted, _ in runs["spdbench"]) > 5


def test_a_head_in_8_bits_is_lossless_and_drafts_nearly_as_well(
    tiny_model: Path, trained: Eagle3Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, runs, sizes = tiny.load(tiny_model, "bfloat16"), [], []
    vanilla = list(decode(target.decoder, tiny.greedy(tiny.PROMPT, 24)))
    for storage in ("bfloat16", "int8"):
        monkeypatch.setattr(trained, "_options", Eagle3Recipe.Options(storage=storage))  # type: ignore[call-arg]
        trained.write(tmp_path / storage, ABOUT, "spdbench")
        runs.append(emitted(target, tmp_path / storage, tree="chain", depth="4"))
        assert [token for *_, ids in runs[-1] for token in ids] == vanilla
        sizes.append(build_eagle(read_eagle(tmp_path / storage), target.own_decoder).nbytes)
    assert sizes[1] < 0.6 * sizes[0]
    accepted = [sum(step[2] for step in run) for run in runs]
    assert accepted[1] >= accepted[0] - 2 > 3
    for layout in Eagle3Recipe.formats[1:]:
        with pytest.raises(InputError, match=f"--format {layout}: knows no matrices in 8 bits; leave out -o storage="):
            trained.require_layout(layout)


@pytest.mark.parametrize("layout", Eagle3Recipe.formats)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_every_layout_says_where_a_head_comes_from(decoder: Decoder, tmp_path: Path, layout: str, head: str) -> None:
    fresh(decoder, head=head).write(tmp_path, ABOUT, layout)
    file = read_eagle(tmp_path)
    assert file.layout == {"eagle3": "safeailab"}.get(layout, layout)
    assert (file.config.trained_tokens, file.config.acceptance_by_position) == (1234, (0.5, 0.25))
    assert ("lm_head.weight" in file.tensors) == (head == "trained" or layout != "spdbench")
    weights = build_eagle(file, decoder)
    assert weights.aux == (2, 3, 3)
    assert weights.vocabulary.listed == tuple(DRAFT_IDS.tolist())


def test_auto_finds_what_was_trained(
    target: Target, trained: Eagle3Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(tmp_path))
    about = type(ABOUT)(
        "tiny",
        target.files.sha256,
        "d",
        5,
        0,
        trained.acceptance(make_batch(target.own_decoder, answers(target.own_decoder), trained.hidden_indices)).rates,
    )
    trained.write(tmp_path / "mine", about, "spdbench")
    context = BackendContext("eagle", target, "auto", ("cpu",), 1, seed=0)
    backend = Eagle(parse_options("eagle", Eagle.Options, {}), context)
    backend.load()
    info = backend.describe().drafter
    assert info is not None
    assert (info.id, info.method, info.trained_tokens) == ("mine", "eagle3", 5)


def test_a_batch_without_answers_costs_nothing(decoder: Decoder, batch: Batch) -> None:
    check_that_silence_costs_nothing(fresh(decoder), batch)


def test_bfloat16_changes_little(decoder: Decoder, batch: Batch) -> None:
    check_that_bfloat16_changes_little(fresh(decoder), batch)
