"""Wherever the drafter and the output head run, a pipeline decodes what one process decodes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest

from spdbench.decoding.autoregressive import decode
from spdbench.errors import BackendLostError, InputError
from spdbench.judge.metrics.bubble import cycles_by_fill, lane_time, read_spans
from spdbench.measure.clock import measure
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.pipelined import Pipelined
from tests import tiny
from tests.processes.test_stage_processes import ids, load, workers
from tests.unit.spd.test_published import CASES as PUBLISHED
from tests.unit.spd.transcription import write_head

FIRST = {"drafting": "first_stage"}
CASES = [
    ("spd", {"stages": "2", **FIRST}, "random"),
    ("spd", {"stages": "3", **FIRST, "head": "drafter"}, "oracle:0.7"),
    ("spd", {"stage_layers": "2,1,1,1,1", **FIRST, "head": "split"}, "random"),
    ("spd", {"stage_layers": "1,3,2", **FIRST}, "random"),
    ("spd", {"stages": "2", "head": "split"}, "oracle:0.7"),
    ("spd", {"stages": "3", "head": "drafter"}, "random"),
    ("spd", {"stage_layers": "2,1,1,1,1", "head": "split", "transport": "gloo"}, "random"),
    ("ppsd", {"stages": "3", **FIRST, "head": "split"}, "random"),
]
PROMPTS = (tiny.PROMPT, tiny.PROMPT[:1], tuple(range(60, 160)))


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1].values())}-{case[2]}")
def pair(request: pytest.FixtureRequest, target: Target) -> Iterator[tuple[Pipelined, Pipelined]]:
    """A backend with stage processes in some layout, and the same cut in one process with the usual layout."""
    name, options, drafter = request.param
    cut = {key: value for key, value in options.items() if key.startswith("stage")}
    far = load(target, name, {"executor": "process", **options}, drafter)
    near = load(target, name, {"executor": "inline", **cut}, drafter)
    yield far, near
    for backend in (far, near):
        backend.close()
        backend.close()


def drafts_in_first_stage(backend: Pipelined) -> bool:
    return backend._layout.drafting == "first_stage"


def test_the_result_says_what_runs_where(pair: tuple[Pipelined, Pipelined], target: Target) -> None:
    far, near = (backend.describe() for backend in pair)
    own_head_lane = pair[0]._layout.head != "last_stage" and not drafts_in_first_stage(pair[0])
    assert far.lanes == near.lanes + own_head_lane
    assert far.chosen["layout"] == pair[0]._layout.words
    assert "layout" not in near.chosen
    assert sum(far.lane_bytes) == sum(near.lane_bytes) == target.decoder.bytes_per_token(range(6), head=True)
    assert far.stage_layers == near.stage_layers + (0,) * own_head_lane
    assert len(workers(pair[0])) == near.lanes - drafts_in_first_stage(pair[0])


def test_greedy_output_is_the_targets_own(pair: tuple[Pipelined, Pipelined], target: Target) -> None:
    for prompt in PROMPTS:
        request = tiny.greedy(prompt, 40)
        assert ids(pair[0], request) == list(decode(target.decoder, request))


def test_steps_are_those_of_the_usual_layout_in_one_process(pair: tuple[Pipelined, Pipelined]) -> None:
    for prompt in PROMPTS:
        request = tiny.greedy(prompt, 30)
        far, near = (list(backend.generate(request)) for backend in pair)
        assert far == near


def test_sampling_draws_what_one_process_draws(pair: tuple[Pipelined, Pipelined]) -> None:
    if "oracle" in pair[0]._context.drafter:
        pytest.skip("an oracle knows greedy answers only")
    for seed, sampling in enumerate((Sampling(1.0, 0.9, 40), Sampling(1.3), Sampling(0.7, 1.0, 5))):
        request = GenerationRequest(tiny.PROMPT, (), 30, sampling, seed, frozenset())
        assert ids(pair[0], request) == ids(pair[1], request)


def test_limits_ends_of_sequence_and_requests_that_are_left_early(
    pair: tuple[Pipelined, Pipelined], target: Target
) -> None:
    answer = list(decode(target.decoder, tiny.greedy(tiny.PROMPT, 20)))
    assert ids(pair[0], tiny.greedy(tiny.PROMPT, 1)) == answer[:1]
    for token in dict.fromkeys(answer):
        request = GenerationRequest(tiny.PROMPT, (), 20, Sampling(), 0, frozenset({token}))
        assert ids(pair[0], request) == answer[: answer.index(token) + 1]
    for num_steps in (1, 2, 5):
        steps = pair[0].generate(tiny.greedy(tiny.PROMPT, 40))
        for _ in range(num_steps):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        request = tiny.greedy(tiny.PROMPT[2:], 20)
        assert ids(pair[0], request) == list(decode(target.decoder, request))


def test_spans_lie_on_the_lanes_where_the_work_was_done(pair: tuple[Pipelined, Pipelined]) -> None:
    backend = pair[0]
    measured = measure(backend, tiny.greedy(tiny.PROMPT, 30))
    spans, info = backend.spans(), backend.describe()
    stages, layout = len(pair[1].describe().stage_layers), backend._layout
    for lane in range(stages):
        kept = Counter(s.position for s in spans if s.lane == lane and s.kind == "target" and s.kept)
        assert kept == Counter(range(len(tiny.PROMPT), len(tiny.PROMPT) + 29))
    drafters_lane = 0 if layout.drafting == "first_stage" else stages
    assert {s.lane for s in spans if s.kind == "draft"} == {drafters_lane}
    heads = {"last_stage": {stages - 1}, "drafter": {drafters_lane}, "split": {stages - 1, drafters_lane}}
    assert {s.lane for s in spans if s.kind == "head"} == heads[layout.head]
    table = read_spans(spans, info.lanes)
    ends = [measured.start_ns + at for at in measured.steps.t_ns]
    shares = lane_time(table, ends).shares()
    assert shares.useful > 0 < shares.fill
    fill = cycles_by_fill(table, ends, stages)
    assert sum(fill.num) == len(ends) - 1
    assert fill.num[-1] > 0


def test_unread_reports_do_not_block_a_long_prompt_to_the_second_stage(tmp_path: Path) -> None:
    """Logits of dropped tokens fill the last stage's pipe, and a prompt's rows, which the controller sends here, the
    pipe to it."""
    wide = tiny.load(tiny.make_model(tmp_path, vocab_size=40_000, max_position_embeddings=2048))
    far = load(wide, "spd", {"stages": "2", "timeout_s": "10", "executor": "process", **FIRST}, "random")
    near = load(wide, "spd", {"stages": "2", "executor": "inline"}, "random")
    try:
        for seed in range(3):
            request = GenerationRequest((5,) * 1000, (), 20, Sampling(1.0), seed, frozenset())
            begun = [list(islice(backend.generate(request), 4)) for backend in (far, near)]
            assert begun[0] == begun[1]
    finally:
        far.close()
        near.close()


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_hybrid_targets_go_back_in_every_layout(tmp_path: Path, family: str) -> None:
    hybrid = tiny.load(tiny.make_model(tmp_path, family, seed=3))
    for options in ({"stages": "3", **FIRST, "head": "split"}, {"stage_layers": "1,2,3", **FIRST, "head": "drafter"}):
        cut = {key: value for key, value in options.items() if key.startswith("stage")}
        far = load(hybrid, "spd", {"executor": "process", **options}, "random")
        near = load(hybrid, "spd", {"executor": "inline", **cut}, "random")
        try:
            for seed, sampling in enumerate((Sampling(), Sampling(1.0))):
                request = GenerationRequest(tiny.PROMPT, (), 30, sampling, seed, frozenset())
                assert list(far.generate(request)) == list(near.generate(request))
        finally:
            far.close()
            near.close()


LAYOUTS = ({**FIRST}, {"head": "split"}, {**FIRST, "head": "split"}, {"head": "drafter"})
CUTS = ({"stages": "2"}, {"stages": "3"}, {"stage_layers": "2,1,1,1,1"}, {"stage_layers": "1,3,2"})
BRANCHES = (
    {"draft_top_k": "1"},
    {"draft_top_k": "2"},
    {"draft_top_k": "4"},
    {"draft_top_k": "2", "redraft": "true"},
)


GREEDY = [tiny.greedy(prompt, 30) for prompt in PROMPTS]
SAMPLED = [
    GenerationRequest(tiny.PROMPT, (), 30, sampling, seed, frozenset())
    for seed, sampling in enumerate((Sampling(1.0, 0.9, 40), Sampling(1.3)))
]


@cache
def usual_steps(target: Target, options: frozenset[tuple[str, str]], drafter: str) -> list[list[Step]]:
    """Those of one process with the usual layout. They are known once for all layouts and executors."""
    near = load(target, "spd", {**dict(options), "executor": "inline"}, drafter)
    try:
        steps = [list(near.generate(request)) for request in (*GREEDY, *SAMPLED)]
    finally:
        near.close()
    for request, found in zip(GREEDY, steps, strict=False):
        assert [token for step in found for token in step.token_ids] == list(decode(target.decoder, request))
    return steps


def require_usual_steps(target: Target, options: dict[str, str], drafter: str = "random") -> None:
    """Those of one process with the usual layout, with the target's own tokens."""
    usual = frozenset((name, value) for name, value in options.items() if name not in ("drafting", "head", "executor"))
    backend = load(target, "spd", options, drafter)
    try:
        for request, steps in zip((*GREEDY, *SAMPLED), usual_steps(target, usual, drafter), strict=True):
            assert list(backend.generate(request)) == steps
    finally:
        backend.close()


