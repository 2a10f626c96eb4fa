"""Stages in processes of their own decode what one process decodes, request after request."""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import torch

from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.judge.metrics.bubble import cycles_by_fill, full_cycles, lane_time, read_spans
from spdbench.measure.clock import measure, peak_memory_bytes
from spdbench.models import target as models_target
from spdbench.models.partition import split_by_counts
from spdbench.models.target import Target
from spdbench.pipeline.processes.process import ProcessPipeline
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.spd.formats import build_head, random_head
from spdbench_backends.spd.pipelined import Pipelined
from tests import tiny
from tests.unit.spd.dialled import DialledDrafter

CASES = [
    ("spd", {"stages": "2"}, "oracle:0.7"),
    ("spd", {"stage_layers": "3,1,2", "transport": "gloo"}, "oracle:0.7"),
    ("spd", {"stages": "3"}, "random"),
    ("spd", {"stages": "3", "draft_top_k": "2"}, "random"),
    ("spd", {"stage_layers": "3,1,2", "redraft": "true", "draft_top_k": "4", "transport": "gloo"}, "random"),
    ("ppsd", {"stages": "3", "transport": "gloo"}, "random"),
]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


def load(target: Target, name: str, options: dict[str, str], drafter: str) -> Pipelined:
    cls = find_backend(name)
    backend = cls(parse_options(name, cls.Options, options), BackendContext(name, target, drafter, ("cpu",), 1, seed=0))
    backend.load()
    assert isinstance(backend, Pipelined)
    return backend


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1].values())}-{case[2]}")
def pair(request: pytest.FixtureRequest, target: Target) -> Iterator[tuple[Pipelined, Pipelined]]:
    """A backend with stage processes, and the same in one process."""
    name, options, drafter = request.param
    far, near = load(target, name, options, drafter), load(target, name, {**options, "executor": "inline"}, drafter)
    yield far, near
    for backend in (far, near):
        backend.close()
        backend.close()


def ids(backend: Backend, request: GenerationRequest) -> list[int]:
    return [token for step in backend.generate(request) for token in step.token_ids]


def workers(backend: Pipelined) -> list[int]:
    assert backend._pipeline is not None
    return backend._pipeline._workers.process_ids  # type: ignore[attr-defined,no-any-return]


def test_what_runs_where_stands_in_the_result(pair: tuple[Pipelined, Pipelined]) -> None:
    far, near = (backend.describe() for backend in pair)
    assert far.chosen["executor"] == "process"
    assert ("max_rows" in far.chosen) == getattr(pair[0], "_has_branches", False)
    assert near.chosen == {name: far.chosen[name] for name in ("max_rows",) if name in far.chosen} | {
        "executor": "inline"
    }
    assert far.chosen["transport"] in ("pipe", "gloo")
    assert len(workers(pair[0])) == far.lanes == near.lanes


def test_greedy_output_is_the_targets_own(pair: tuple[Pipelined, Pipelined], target: Target) -> None:
    for prompt in (tiny.PROMPT, tiny.PROMPT[:1], tuple(range(60, 160))):
        request = tiny.greedy(prompt, 40)
        assert ids(pair[0], request) == list(decode(target.decoder, request))


def test_steps_are_those_of_one_process(pair: tuple[Pipelined, Pipelined]) -> None:
    request = tiny.greedy(tiny.PROMPT, 30)
    far, near = (list(backend.generate(request)) for backend in pair)
    assert far == near


@pytest.mark.parametrize("cut", ["3,3", "2,2,2", "3,1,2", "2,1,1,1,1"])
def test_branches_that_turn_out_right_are_those_of_one_process(target: Target, cut: str) -> None:
    """First and second choices, drafts of deeper rows: with the counts of every step and the drafts that it settles."""
    decoder, options = target.own_decoder, {"stage_layers": cut, "draft_top_k": "2"}
    answer = list(decode(decoder, tiny.greedy(tiny.PROMPT, 30)))
    request = replace(tiny.greedy(tiny.PROMPT, 30), keep_drafts=True)
    far, near = (load(target, "spd", {**options, "executor": how}, "random") for how in ("process", "inline"))
    stages = split_by_counts(6, [int(count) for count in cut.split(",")])
    head = build_head(random_head(decoder, stages, 3), decoder, stages)
    try:
        for top_k, redraft, max_rows in product((1, 2, 4), (False, True), (2, 64)):
            found = []
            for backend in (far, near):
                drafter = DialledDrafter(
                    head, top_k, max_rows, redraft=redraft, num_prompt=len(tiny.PROMPT), answer=answer
                )
                backend._new_drafter = lambda _, drafter=drafter: drafter  # type: ignore[method-assign, misc]
                found.append(list(backend.generate(request)))
            assert found[0] == found[1]
            assert [token for step in found[0] for token in step.token_ids] == answer
    finally:
        far.close()
        near.close()


