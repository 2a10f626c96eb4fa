"""llama.cpp as a backend, with a package that stands in for llama-cpp-python and loops as it does."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from spdbench.backend import BackendContext, parse_options
from spdbench.errors import InputError
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.llamacpp import LlamaCpp, _sampling

VOCABULARY = 53
PROMPT = (3, 4, 5)


def follows(token: int) -> int:
    """What the stand-in's model says next."""
    return (token * 5 + 7) % VOCABULARY


class Llama:
    """Greedy decoding of a model that looks at one token, in the loop that llama-cpp-python has."""

    made: ClassVar[list[Llama]] = []

    def __init__(self, path: str, draft_model: Any = None, n_ctx: int = 0, **settings: Any) -> None:
        if "broken" in path:
            raise ValueError("Failed to load model from file")
        self.settings = settings
        self.draft_model = draft_model
        self.context = n_ctx
        self.n_tokens = 0
        self.seeds: list[int] = []
        self.samplings: list[dict[str, Any]] = []
        self.closed = False
        self.seen: list[int] = []
        Llama.made.append(self)

    def n_vocab(self) -> int:
        return VOCABULARY

    def n_ctx(self) -> int:
        return self.context

    def reset(self) -> None:
        self.n_tokens = 0

    def set_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def close(self) -> None:
        self.closed = True

    def eval(self, tokens: list[int]) -> None:
        self.seen[self.n_tokens :] = tokens
        self.n_tokens += len(tokens)

    @property
    def _ctx(self) -> Any:
        """Its logits as C has them: one for the token that follows, 0 for all others."""
        assert self.n_tokens
        row = (ctypes.c_float * VOCABULARY)()
        row[follows(self.seen[self.n_tokens - 1])] = 1.0
        pointer = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
        return SimpleNamespace(get_logits_ith={-1: pointer}.__getitem__)

    def generate(self, tokens: list[int], **sampling: Any) -> Iterator[int]:
        self.samplings.append(sampling)
        index = self.n_tokens + len(tokens) - 1
        while True:
            self.eval(tokens)
            while index < self.n_tokens:
                token = follows(self.seen[index])
                index += 1
                yield token
                tokens.clear()
                tokens.append(token)
                if index < self.n_tokens and token != self.seen[index]:
                    self.n_tokens = index
                    break
            if self.draft_model is not None:
                tokens.extend(self.draft_model([*self.seen[: self.n_tokens], *tokens]))


class Lookup:
    """Drafts two right tokens and a wrong one, every other time a wrong one alone."""

    def __init__(self, max_ngram_size: int, num_pred_tokens: int) -> None:
        self.sizes = (max_ngram_size, num_pred_tokens)
        self.calls = 0

    def __call__(self, ids: list[int]) -> list[int]:
        self.calls += 1
        first = follows(ids[-1])
        second = follows(first)
        return [first, second, (follows(second) + 1) % VOCABULARY] if self.calls % 2 else [(first + 1) % VOCABULARY]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    Llama.made = []
    module, drafting = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    vars(module).update(Llama=Llama, __version__="0.3.99")
    vars(drafting).update(LlamaPromptLookupDecoding=Lookup)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", drafting)


Make = Callable[..., LlamaCpp]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")

    def made(file: Path | None = file, vocabulary: int = VOCABULARY, **options: str) -> LlamaCpp:
        target: Any = SimpleNamespace(
            config=SimpleNamespace(max_positions=100_000, vocab_size=vocabulary, num_layers=2),
            device=SimpleNamespace(type="cpu"),
            files=SimpleNamespace(gguf=file),
        )
        context = BackendContext("llamacpp", target, "auto", ("cpu",), 3, seed=0)
        return LlamaCpp(parse_options("llamacpp", LlamaCpp.Options, options), context)

    return made


def answer(num: int) -> list[int]:
    found = [follows(PROMPT[-1])]
    while len(found) < num:
        found.append(follows(found[-1]))
    return found


