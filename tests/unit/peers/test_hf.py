"""transformers' generate as a backend: the target's own ids, and its drafts counted from outside."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError, PromptFailedError
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.hf import HF
from tests import tiny

PROMPT = (*range(30, 41), *range(30, 36))


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


def make(target: Target, **options: str) -> HF:
    made = HF(parse_options("hf", HF.Options, options), BackendContext("hf", target, "auto", ("cpu",), 1, seed=0))
    made.load()
    return made


def steps(made: HF, request: GenerationRequest) -> list[Step]:
    return list(made.generate(request))


def ids(found: list[Step]) -> list[int]:
    return [token for step in found for token in step.token_ids]


def test_an_assistant_that_is_the_model_itself_is_always_right(target: Target, tiny_model: Path) -> None:
    made = make(target, assistant=str(tiny_model), assistant_tokens="3")
    request = tiny.greedy(PROMPT, 30)
    found = steps(made, request)
    assert ids(found) == list(decode(target.decoder, request))
    assert sum(step.accepted for step in found) == sum(step.judged for step in found) > 0
    assert {step.drafted for step in found[:-1]} == {3}
    assert found[0].forwards == len(PROMPT) + 3
    info = made.describe().drafter
    assert info is not None
    assert (info.method, info.synthetic) == ("assistant_model", False)
    made.close()


def test_an_assistant_of_its_own_mind_is_sometimes_wrong_and_the_ids_stay_the_targets(
    target: Target, tmp_path: Path
) -> None:
    small = tiny.make_model(tmp_path / "small", num_hidden_layers=2, seed=9)
    made = make(target, assistant=str(small), assistant_tokens="4")
    request = tiny.greedy(PROMPT, 30)
    found = steps(made, request)
    assert ids(found) == list(decode(target.decoder, request))
    assert sum(step.accepted for step in found) < sum(step.judged for step in found)
    made.close()


def test_an_answer_ends_at_the_end_of_sequence_inside_a_block(target: Target, tiny_model: Path) -> None:
    made = make(target, assistant=str(tiny_model), assistant_tokens="5")
    answer = list(decode(target.decoder, tiny.greedy(PROMPT, 30)))
    for index in (0, 1, 2, 3, 7):
        request = tiny.greedy(PROMPT, 30, frozenset({answer[index]}))
        assert ids(steps(made, request)) == answer[: answer.index(answer[index]) + 1]
    made.close()


def test_the_models_own_generation_settings_do_not_count(target: Target, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "opinionated"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "top_k": 2, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    made = make(tiny.load(folder))
    request = tiny.greedy(PROMPT, 30)
    assert ids(steps(made, request)) == list(decode(target.decoder, request))
    made.close()


def test_equal_seeds_draw_equal_answers_and_others_do_not(target: Target) -> None:
    made = make(target)
    answers = [
        ids(steps(made, GenerationRequest(PROMPT, (), 12, Sampling(1.0), seed, frozenset()))) for seed in (7, 7, 8)
    ]
    assert answers[0] == answers[1] != answers[2]
    made.close()


def test_a_crash_inside_comes_out_and_leaves_the_backend_usable(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(target)
    request = tiny.greedy(PROMPT, 5)

    def crash(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("in generate")

    with monkeypatch.context() as patch:
        patch.setattr(made._loaded(made._generation)._model, "generate", crash)
        with pytest.raises(ZeroDivisionError, match="in generate"):
            steps(made, request)
    assert len(ids(steps(made, request))) == 5
    made.close()


def test_closing_leaves_no_thread_behind(target: Target) -> None:
    before = threading.active_count()
    made = make(target)
    steps(made, tiny.greedy(PROMPT, 3))
    assert threading.active_count() == before + 1
    made.close()
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant": "/no/such", "prompt_lookup": "3"}, r"hf\.prompt_lookup=3: excludes hf\.assistant"),
        ({"max_ngram": "3"}, r"hf\.max_ngram=3: needs hf\.prompt_lookup=TOKENS"),
        ({"assistant_tokens": "3"}, r"hf\.assistant_tokens=3: needs hf\.assistant=MODEL"),
        ({"assistant": "/no/such"}, "/no/such"),
    ],
)
def test_options_that_do_not_go_together_are_refused(target: Target, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(target, **options)


def test_an_assistant_of_other_words_is_refused(target: Target, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", vocab_size=270, num_hidden_layers=1)
    tiny.swap_tokens(other, "a", "b")
    with pytest.raises(InputError, match="its vocabulary"):
        make(target, assistant=str(other))


def test_its_own_logits_are_those_of_the_model_and_name_its_next_token(target: Target) -> None:
    made, answer = make(target), tuple(decode(target.decoder, tiny.greedy(PROMPT, 6)))
    for length in (0, 1, 5):
        found = made.next_logits(PROMPT, answer[:length])
        prefix = (*PROMPT, *answer[:length])
        with torch.inference_mode():
            decoder = target.decoder
            hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(prefix)), 0, decoder.new_cache(len(prefix)))
            expected = decoder.logits(hidden_SM[-1:])[0].tolist()
        assert [found[token] for token in range(len(expected))] == pytest.approx(expected, abs=1e-4)
        assert max(found, key=found.__getitem__) == answer[length]
    assert ids(steps(made, tiny.greedy(PROMPT, 6))) == list(answer)  # a question between requests changes nothing
    made.close()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup": "3"}], ids=["plain", "prompt lookup"])
def test_logits_that_are_not_numbers_fail_the_request_only(
    target: Target, sampling: Sampling, options: dict[str, str]
) -> None:
    made, bad = make(target, **options), PROMPT[-1]
    request = GenerationRequest(PROMPT, (), 12, sampling, 3, frozenset())
    before = ids(steps(made, request))
    weights = made._loaded(made._generation)._model.get_input_embeddings().weight
    row = weights[bad].clone()
    with torch.no_grad():
        weights[bad] = torch.nan
        with pytest.raises(PromptFailedError, match=r"logits are not numbers \(NaN\)"):
            steps(made, request)
        weights[bad] = row
    assert ids(steps(made, request)) == before
    made.close()
