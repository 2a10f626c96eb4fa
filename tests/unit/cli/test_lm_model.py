"""Backends as lm-eval's model: they answer as transformers does under lm-eval, and stop where they are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spdbench.decoding.distribution import loglikelihood
from spdbench.errors import InputError
from tests import tiny

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ["Say something.", "3 + 4 =", "def f(x):\n"]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    from spdbench.cli.evaluate.lm_model import SpdbenchLM

    yield
    SpdbenchLM.close_all()


def model(folder: Path, **arguments: Any) -> Any:
    from spdbench.cli.evaluate.lm_model import SpdbenchLM

    return SpdbenchLM.create_from_arg_obj({"model": str(folder), "dtype": "float32", "threads": 1, **arguments})


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", batch_size=1)


def test_answers_are_those_of_lm_evals_own_model(tiny_model: Path, theirs: Any) -> None:
    wanted = {"until": ["\n", "e"], "max_gen_toks": 24, "do_sample": False}
    requests = [asked(text, dict(wanted)) for text in TEXTS]
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert model(tiny_model).generate_until(requests, disable_tqdm=True) == expected
    drafting = model(tiny_model, backend="spd", drafter="oracle:0.7", **{"spd.executor": "inline", "spd.stages": 3})
    assert drafting.generate_until(requests, disable_tqdm=True) == expected


def test_likelihoods_are_those_of_lm_evals_own_model(tiny_model: Path, theirs: Any) -> None:
    pairs = [("A bird", " sings"), ("A bird ", "sings"), ("", "Hello there"), ("long " * 30, "x" * 150)]
    requests = [asked(*pair) for pair in pairs]
    ours = model(tiny_model).loglikelihood(requests, disable_tqdm=True)
    for (found, is_greedy), (expected, theirs_greedy) in zip(
        ours, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert is_greedy == theirs_greedy
    texts = [asked("Short."), asked("A text that is longer than what the model can see at once. " * 9)]
    rolled = model(tiny_model).loglikelihood_rolling(texts, disable_tqdm=True)
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4)


def test_likelihood_of_the_models_own_words_is_greedy(tiny_model: Path) -> None:
    from spdbench.decoding.autoregressive import decode

    decoder = tiny.load(tiny_model).decoder
    said = list(decode(decoder, tiny.greedy(tiny.PROMPT, 100)))
    total, is_greedy = loglikelihood(decoder, tiny.PROMPT, said)
    assert is_greedy
    assert total < 0
    parts = [
        loglikelihood(decoder, [*tiny.PROMPT, *said[:50]], said[50:]),
        loglikelihood(decoder, tiny.PROMPT, said[:50]),
    ]
    assert total == pytest.approx(sum(part for part, _ in parts), rel=1e-4)
    other = [*said[:-1], (said[-1] + 1) % 256]
    assert not loglikelihood(decoder, tiny.PROMPT, other)[1]
    assert loglikelihood(decoder, tiny.PROMPT, []) == (0.0, True)
    with pytest.raises(ValueError, match="at least one token"):
        loglikelihood(decoder, [], said)


def test_answer_ends_before_the_first_stop_string_however_many_tokens_a_step_brings(tiny_model: Path) -> None:
    plain = model(tiny_model, backend="vanilla")
    [whole] = plain.generate_until([asked("Go on", {"until": [], "max_gen_toks": 40})], disable_tqdm=True)
    stop = whole[7:9]
    wanted = {"until": [stop, "", whole[20:22]], "max_gen_toks": 40}
    drafting = model(tiny_model, backend="eagle", drafter="oracle:1")
    assert drafting.generate_until([asked("Go on", wanted)], disable_tqdm=True) == [whole[: whole.index(stop)]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"bakend": "spd"}, "--model_args bakend=spd: unknown key; did you mean 'backend'?"),
        ({"backend": "spdd"}, "unknown backend 'spdd'; did you mean 'spd'?"),
        ({"backend": "spd", "spd.stags": 2}, "-o spd.stags: unknown option; did you mean 'stages'?"),
        ({"dtype": "int8"}, "--model_args dtype=int8: not supported. Allowed: bfloat16, float32, float16."),
        ({"threads": "many"}, "--model_args threads=many: must be a whole number"),
        ({"trust_remote_code": True}, "--trust_remote_code: code that comes with a model is never run"),
    ],
)
def test_wrong_model_arguments_are_told(tiny_model: Path, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        model(tiny_model, **arguments)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beam": 4}, "lm-eval: generation option 'num_beam' is not known"),
        (
            {"num_beams": 4},
            "lm-eval: generation option num_beams=4 is not supported. Allowed: 1, which changes nothing; set it with "
            "--gen_kwargs num_beams=1",
        ),
        ({"min_p": 0.1}, "lm-eval: generation option min_p=0.1 is not supported. Allowed: 0,"),
        ({"no_repeat_ngram_size": 3}, "lm-eval: generation option no_repeat_ngram_size=3 is not supported."),
        ({"max_gen_toks": 256}, "lm-eval: max_gen_toks=256 leaves no room in the model's context of 256"),
    ],
)
def test_wishes_that_cannot_be_met_are_told(tiny_model: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        model(tiny_model).generate_until([asked("Hi", {"until": [], **settings})], disable_tqdm=True)
    assert str(caught.value).startswith(expected)


def test_settings_that_change_nothing_are_taken(tiny_model: Path) -> None:
    """Tasks made for other engines write their defaults out."""
    plain = {"until": [], "max_gen_toks": 6}
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "use_cache": True, "length_penalty": 2.0}
    left_open = {"top_p": None, "temperature": None, "num_return_sequences": None, "top_k": -1}
    answers = model(tiny_model).generate_until(
        [asked("Hi", settings) for settings in (plain, plain | neutral, plain | left_open)], disable_tqdm=True
    )
    assert answers[0] == answers[1] == answers[2]


def test_sampling_depends_on_the_seed_alone(tiny_model: Path) -> None:
    wanted = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [asked("Hi", wanted)] * 2
    answers = [model(tiny_model, seed=seed).generate_until(requests, disable_tqdm=True) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


def test_nothing_of_lm_evals_defaults_chooses_a_device(tiny_model: Path) -> None:
    from spdbench.cli.evaluate.lm_model import SpdbenchLM

    words = f"model={tiny_model},dtype=float32,threads=1"
    if not torch.cuda.is_available():
        assert SpdbenchLM.create_from_arg_string(words, {"device": "cuda:0", "batch_size": 1}).devices == ("cpu",)
    assert SpdbenchLM.create_from_arg_string(words, {"device": "cpu"}).devices == ("cpu",)
