"""Drafters trained for targets that run on transformers' layers: they decode there without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.target import Target
from tests import tiny
from tests.cli.run_helpers import spdbench
from tests.conformance.test_backends import PROMPT, ids, load, run

FAMILIES = ("gemma2", "gemma3_text", "phi3")
METHODS = {
    "eagle3": ("eagle", {}),
    "medusa": ("medusa", {}),
    "spd": ("spd", {"stages": "3", "executor": "inline"}),
    "ppsd": ("ppsd", {"stages": "3", "executor": "inline"}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp(request.param), request.param, seed=1)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return tiny.load(folder)


@pytest.fixture(scope="module")
def plain(target: Target) -> list[int]:
    backend = load(target, "vanilla", {}, "auto")
    found = ids(run(backend, tiny.greedy(PROMPT, 32)))
    backend.close()
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"ab {i} " * 3}] for i in range(8)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("own_cache")
def test_a_trained_drafter_is_read_and_loses_nothing(
    target: Target, folder: Path, plain: list[int], data: Path, tmp_path: Path, method: str
) -> None:
    stages = ("--stages", "3") if method in ("spd", "ppsd") else ()
    sizes = ("--max-length", "48", "--batch-tokens", "128", "--epochs", "1", "--draft-vocab", "64")
    words = ("--dtype", "float32", "--threads", "1", *sizes, *stages)
    said = spdbench("train", method, "-m", folder, "--data", data, "--out", tmp_path, *words)
    assert said.code == 0, said.err
    losses = [json.loads(line).get("loss") for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert any(loss is not None for loss in losses)
    name, options = METHODS[method]
    backend = load(target, name, options, str(tmp_path))
    steps = run(backend, tiny.greedy(PROMPT, 32))
    assert ids(steps) == plain
    assert sum(step.drafted for step in steps) > 0
    assert backend.describe().kernels == "transformers"
    backend.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_random_drafter_loses_nothing(target: Target, plain: list[int], method: str) -> None:
    name, options = METHODS[method]
    backend = load(target, name, options, "random")
    assert ids(run(backend, tiny.greedy(PROMPT, 32))) == plain
    backend.close()


@torch.no_grad()
def test_shared_ends_are_the_models_own(target: Target) -> None:
    ends, decoder = target.ends, target.decoder
    assert isinstance(ends, Decoder)
    assert ends.layers == range(0)
    some = decoder.ids((1, 7, 200))
    assert torch.allclose(ends.embed(some), decoder.embed(some), rtol=1e-6)
    rows_SM = tiny.tensor(5, 32)
    found_SV = ends.logits(rows_SM)
    if target.config.family == "gemma2":
        found_SV = 3.0 * torch.tanh(found_SV / 3.0)
    assert torch.allclose(found_SV, decoder.logits(rows_SM), rtol=1e-4, atol=1e-4)


REFUSED = [
    ("gpt2", {}, "has no RMS norm"),
    ("opt", {}, "has no RMS norm"),
    ("granite", {"logits_scaling": 7.0}, "give other logits than it does, off by"),
]


@pytest.mark.parametrize(("family", "changes", "reason"), REFUSED)
def test_ends_of_another_kind_are_refused_with_what_works(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    target = tiny.load(tiny.make_model(tmp_path, family, seed=1, **changes))
    for drafter in ("random", "auto"):
        with pytest.raises(InputError, match=rf"{reason}.* Use `-b ngram`, .*oracle:P"):
            load(target, "eagle", {}, drafter)
