"""Stages side by side on one device: rehearsed on a CPU, they give what stages stepped one after the other give."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from spdbench.backend import BackendContext, find_backend, parse_options
from spdbench.decoding.sampling import Sampler
from spdbench.errors import InputError, PromptFailedError
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts
from spdbench.models.target import Target
from spdbench.pipeline.inline import InlinePipeline
from spdbench.pipeline.interface import Pipeline, States
from spdbench.pipeline.schedule import Batch, Change, Node, PipelineSchedule
from spdbench.pipeline.streams import StreamsPipeline
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.backend import SPD
from spdbench_backends.spd.drafter import CapturedHeadDrafter, HeadDrafter, PipelineDrafter
from spdbench_backends.spd.formats import build_head, random_head
from spdbench_backends.spd.head import CapturedDraftModule
from tests import tiny

PROMPT = tuple(range(30, 41))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return tiny.load(tiny.make_model(tmp_path_factory.mktemp("streams") / "qwen3", "qwen3"))


def steps(target: Target, options: dict[str, str], drafter: str, request: GenerationRequest) -> list[Step]:
    context = BackendContext("spd", target, drafter, ("cpu",), 1, seed=3)
    backend = SPD(parse_options("spd", SPD.Options, options), context)
    backend.load()
    try:
        backend.prepare(request)
        return list(backend.generate(request))
    finally:
        backend.close()


@pytest.mark.parametrize("counts", [(6,), (3, 3), (2, 2, 2), (3, 1, 2), (1,) * 6])
@torch.inference_mode()
def test_every_cycle_gives_the_logits_and_states_of_the_stages_in_turn(
    decoder: Decoder, counts: tuple[int, ...]
) -> None:
    stages, hidden_indices = split_by_counts(6, counts), (0, 2, 3, 6)
    streams, inline = (
        StreamsPipeline(decoder, stages, hidden_indices, 60),
        InlinePipeline(decoder, stages, hidden_indices),
    )
    for pipeline in (streams, inline):
        pipeline.prefill(PROMPT, 60, greedy=False)
    schedule = PipelineSchedule(len(stages))
    entering: Batch = (schedule.start(5, len(PROMPT)),)
    for turn in range(30):
        cycle = schedule.cycle()
        found = []
        for pipeline in (streams, inline):
            pipeline.enter(entering)
            pipeline.begin(cycle)
            found.append((pipeline.finish(), by_place(pipeline.states())))
        (ours, our_states), (theirs, their_states) = found
        assert (ours is None) == (theirs is None) == (cycle.completing is None)
        if ours is not None:
            assert isinstance(ours, torch.Tensor)
            assert isinstance(theirs, torch.Tensor)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert our_states.keys() == their_states.keys()
        for key, state in our_states.items():
            torch.testing.assert_close(state, their_states[key], rtol=1e-4, atol=1e-4)
        change = next_change(schedule, 40 + turn, restart=turn % 7 == 6)
        if change.dropped:
            for pipeline in (streams, inline):
                pipeline.drop(change)
        entering = change.entering


def next_change(schedule: PipelineSchedule, token_id: int, *, restart: bool) -> Change:
    """Ends a cycle of a chain, with a draft; a verdict accepts unless it is to `restart`."""
    cycle = schedule.cycle()
    assert cycle.newest is not None
    schedule.draft([(cycle.newest, token_id)])
    if cycle.completing is None:
        return schedule.fill()
    return schedule.restart(token_id + 20) if restart else schedule.accept(schedule.children()[0])


def by_place(found: Sequence[tuple[Node, States]]) -> dict[tuple[int, int], torch.Tensor]:
    return {(node.position, index): state for node, states in found for index, state in states.items()}


@pytest.mark.parametrize("drafter", ["random", "oracle:0.7", "forced:0.8"])
@pytest.mark.parametrize("cut", [{"stages": "1"}, {"stages": "2"}, {"stage_layers": "3,1,2"}, {"stages": "6"}])
def test_steps_are_those_of_the_inline_executor(target: Target, cut: dict[str, str], drafter: str) -> None:
    for prompt, limit in ((PROMPT, 40), (PROMPT[:1], 17), (PROMPT * 4, 5)):
        request = tiny.greedy(prompt, limit)
        found = steps(target, {"executor": "streams", **cut}, drafter, request)
        assert found == steps(target, {"executor": "inline", **cut}, drafter, request)


def test_sampled_steps_are_those_of_the_inline_executor(target: Target) -> None:
    request = GenerationRequest(PROMPT, (), 30, Sampling(0.9, top_p=0.95, top_k=40), 11, frozenset())
    found = steps(target, {"executor": "streams", "stages": "3"}, "random", request)
    assert found == steps(target, {"executor": "inline", "stages": "3"}, "random", request)


@torch.inference_mode()
def test_drafts_of_the_captured_module_are_those_of_the_module(target: Target) -> None:
    """Verdicts alone would not show it: an untrained head is hardly ever right."""
    decoder, stages = target.own_decoder, split_by_counts(6, (2, 2, 2))
    head = build_head(random_head(decoder, stages, 5), decoder, stages)
    module = CapturedDraftModule(head, 100)
    streams = StreamsPipeline(decoder, stages, head.plan.anchors, 100, module)
    captured = CapturedHeadDrafter(head, module, streams.drafted)
    plain = HeadDrafter(head)
    sides: tuple[tuple[Pipeline, PipelineDrafter], ...]
    sides = (streams, captured), (InlinePipeline(decoder, stages, head.plan.anchors), plain)
    for pipeline, drafter in sides:
        _, states = pipeline.prefill(PROMPT, 100, greedy=True)
        drafter.start(states, len(PROMPT), 100)
    sampler, seen, schedule = Sampler(Sampling(), 0), set(), PipelineSchedule(3)
    entering: Batch = (schedule.start(5, len(PROMPT)),)
    for turn in range(40):
        cycle, drafts = schedule.cycle(), []
        for pipeline, drafter in sides:
            pipeline.enter(entering)
            pipeline.begin(cycle)
            for node, found in pipeline.states():
                drafter.observe(node, found)
            drafts.append(drafter.draft(cycle, sampler).token_id)
            pipeline.finish()
        assert drafts[0] == drafts[1], f"cycle {turn}"
        seen.add(drafts[0])
        change = next_change(schedule, drafts[0], restart=turn % 5 == 4)
        if change.dropped:
            for pipeline, drafter in sides:
                pipeline.drop(change)
                drafter.drop(change)
        entering = change.entering
    assert len(seen) > 5, "a head that drafts one token proves little"


def test_a_sequence_longer_than_captured_is_refused_with_the_option_that_helps(target: Target) -> None:
    with pytest.raises(PromptFailedError, match=r"sequence of 81 tokens [^\n]*-o LABEL.context"):
        steps(target, {"executor": "streams", "context": "64"}, "oracle:1", tiny.greedy(PROMPT, 70))


@pytest.mark.parametrize(
    ("executor", "context", "message"),
    [("inline", "64", "with spd.executor=streams only"), ("streams", "100000", r"the model has \d+ positions")],
)
def test_a_context_that_would_mean_nothing_is_refused(
    target: Target, executor: str, context: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"spd.context={context}: .*{message}"):
        steps(target, {"executor": executor, "context": context}, "oracle:1", tiny.greedy(PROMPT, 5))


@pytest.mark.parametrize(
    ("devices", "executor"), [(("cuda:0",), "streams"), (("cuda:0", "cuda:1"), "process"), (("cpu",), "process")]
)
def test_stages_are_streams_by_themselves_where_there_is_one_gpu(
    target: Target, devices: tuple[str, ...], executor: str
) -> None:
    context = BackendContext("spd", target, "oracle:1", devices, 1, seed=3)
    backend = SPD(parse_options("spd", SPD.Options, {"context": "64"}), context)
    backend._stages = split_by_counts(target.config.num_layers, [2, 2, 2])
    assert backend._executor == executor
    with nullcontext() if executor == "streams" else pytest.raises(InputError, match="executor=streams only"):
        backend._check_context()


def test_a_model_whose_layers_wait_for_the_host_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    sparse = tiny.load(tiny.make_model(tmp_path_factory.mktemp("sparse") / "moe", "qwen3_moe"))
    with pytest.raises(InputError, match=r"executor=streams: this model cannot be captured .* experts"):
        steps(sparse, {"executor": "streams"}, "oracle:1", tiny.greedy(PROMPT, 5))
    vanilla = find_backend("vanilla")
    context = BackendContext("vanilla", sparse, "auto", ("cpu",), 1, seed=0)
    with pytest.raises(InputError, match=r"graphs=on: .* Allowed: auto, off"):
        vanilla(parse_options("vanilla", vanilla.Options, {"graphs": "on"}), context).load()
