"""Every backend on models that only transformers' layers know: the same answers as transformers' `generate`."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from spdbench.models.target import Target
from tests import tiny
from tests.conformance.test_backends import PROMPT, ids, load, run

FAMILIES = ("gpt2", "gemma2", "phi3")
CASES = [
    ("vanilla", {}, "auto"),
    ("spd", {"stages": "2"}, "oracle:0.8"),
    ("spd", {"stages": "2", "executor": "inline"}, "oracle:1"),
    ("spd", {"stages": "3", "executor": "inline"}, "oracle:0.8"),
    ("ppsd", {"stages": "3", "executor": "inline"}, "oracle:0.8"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp(request.param), request.param, seed=1)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return tiny.load(folder)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        found: list[int] = model.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0].tolist()
    return found[len(PROMPT) :]


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_greedy_output_equals_transformers_generate(
    target: Target, expected: list[int], name: str, options: dict[str, str], drafter: str
) -> None:
    backend = load(target, name, options, drafter)
    assert len(set(expected)) > 5
    assert ids(run(backend, tiny.greedy(PROMPT, 40))) == expected
    info = backend.describe()
    assert info.kernels == "transformers"
    assert sum(info.lane_bytes) == target.decoder.bytes_per_token(range(6), head=True)
    backend.close()


def test_dictated_verdicts_need_no_layers_of_ours(target: Target) -> None:
    steps = run(load(target, "spd", {"stages": "3", "executor": "inline"}, "forced:0.5"), tiny.greedy(PROMPT, 40))
    assert len(ids(steps)) == 40
    assert {step.accepted for step in steps if step.judged} == {0, 1}