def run(backend: LlamaCpp, num: int, eos_ids: frozenset[int] = frozenset()) -> list[Step]:
    request = GenerationRequest(PROMPT, (), num, Sampling(), 2**40 + 5, eos_ids)
    backend.prepare(request)
    steps, found = backend.generate(request), []
    for step in steps:
        found.append(step)
        if sum(len(one.token_ids) for one in found) >= num:
            break
    steps.close()  # type: ignore[attr-defined]
    return found


def ids(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


@pytest.mark.usefixtures("package")
def test_plain_decoding_is_a_token_a_step(make: Make) -> None:
    backend = make()
    backend.load()
    for _ in range(2):  # nothing is left of the first
        steps = run(backend, 6)
        assert ids(steps) == answer(6)
        assert [step.forwards for step in steps] == [3.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    [model] = Llama.made
    assert model.seeds == [5 + 2**40 % 2**32] * 2
    assert model.samplings[0]["temp"] == 0.0
    assert (model.settings["n_threads"], model.settings["n_gpu_layers"], model.context) == (3, 0, 8192)


@pytest.mark.usefixtures("package")
def test_a_lookups_rounds_are_seen_with_their_drafts(make: Make) -> None:
    backend = make(prompt_lookup="3")
    backend.load()
    steps = run(backend, 12)
    assert ids(steps)[:12] == answer(12)
    assert [(len(step.token_ids), step.drafted, step.judged, step.accepted, step.forwards) for step in steps] == [
        (1, 0, 0, 0, 3.0),
        (3, 3, 3, 2, 4.0),
        (1, 1, 1, 0, 2.0),
        (3, 3, 3, 2, 4.0),
        (1, 1, 1, 0, 2.0),
        (3, 3, 3, 2, 4.0),
    ]
    info = backend.describe()
    assert info.drafter is not None
    assert info.drafter.method == "prompt_lookup"
    assert info.other_model == "tiny.gguf in llama.cpp"


@pytest.mark.usefixtures("package")
def test_an_answer_ends_at_the_end_of_sequence_inside_a_round(make: Make) -> None:
    backend = make(prompt_lookup="3")
    backend.load()
    for index in range(6):
        assert ids(run(backend, 30, frozenset({answer(30)[index]}))) == answer(index + 1)


def test_temperature_is_divided_by_before_anything_is_cut_off() -> None:
    words = _sampling(Sampling(0.5, top_p=0.9, top_k=7))
    assert (words["temp"], words["top_k"], words["top_p"]) == (1.0, 7, 0.9)
    assert (words["min_p"], words["typical_p"], words["repeat_penalty"]) == (0.0, 1.0, 1.0)
    [cool] = words["logits_processor"]
    assert cool(None, np.array([1.0, 2.0])).tolist() == [2.0, 4.0]


def test_without_the_package_one_message_names_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"-b llamacpp: needs llama-cpp-python: pip install 'llama-cpp-python>="):
        make().load()


@pytest.mark.usefixtures("package")
def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"-m is not a GGUF file.*-o llamacpp\.model=FILE\.gguf"):
        make(file=None).load()
    with pytest.raises(InputError, match="no such GGUF file"):
        make(model=str(tmp_path / "none.gguf")).load()
    with pytest.raises(InputError, match="its vocabulary"):
        make(vocabulary=50).load()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"llama\.cpp cannot load it"):
        make(model=str(tmp_path / "broken.gguf")).load()
    backend = make(context="8")
    backend.load()
    with pytest.raises(InputError, match=r"give -o llamacpp\.context=33"):
        run(backend, 30)


@pytest.mark.usefixtures("package")
def test_closing_twice_and_before_loading_is_fine(make: Make) -> None:
    backend = make()
    backend.close()
    backend.load()
    backend.close()
    backend.close()
    assert Llama.made[0].closed


@pytest.mark.usefixtures("package")
def test_its_own_logits_are_those_after_the_last_token(make: Make) -> None:
    backend = make()
    backend.load()
    for count in (0, 1, 4):
        found = backend.next_logits(PROMPT, answer(6)[:count])
        assert len(found) == VOCABULARY
        assert max(found, key=found.__getitem__) == answer(6)[count]
    assert ids(run(backend, 6)) == answer(6)  # a question between requests changes nothing
