"""Every lossless method on every kind of architecture, in float32: attention, experts, recurrent layers, both."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.decoding.verify import DraftVerdict
from spdbench.errors import InputError
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.spd.engine import PipelinedDecoding
from tests import tiny
from tests.conformance.test_backends import ids, load, plain, run

FAMILIES = ("llama", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text")
PROMPTS = (tuple(range(30, 41)), (33,), tuple((7 + 31 * i) % 262 for i in range(90)))
INLINE = {"executor": "inline"}
CASES = [
    ("vanilla", {}, "auto"),
    ("ngram", {}, "auto"),
    ("ngram", {"min_ngram": "1", "max_ngram": "1", "num_tokens": "3"}, "auto"),
    *(("draft_model", {"num_tokens": "3"}, drafter) for drafter in ("random", "oracle:0.7")),
    *(("eagle", {"tree": "chain", "depth": "3"}, drafter) for drafter in ("random", "oracle:0.7", "oracle:1")),
    *(("medusa", {"tree": "chain"}, drafter) for drafter in ("random", "oracle:0.7")),
    *(
        (name, {**INLINE, **cut}, drafter)
        for name in ("spd", "ppsd")
        for cut in ({"stages": "2"}, {"stages": "3"}, {"stages": "6"}, {"stage_layers": "3,1,2"})
        for drafter in ("random", "oracle:0.7")
    ),
    ("spd", {**INLINE, "stages": "3"}, "oracle:1"),
    ("spd", {"executor": "process", "stages": "2"}, "oracle:0.7"),
    ("spd", {"executor": "process", "stages": "3"}, "random"),
    ("ppsd", {"executor": "process", "stages": "3"}, "oracle:0.7"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("family"), request.param, seed=3)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return tiny.load(folder)


def test_plain_decoding_is_that_of_transformers(folder: Path, target: Target) -> None:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for prompt in PROMPTS:
            found = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            assert plain(target, tiny.greedy(prompt, 30)) == found


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_the_answers_are_the_targets_own(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    """Whatever the prompt; and where a limit or an end of sequence falls between drafts, or a request is closed."""
    backend = load(target, name, options, drafter)
    try:
        for prompt in PROMPTS:
            request = tiny.greedy(prompt, 30)
            assert ids(run(backend, request)) == plain(target, request)
        answer = plain(target, tiny.greedy(PROMPTS[0], 30))
        for index in (1, 3, 7):
            stop = frozenset({answer[index]})
            expected = answer[: answer.index(answer[index]) + 1]
            assert ids(run(backend, tiny.greedy(PROMPTS[0], 30, stop)))[: len(expected)] == expected
            assert ids(run(backend, tiny.greedy(PROMPTS[0], index)))[:index] == answer[:index]
        backend.prepare(request)
        steps = backend.generate(request)
        for _ in range(4):
            next(steps, None)
        steps.close()  # type: ignore[attr-defined]
        assert ids(run(backend, request)) == plain(target, request)
        info = backend.describe()
        assert sum(info.lane_bytes) == target.decoder.bytes_per_token(range(6), head=True)
    finally:
        backend.close()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("name", "options", "drafter"),
    [
        ("spd", {"stages": "3"}, "random"),
        ("spd", {"stage_layers": "1,2,1,2"}, "forced:0.7"),
        ("ppsd", {"stages": "2"}, "random"),
    ],
)
def test_stage_processes_give_the_verdicts_of_one_process(
    target: Target,
    name: str,
    options: dict[str, str],
    drafter: str,
    sampling: Sampling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run ahead of verdicts, which come late here, each as far as it may."""
    verify = PipelinedDecoding._verify

    def late(*given: Any) -> DraftVerdict:
        time.sleep(0.003)
        return verify(*given)

    monkeypatch.setattr(PipelinedDecoding, "_verify", late)
    far, near = (load(target, name, {**options, "executor": where}, drafter) for where in ("process", "inline"))
    try:
        for seed, prompt in enumerate(PROMPTS):
            request = GenerationRequest(prompt, (), 30, sampling, seed, frozenset())
            assert run(far, request) == run(near, request)
        info = far.describe()
        count = len(info.stage_layers)
        counts = ", ".join(str(count - stage) for stage in range(count))
        if target.decoder.snapshot_bytes(range(6)):
            assert info.chosen["snapshots"].startswith(f"{counts} by stage, ")
    finally:
        far.close()


def test_a_smaller_model_of_the_same_kind_drafts(target: Target, folder: Path) -> None:
    """It is right every time, as it is the target itself; and goes back where a limit cuts its drafts."""
    backend = load(target, "draft_model", {"model": str(folder), "num_tokens": "3"}, "auto")
    request = tiny.greedy(PROMPTS[0], 30)
    steps = run(backend, request)
    assert ids(steps) == plain(target, request)
    assert sum(step.accepted for step in steps) == sum(step.judged for step in steps) > 20


@pytest.mark.parametrize(
    ("name", "options"),
    [("eagle", {"tree": "static"}), ("eagle", {"tree": "dynamic"}), ("medusa", {"tree": "mc_sim_7b_63", "heads": "4"})],
)
@pytest.mark.parametrize("family", FAMILIES[-2:])
def test_trees_are_refused_with_what_works_instead(
    tmp_path: Path, family: str, name: str, options: dict[str, str]
) -> None:
    hybrid = tiny.load(tiny.make_model(tmp_path, family))
    with pytest.raises(InputError, match=rf"-o {name}.tree={options['tree']}: .* recurrent layers, .*; use chain"):
        load(hybrid, name, options, "random")
    for options in ({"tree": "auto"}, {"tree": "chain"}):
        backend = load(hybrid, name, options, "random")
        assert backend.describe().chosen.get("tree", "chain").startswith(("chain", "2 nodes", "3 nodes", "4 nodes"))