@pytest.mark.parametrize("name", ["spd", "ppsd"])
def test_a_device_beyond_the_stages_is_the_drafters(target: Target, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Here it is the processor under another name."""
    known = models_target.find_device
    other = torch.device("cpu", 0)
    monkeypatch.setattr(models_target, "find_device", lambda name: other if name == "cuda:7" else known(name))
    cls = find_backend(name)
    context = BackendContext(name, target, "random", ("cpu", "cpu", "cuda:7"), 1, seed=0)
    backend, near = (
        cls(parse_options(name, cls.Options, {"stages": "2"}), context),
        load(target, name, {"stages": "2", "executor": "inline"}, "random"),
    )
    try:
        backend.load()
        assert isinstance(backend, Pipelined)
        assert backend._drafters_target.device == other
        assert backend._drafters_target.weights == {}
        assert backend.describe().devices == ("cpu", "cuda:7")
        for request in (
            tiny.greedy(tiny.PROMPT, 20),
            GenerationRequest(tiny.PROMPT, (), 20, Sampling(1.0), 7, frozenset()),
        ):
            assert list(backend.generate(request)) == list(near.generate(request))
    finally:
        backend.close()
        near.close()


def test_limits_and_ends_of_sequence(pair: tuple[Pipelined, Pipelined], target: Target) -> None:
    answer = list(decode(target.decoder, tiny.greedy(tiny.PROMPT, 20)))
    assert ids(pair[0], tiny.greedy(tiny.PROMPT, 1)) == answer[:1]
    for token in dict.fromkeys(answer):
        assert ids(pair[0], _ending_with(token)) == answer[: answer.index(token) + 1]


def _ending_with(token: int) -> GenerationRequest:
    return GenerationRequest(tiny.PROMPT, (), 20, Sampling(), 0, frozenset({token}))


def test_a_request_that_is_left_early_leaves_nothing_behind(pair: tuple[Pipelined, Pipelined], target: Target) -> None:
    for num_steps in (1, 2, 5):
        steps = pair[0].generate(tiny.greedy(tiny.PROMPT, 40))
        for _ in range(num_steps):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        request = tiny.greedy(tiny.PROMPT[2:], 20)
        assert ids(pair[0], request) == list(decode(target.decoder, request))


def test_logits_of_dropped_tokens_that_nobody_reads_stop_no_stage(tmp_path: Path) -> None:
    """They fill the last stage's pipe, and the rows of a long prompt the pipe to it; the stages in front then wait for
    it, and it for a controller that waits for one of them."""
    wide = tiny.load(tiny.make_model(tmp_path, vocab_size=40_000, max_position_embeddings=2048))
    far = load(wide, "spd", {"stages": "3", "timeout_s": "10"}, "random")
    near = load(wide, "spd", {"stages": "3", "executor": "inline"}, "random")
    try:
        for seed in range(2):
            request = GenerationRequest((5,) * 1000, (), 20, Sampling(1.0), seed, frozenset())
            begun = [list(islice(backend.generate(request), 4)) for backend in (far, near)]
            assert begun[0] == begun[1]
    finally:
        far.close()
        near.close()


def test_sampling_draws_what_one_process_draws(pair: tuple[Pipelined, Pipelined]) -> None:
    if "oracle" in pair[0]._context.drafter:
        pytest.skip("an oracle knows greedy answers only")
    request = GenerationRequest(tiny.PROMPT, (), 30, Sampling(1.0, 0.9, 40), 7, frozenset())
    assert ids(pair[0], request) == ids(pair[1], request)


def test_spans_tell_what_every_stage_did(pair: tuple[Pipelined, Pipelined]) -> None:
    backend, request = pair[0], tiny.greedy(tiny.PROMPT, 30)
    measured = measure(backend, request)
    spans, lanes = backend.spans(), backend.describe().lanes
    for lane in range(lanes):
        kept = Counter(s.position for s in spans if s.lane == lane and s.kind == "target" and s.kept)
        assert kept == Counter(range(len(tiny.PROMPT), len(tiny.PROMPT) + 29))
    table = read_spans(spans, lanes)
    ends = [measured.start_ns + at for at in measured.steps.t_ns]
    shares = lane_time(table, ends).shares()
    assert sum(shares.model_dump().values()) == pytest.approx(1)
    assert shares.wasted > 0 < shares.fill
    verdicts = sum(measured.steps.judged)
    full = full_cycles(table, ends)
    assert full is not None
    assert 0 < full.num <= verdicts
    assert full.stage_s < full.wall_s
    fill = cycles_by_fill(table, ends, lanes)
    steps = measured.steps
    flushes = sum(judged > accepted for judged, accepted in zip(steps.judged[:-1], steps.accepted[:-1], strict=True))
    assert sum(fill.num) == len(ends) - 1
    assert fill.num[1] >= flushes + 1  # after each, and after prefill, whatever other stages have begun ahead
    assert sum(fill.drafts) >= verdicts


def test_idle_workers_use_no_processor(pair: tuple[Pipelined, Pipelined]) -> None:
    ids(pair[0], tiny.greedy(tiny.PROMPT, 5))
    before = [_ticks(pid) for pid in workers(pair[0])]
    time.sleep(0.5)
    after = [_ticks(pid) for pid in workers(pair[0])]
    assert max(late - early for late, early in zip(after, before, strict=True)) <= 5  # of the 50 that have passed


def _ticks(pid: int) -> int:
    """Processor time used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_workers_memory_counts(pair: tuple[Pipelined, Pipelined]) -> None:
    own = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1])
    peak = peak_memory_bytes(("cpu",))
    assert peak is not None
    assert peak > (own << 10) + len(workers(pair[0])) * (20 << 20)