@pytest.mark.parametrize("layout", range(4), ids=lambda at: "-".join(LAYOUTS[at].values()))
@pytest.mark.parametrize("branches", range(4), ids=lambda at: "-".join(BRANCHES[at].values()))
def test_branches_run_in_every_layout(target: Target, layout: int, branches: int) -> None:
    """A square in which every layout, cut and kind of branches meets every other."""
    given = LAYOUTS[layout] | CUTS[(layout + branches) % 4] | BRANCHES[branches]
    require_usual_steps(target, {"executor": "process", **given})


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(cut.values()))
def test_branches_run_in_every_cut(target: Target, cut: dict[str, str]) -> None:
    """Every cut with every kind of branches, in the usual layout."""
    for branches in BRANCHES:
        require_usual_steps(target, {"executor": "process", **cut, **branches})


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(cut.values()))
@pytest.mark.parametrize("head", ["split", "drafter"])
def test_branches_run_in_every_layout_of_one_process(target: Target, head: str, cut: dict[str, str]) -> None:
    for branches in BRANCHES:
        require_usual_steps(target, {"executor": "inline", **FIRST, "head": head, **cut, **branches})


@pytest.mark.parametrize(
    "name", ["v11 qwen3", "v11 hybrid, nominal", "v11 hybrid mixture", "v12 qwen3", "v12 hybrid, deepest", "v10 llama"]
)
def test_published_heads_draft_in_the_first_stages_process(tmp_path: Path, name: str) -> None:
    """As version 12 is meant to run; with branches where the head allows them, which is the default."""
    case = PUBLISHED[name]
    folder = tiny.make_model(tmp_path / "model", case.family, seed=3)
    head = write_head(tmp_path / "head.pt", folder, case.version, **case.config)
    require_usual_steps(tiny.load(folder), {"executor": "process", **FIRST}, str(head))


