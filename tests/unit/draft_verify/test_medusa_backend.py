"""The medusa backend's start: where it finds heads, and which trees it takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models.target import Target
from spdbench.profiles.profile import RowCosts
from spdbench_backends.medusa.backend import Medusa
from spdbench_backends.medusa.drafter import random_medusa
from spdbench_backends.medusa.formats import MedusaFile, write_medusa
from tests import tiny
from tests.unit.draft_verify.medusa_files import started

pytestmark = pytest.mark.usefixtures("own_cache")

REQUEST = tiny.greedy(tiny.PROMPT, 30)


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


@pytest.fixture(scope="module")
def heads(target: Target) -> MedusaFile:
    return random_medusa(target.own_decoder, 3, seed=1)


def emitted(backend: Medusa) -> list[int]:
    backend.prepare(REQUEST)
    return [token for step in backend.generate(REQUEST) for token in step.token_ids]


def test_a_medusa2_models_own_heads_are_found(tiny_model: Path, tmp_path: Path, heads: MedusaFile) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "tuned"))
    tensors = {**load_file(folder / "model.safetensors"), **heads.renamed("medusa2")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    target = tiny.load(folder)
    for drafter in ("auto", folder, tmp_path / "tuned" / ".." / "tuned"):
        backend = started(target, drafter, tree="chain")
        info = backend.describe().drafter
        assert info is not None
        assert (info.method, info.sha256, info.synthetic) == ("medusa", target.files.sha256, False)
        assert emitted(backend) == list(decode(target.decoder, REQUEST))
    with pytest.raises(InputError, match=f"use it as the model: -m {folder} --drafter auto"):
        started(tiny.load(tiny_model), folder)


def test_auto_finds_an_installed_drafter(
    target: Target, tmp_path: Path, heads: MedusaFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(tmp_path / "drafters"))
    with pytest.raises(InputError, match="no trained medusa drafter"):
        started(target, "auto")
    config = heads.config.model_copy(update={"model_sha256": target.files.sha256, "trained_tokens": 77})
    folder = write_medusa(replace(heads, config=config), tmp_path / "drafters" / "mine", "spdbench")
    info = started(target, "auto", tree="chain").describe().drafter
    assert info is not None
    assert (info.id, info.trained_tokens) == (folder.name, 77)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tree": "mc_sim_7b_63"}, r"-o medusa\.tree=mc_sim_7b_63: the tree has 4 levels, .* only 3 heads"),
        ({"tree": "mc_sim"}, r"-o medusa\.tree=mc_sim: no tree of that name, and no such file"),
        ({"heads": "4"}, r"-o medusa\.heads=4: the drafter has 3 heads"),
        ({"heads": "1", "tree": "DEEP"}, r"medusa\.tree=.*deep\.json: the tree has 2 levels, .* only 1 heads"),
        ({"tree": "WIDE"}, r"medusa\.tree=.*wide\.json: path \[2\] asks for rank 2, but only 2 tokens are drafted"),
        ({"tree": "ORPHAN"}, r"medusa\.tree=.*orphan\.json: .*path \[1, 0\] has no parent, \[1\] is missing"),
    ],
)
def test_trees_that_do_not_fit(
    target: Target, tmp_path: Path, heads: MedusaFile, options: dict[str, str], why: str
) -> None:
    small = heads.config.model_copy(update={"draft_token_ids": (40, 50)})
    file = replace(heads, config=small)
    folder = write_medusa(file, tmp_path / "heads", "spdbench")
    for name, paths in {"DEEP": [[0], [0, 0]], "WIDE": [[2]], "ORPHAN": [[0], [1, 0]]}.items():
        (tmp_path / f"{name.lower()}.json").write_text(json.dumps(paths))
        if options.get("tree") == name:
            options = {**options, "tree": str(tmp_path / f"{name.lower()}.json")}
    with pytest.raises(InputError, match=why):
        started(target, folder, **options)


def test_measured_accuracies_make_the_tree(
    target: Target, tmp_path: Path, heads: MedusaFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the second choice of the first head is ever right, so nothing else is drafted where rows cost something."""
    costs = RowCosts((1, 32), (1.0, 2.0))
    monkeypatch.setattr(Medusa, "_row_costs", lambda *_: costs)
    accuracies = ((0.0, 1.0), (0.0,), (0.0,))
    config = heads.config.model_copy(update={"head_accuracies": accuracies})
    file = replace(heads, config=config)
    backend = started(target, write_medusa(file, tmp_path / "heads", "spdbench"))
    assert backend.describe().chosen == {"tree": "2 nodes, 1 levels"}
    assert emitted(backend) == list(decode(target.decoder, REQUEST))


@pytest.mark.parametrize("tree", ["mc_sim_7b_63", "eagle_1", "auto"])
def test_a_drafter_of_few_tokens_keeps_the_output(target: Target, tmp_path: Path, tree: str) -> None:
    file = random_medusa(target.own_decoder, 5, seed=2)
    config = file.config.model_copy(update={"draft_token_ids": tuple(range(250, 230, -1))})
    file = replace(file, config=config)
    backend = started(target, write_medusa(file, tmp_path / "heads", "spdbench"), tree=tree)
    assert emitted(backend) == list(decode(target.decoder, REQUEST))


def test_synthetic_heads_are_as_many_as_asked_for(target: Target, tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps([[0] * level for level in range(1, 9)]))
    backend = started(target, "oracle:1", heads="8", tree=str(deep))
    backend.prepare(REQUEST)
    assert next(step for step in backend.generate(REQUEST) if step.drafted).accepted == 8
    with pytest.raises(InputError, match=r"8 levels, .* only 5 heads"):
        started(target, "oracle:1", tree=str(deep))