def test_a_stage_loads_its_own_layers_only(target: Target) -> None:
    first, last = (target.source.load(layers, "cpu") for layers in (range(2), range(2, 6)))
    assert [sorted(part.weights) for part in (first, last)] == [[0, 1], [2, 3, 4, 5]]  # type: ignore[attr-defined]
    assert (first.head, last.embeddings_VM) == (None, None)  # type: ignore[attr-defined]


def test_answers_of_one_token_do_not_fill_the_pipe_of_epochs(target: Target) -> None:
    backend = load(target, "spd", {"stages": "2", "timeout_s": "10"}, "oracle:1")
    assert isinstance(backend._pipeline, ProcessPipeline)
    control = backend._pipeline._workers._stages[0].control
    fcntl.fcntl(control, fcntl.F_SETPIPE_SZ, 4096)  # of 12 bytes a request
    os.set_blocking(control.fileno(), False)  # so that a full pipe raises
    try:
        for _ in range(400):
            assert len(ids(backend, tiny.greedy(tiny.PROMPT[:2], 1))) == 1
    finally:
        backend.close()


def test_close_ends_the_processes(target: Target) -> None:
    backend = load(target, "spd", {"stages": "2"}, "oracle:1")
    pids = workers(backend)
    backend.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nccl_wants_a_gpu_for_every_stage(target: Target) -> None:
    with pytest.raises(InputError, match=r"spd\.transport=nccl: each of the 2 stages needs a GPU .* Allowed: auto"):
        load(target, "spd", {"stages": "2", "transport": "nccl"}, "oracle:1")


@pytest.mark.parametrize("limit", ["inf", "1e9"])
def test_a_limit_that_no_clock_can_wait_for(limit: str) -> None:
    with pytest.raises(InputError, match=r"spd\.timeout_s=.* less than or equal to 1000000"):
        parse_options("spd", find_backend("spd").Options, {"timeout_s": limit})
