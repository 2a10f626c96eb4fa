"""One body of tests that every registered backend has to pass, on a tiny random model.

A new backend is covered by being installed. What it drafts with is dialled from never right to always right.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from spdbench.backend import (
    Backend,
    BackendContext,
    check_before_load,
    find_backend,
    installed_backends,
    parse_options,
)
from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.judge.metrics.chi_square import chi_square
from spdbench.models.interface import TargetDecoder
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling, Step
from tests import tiny

PROMPT = tuple(range(30, 41))
PIPELINES: tuple[dict[str, str], ...] = tuple(
    {"executor": "inline", **cut}
    for cut in (
        {"stages": "1"},
        {"stages": "2"},
        {"stages": "3"},
        {"stages": "6"},
        {"stage_layers": "3,1,2"},
        {"stages": "2", "head": "split"},
    )
)
"""Stages in processes of their own have tests of their own, in tests/processes."""

BRANCHES: tuple[dict[str, str], ...] = tuple(
    {"executor": "inline", **cut, **branches}
    for cut in ({"stages": "2"}, {"stages": "3"}, {"stage_layers": "2,1,1,1,1"}, {"stage_layers": "3,1,2"})
    for branches in ({"draft_top_k": "2"}, {"draft_top_k": "4"}, {"redraft": "true"})
)
"""Several tokens of one position in flight."""

STREAMS: tuple[dict[str, str], ...] = (
    {"executor": "streams", "stages": "1"},
    {"executor": "streams", "stages": "3"},
    {"executor": "streams", "stage_layers": "3,1,2"},
)
"""On a CPU a rehearsal of what a GPU replays."""

OPTIONS: Mapping[str, tuple[dict[str, str], ...]] = {
    "draft_model": ({}, {"num_tokens": "1"}, {"graphs": "on"}),
    "hf": ({}, {"prompt_lookup": "3"}),
    "eagle": (
        {"tree": "chain"},
        {"tree": "chain", "depth": "1"},
        {"tree": "static"},
        {"tree": "dynamic", "depth": "3", "top_k": "3", "total_tokens": "9"},
        {"tree": "dynamic", "depth": "1", "top_k": "1", "total_tokens": "2"},
        {"tree": "auto"},
        {"tree": "auto", "graphs": "on"},
        {"tree": "chain", "depth": "3", "graphs": "on"},
        {"tree": "static", "graphs": "on"},
        {"tree": "dynamic", "depth": "3", "top_k": "3", "total_tokens": "9", "graphs": "on"},
    ),
    "medusa": (
        {"tree": "chain"},
        {"tree": "mc_sim_7b_63", "heads": "4"},
        {"tree": "auto"},
        {"tree": "chain", "heads": "1"},
        {"tree": "auto", "graphs": "on"},
        {"tree": "mc_sim_7b_63", "heads": "4", "graphs": "on"},
    ),
    "ngram": ({}, {"min_ngram": "1", "max_ngram": "1", "num_tokens": "3"}, {"graphs": "on"}),
    "ppsd": (*PIPELINES, STREAMS[1]),
    "recycling": (
        {},
        {"row_cost": "0"},
        {"row_cost": "0", "top_k": "1"},
        {"earlier_answers": "true"},
        {"graphs": "on"},
    ),
    "spd": PIPELINES + BRANCHES + STREAMS,
    "suffix": ({}, {"row_cost": "0"}, {"row_cost": "0", "earlier_answers": "true"}, {"graphs": "on"}),
    "vanilla": ({}, {"graphs": "on"}),
}
ALONE = {"hf", "ngram", "recycling", "suffix", "vanilla"}
"""They take no drafter."""

ELSEWHERE = {"llamacpp", "openai"}
"""They run no model of ours: a GGUF file in a package that need not be there, and what a server has. They have tests of
their own, in tests/unit/peers and tests/unit/openai."""

BACKENDS = [name for name in installed_backends() if name not in ELSEWHERE]

VARYING = ("auto", "dynamic")
"""Trees that are chosen by measured times, or are others where there is less room."""

DRAFTERS = ("oracle:0", "oracle:0.7", "oracle:1", "random")


def cases() -> Iterator[tuple[str, dict[str, str], str]]:
    for name in BACKENDS:
        drafters = ("auto",) if name in ALONE or find_backend(name).kind == "autoregressive" else DRAFTERS
        for options, drafter in product(OPTIONS.get(name, ({},)), drafters):
            yield name, options, drafter


CASES = [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[1].values())}-{case[2]}") for case in cases()]
CAPTURED = [pytest.param(*case) for case in cases() if "graphs" in case[1] and case[1].get("tree") not in VARYING]
PIPELINE_CASES = [pytest.param(*case) for case in cases() if find_backend(case[0]).kind == "pipeline"]
ONE_OF_EACH = [case for case in CASES if case.values[2] in ("auto", "oracle:0.7")]


def load(target: Target, name: str, options: dict[str, str], drafter: str) -> Backend:
    cls = find_backend(name)
    context = BackendContext(name, target, drafter, ("cpu",), 1, seed=0)
    backend = cls(parse_options(name, cls.Options, options), context)
    backend.load()
    return backend


def run(backend: Backend, request: GenerationRequest) -> list[Step]:
    backend.prepare(request)
    return list(backend.generate(request))


def ids(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


@cache
def plain(target: Target, request: GenerationRequest) -> list[int]:
    """The target's own answer, which hundreds of tests compare with and do not change."""
    return list(decode(target.decoder, request))


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_greedy_output_is_the_targets_own(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    request = tiny.greedy(PROMPT, 40)
    assert ids(run(load(target, name, options, drafter), request)) == plain(target, request)


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_counts_balance(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    backend = load(target, name, options, drafter)
    steps = run(backend, tiny.greedy(PROMPT, 40))
    first, rest = steps[0], steps[1:]
    assert (len(first.token_ids), first.drafted, first.judged, first.accepted) == (1, 0, 0, 0)
    assert first.forwards == len(PROMPT)
    for step in rest:
        assert 0 <= step.accepted <= step.judged <= step.drafted
        assert step.forwards > 0
        if backend.kind == "draft_verify":
            assert len(step.token_ids) == step.accepted + 1
        if backend.kind == "pipeline":
            assert step.drafted == step.judged <= len(step.token_ids)
            if not (
                "draft_top_k" in options or "redraft" in options
            ):  # a branch's last token may have no draft after it
                assert step.judged == len(step.token_ids)
    info = backend.describe().drafter
    if name not in OPTIONS and not (info and info.synthetic):
        return  # a backend from elsewhere that takes no drafter
    if drafter == "oracle:1":
        assert sum(s.accepted for s in rest) == sum(s.judged for s in rest) > 0
    if drafter == "oracle:0":
        assert sum(s.accepted for s in rest) == 0 < sum(s.judged for s in rest)


@pytest.mark.parametrize(("name", "options", "drafter"), CAPTURED)
def test_captured_steps_are_the_eager_ones(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    """Whatever the room that is left; but for rows that the target works on in vain."""
    captured, eager = (load(target, name, {**options, "graphs": graphs}, drafter) for graphs in ("on", "off"))
    for limit in (1, 2, 5, 6, 7, 40):
        request = tiny.greedy(PROMPT, limit)
        assert [step[:4] for step in run(captured, request)] == [step[:4] for step in run(eager, request)]


@pytest.mark.parametrize(("name", "options", "drafter"), PIPELINE_CASES)
def test_pipelines_obey_the_cycle_formula(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    backend = load(target, name, options, drafter)
    cycles = run(backend, tiny.greedy(PROMPT, 40))[1:]
    verdicts = [step.accepted for step in cycles if step.token_ids]
    stages = sum(map(bool, backend.describe().stage_layers))  # a lane may hold a part of the output head only
    formula = len(verdicts) + (stages - 1) * (1 + verdicts[:-1].count(0))
    if "redraft" in options:  # a branch that begins late is behind, by less than a rejection costs
        assert formula <= len(cycles) <= stages * len(verdicts) - verdicts[:-1].count(1)
        return
    assert len(cycles) == formula


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_generation_ends_at_the_first_end_of_sequence_wherever_it_falls(
    target: Target, name: str, options: dict[str, str], drafter: str
) -> None:
    backend = load(target, name, options, drafter)
    answer = plain(target, tiny.greedy(PROMPT, 30))
    for index in (0, 1, 2, 3, 7, 20):
        request = tiny.greedy(PROMPT, 30, frozenset({answer[index], 9999}))
        expected = answer[: answer.index(answer[index]) + 1]
        found = ids(run(backend, request))
        assert found[: len(expected)] == expected
        assert len(found) - len(expected) <= _overrun(backend)


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_the_limit_may_fall_anywhere(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    backend = load(target, name, options, drafter)
    answer = plain(target, tiny.greedy(PROMPT, 12))
    for limit in (1, 2, 3, 4, 7, 12):
        found = ids(run(backend, tiny.greedy(PROMPT, limit)))
        assert found[:limit] == answer[:limit]
        assert len(found) - limit <= _overrun(backend)


def _overrun(backend: Backend) -> int:
    """A draft-verify step may commit a few tokens past the end; the runner cuts them. Others may not."""
    return 64 if backend.kind == "draft_verify" else 0


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_a_prompt_shorter_than_the_pipeline(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    request = tiny.greedy(PROMPT[:1], 20)
    assert ids(run(load(target, name, options, drafter), request)) == plain(target, request)


@pytest.mark.parametrize(("name", "options", "drafter"), CASES)
def test_closing_early_leaves_the_backend_usable(
    target: Target, name: str, options: dict[str, str], drafter: str
) -> None:
    backend = load(target, name, options, drafter)
    request = tiny.greedy(PROMPT, 30)
    for num_steps in (1, 3, 8):
        backend.prepare(request)
        steps = backend.generate(request)
        for _ in range(num_steps):
            next(steps, None)
        steps.close()  # type: ignore[attr-defined]
    assert ids(run(backend, request)) == plain(target, request)


@pytest.mark.parametrize(("name", "options", "drafter"), ONE_OF_EACH)
def test_token_ids_are_python_ints(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    assert {type(token) for token in ids(run(load(target, name, options, drafter), tiny.greedy(PROMPT, 9)))} == {int}


@pytest.mark.parametrize(("name", "options", "drafter"), ONE_OF_EACH)
def test_close_may_be_called_twice_and_before_load(
    target: Target, name: str, options: dict[str, str], drafter: str
) -> None:
    backend = load(target, name, options, drafter)
    backend.close()
    backend.close()
    backend.load()
    request = tiny.greedy(PROMPT, 9)
    assert ids(run(backend, request)) == plain(target, request)
    cls = find_backend(name)
    fresh = cls(parse_options(name, cls.Options, options), BackendContext(name, target, drafter, ("cpu",), 1, seed=0))
    fresh.close()


@pytest.mark.parametrize(("name", "options", "drafter"), ONE_OF_EACH)
def test_what_it_is_made_of_adds_up(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    info = load(target, name, options, drafter).describe()
    assert sum(info.stage_layers) == target.config.num_layers
    assert sum(info.lane_bytes) == target.decoder.bytes_per_token(range(6), head=True)
    assert info.devices == ("cpu",)
    assert info.kernels in (None, target.decoder.kernels)


@pytest.mark.parametrize("name", ["eagle", "medusa", "ppsd", "spd"])
def test_a_missing_drafter_is_found_before_the_model_is_loaded(tiny_model: Path, name: str) -> None:
    target, cls = tiny.load(tiny_model), find_backend(name)
    backend = cls(parse_options(name, cls.Options, {}), BackendContext(name, target, "auto", ("cpu",), 1, seed=0))
    with pytest.raises(InputError, match="--drafter auto: no trained"):
        check_before_load(backend)
    assert "decoder" not in vars(target)
    assert target.decoder is vars(target)["decoder"]


def test_idle_backends_use_no_cpu(target: Target) -> None:
    """All at once: a single one that polls would show in the time of this process."""
    backends = []
    for name, options, drafter in (case.values for case in ONE_OF_EACH):
        backends.append(load(target, name, options, drafter))  # type: ignore[arg-type]
        run(backends[-1], tiny.greedy(PROMPT, 10))
    time.sleep(0.3)  # let threads that spin for a while after work settle
    before = _cpu_seconds()
    time.sleep(0.5)
    assert _cpu_seconds() - before < 0.05
    for backend in backends:
        backend.close()


def _cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


SMALL_VOCABULARY = 5
DRAWS = 1500


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tiny.make_model(tmp_path_factory.mktemp("small"), vocab_size=SMALL_VOCABULARY, num_hidden_layers=2, seed=4)
    return tiny.load(folder)


INLINE: Mapping[str, dict[str, str]] = {
    "ppsd": {"executor": "inline"},
    "spd": {"executor": "inline", "stages": "2"},
}
"""That stage processes draw what one process draws, number by number, is tested in tests/processes."""

SAMPLED: tuple[tuple[str, dict[str, str]], ...] = (
    *((name, INLINE.get(name, {})) for name in BACKENDS),
    ("eagle", {"tree": "chain", "depth": "2"}),
    ("eagle", {"tree": "dynamic", "depth": "2", "top_k": "2", "total_tokens": "4"}),
    ("medusa", {"tree": "chain", "heads": "2"}),
)
"""Chains of EAGLE and Medusa are drawn, their trees picked."""


@pytest.fixture(scope="module", params=SAMPLED, ids=["-".join((x, *o.values())) for x, o in SAMPLED])
def drafting_at_random(small: Target, request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Loaded once for all samplings."""
    name, options = request.param
    backend = load(small, name, options, "random")
    yield backend
    backend.close()


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_p=0.9, top_k=4)], ids=["plain", "warped"])
def test_sampled_triples_follow_the_exact_joint_distribution(
    small: Target, drafting_at_random: Backend, sampling: Sampling
) -> None:
    prompt = (1, 2, 3)
    expected = _joint(small.decoder, prompt, sampling)
    counts: Counter[object] = Counter()
    for seed in range(DRAWS):
        request = GenerationRequest(prompt, (), 3, sampling, seed, frozenset())
        counts[tuple(ids(run(drafting_at_random, request))[:3])] += 1
    tests = 2 * len(SAMPLED)
    assert chi_square(counts, expected).p_value > 1e-4 / tests


def _joint(decoder: TargetDecoder, prompt: tuple[int, ...], sampling: Sampling) -> dict[object, float]:
    """Exact probabilities of every first three tokens."""

    def next_probabilities(prefix: tuple[int, ...]) -> list[float]:
        return tiny.next_probabilities(decoder, prefix, sampling)

    joint: dict[object, float] = {}
    for a, pa in enumerate(next_probabilities(prompt)):
        for b, pb in enumerate(next_probabilities((*prompt, a))):
            for c, pc in enumerate(next_probabilities((*prompt, a, b))):
                joint[(a, b, c)] = pa * pb * pc
    return joint