def test_a_stage_that_dies_behind_the_controllers_is_named(target: Target) -> None:
    backend = load(target, "spd", {"stages": "3", "executor": "process", **FIRST}, "oracle:1")
    try:
        os.kill(workers(backend)[0], 9)
        with pytest.raises(BackendLostError, match=r"stage 1 of 3 of spd .* was killed by SIGKILL"):
            ids(backend, tiny.greedy(tiny.PROMPT, 20))
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"drafting": "first_stage", "executor": "streams"},
            r"spd\.drafting=first_stage: needs .*process, .* is streams",
        ),
        (
            {"head": "split", "executor": "streams"},
            r"spd\.head=split: needs .*executor=process.* Allowed here: last_stage",
        ),
        ({"drafting": "first_stage", "transport": "gloo"}, r"spd\.drafting=first_stage: .* transport=pipe, not gloo"),
        ({"drafting": "first_stage", "stages": "1"}, r"spd\.drafting=first_stage: there is one stage.* Allowed: own"),
    ],
)
def test_layouts_that_there_are_not(target: Target, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(target, "spd", {"stages": "2", "executor": "process", **options}, "oracle:1")


def test_a_head_of_transformers_cannot_be_moved(tmp_path: Path) -> None:
    foreign = tiny.load(tiny.make_model(tmp_path, "olmo2"))
    with pytest.raises(
        InputError, match=r"spd\.head=drafter: transformers' layers serve this model .* Allowed: last_stage"
    ):
        load(foreign, "spd", {"stages": "2", "head": "drafter", "executor": "process"}, "oracle:1")
    near = load(foreign, "spd", {"stages": "2", "executor": "inline"}, "oracle:0.7")
    far = load(foreign, "spd", {"stages": "2", "executor": "process", **FIRST, "head": "auto"}, "oracle:0.7")
    try:
        request = tiny.greedy(tiny.PROMPT, 20)
        assert list(far.generate(request)) == list(near.generate(request))
    finally:
        far.close()


@pytest.mark.parametrize("stage_layers", ["3,3", "auto"])
def test_auto_decides_by_measured_times_and_says_which(target: Target, stage_layers: str) -> None:
    options = {"stage_layers": stage_layers, "executor": "process", "drafting": "auto", "head": "auto"}
    backend = load(target, "spd", options, "random")
    try:
        words = backend.describe().chosen["layout"]
        assert words.startswith(f"{backend._layout.words}; ms a cycle by measured parts: ")
        assert words.count(";") == 6
        request = tiny.greedy(tiny.PROMPT, 20)
        assert ids(backend, request) == list(decode(target.decoder, request))
    finally:
        backend.close()
