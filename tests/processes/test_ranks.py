"""Stages on the ranks of a torchrun job decode what one process decodes; a lost rank is named, and nothing stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import pytest

from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.cli import ranks as cli_ranks
from spdbench.decoding.autoregressive import decode
from spdbench.errors import BackendLostError, InputError
from spdbench.judge.metrics.bubble import lane_time, read_spans
from spdbench.measure.clock import measure, peak_memory_bytes
from spdbench.measure.energy import energy_meter
from spdbench.measure.process_times import own_cpu_ns
from spdbench.models.target import Target
from spdbench.pipeline.ranks import remote
from spdbench.pipeline.ranks.job import Purpose, accept, clock_offset, connect, listen, new_key, place_of
from spdbench.processors import workers
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.spd.pipelined import Pipelined
from tests import tiny
from tests.cli.run_helpers import write_suite
from tests.processes.rank_group import JOIN_S, RankGroup, free_port, job_of, variables

SOON = 20.0
"""Seconds within which the end of a rank has to be noticed; the limits of the backends are far above or below it."""
FIRST = {"drafting": "first_stage"}
"""Rank 0 is the first stage's rank, so that four ranks make four stages."""
CASES = [
    ("spd", {"stage_layers": "3,1,2"}, "oracle:0.7"),
    ("spd", {"stages": "3", "transport": "gloo"}, "random"),
    ("ppsd", {"stages": "3"}, "random"),
    ("spd", {"stage_layers": "1,3,2", "draft_top_k": "4", "redraft": "true", "head": "drafter"}, "random"),
    ("spd", {"stage_layers": "2,1,2,1", **FIRST, "draft_top_k": "4", "head": "split"}, "random"),
    ("ppsd", {"stage_layers": "1,2,1,2", **FIRST}, "random"),
]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


def load(target: Target, name: str, options: dict[str, str], drafter: str = "oracle:0.7") -> Pipelined:
    cls = find_backend(name)
    given = {"executor": "torchrun", **options}
    backend = cls(parse_options(name, cls.Options, given), BackendContext(name, target, drafter, ("cpu",), 1, seed=0))
    assert isinstance(backend, Pipelined)
    try:
        backend.load()
    except BaseException:
        backend.close()
        raise
    return backend


@pytest.fixture(scope="module")
def group() -> Iterator[RankGroup]:
    """Four ranks, of which the last counts as on another node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "machine_id", lambda: "another machine")
        found = RankGroup(3, num_on_node_1=1)
    yield found
    assert found.end() == [(0, "")] * 3


@pytest.fixture
def own_group() -> Iterator[RankGroup]:
    """Three ranks of one test."""
    before = remote._joined
    found = RankGroup(2)
    yield found
    remote.set_joined(before)
    found.ranks.close()
    found.kill()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1].values())}")
def test_steps_are_those_of_one_process(target: Target, case: tuple[str, dict[str, str], str]) -> None:
    check_steps(target, *case)


@pytest.mark.parametrize(
    ("num_hosts", "cuts"),
    [
        (1, [{"stages": "2", **FIRST}]),
        (2, [{"stages": "2"}, {"stage_layers": "1,3,2", **FIRST, "head": "split"}]),
        (3, [{"stages": "3"}, {"stage_layers": "3,1,2", "head": "split"}]),
        (5, [{"stage_layers": "2,1,1,1,1"}]),
    ],
)
def test_branches_run_in_every_cut(target: Target, num_hosts: int, cuts: list[dict[str, str]]) -> None:
    """Ranks are started once for all cuts that need as many."""
    before, found = remote._joined, RankGroup(num_hosts)
    try:
        for options, top_k in product(cuts, ("1", "2", "4")):
            check_steps(target, "spd", {**options, "draft_top_k": top_k}, "random")
    finally:
        ended = found.end()
        remote.set_joined(before)
    assert ended == [(0, "")] * num_hosts


@pytest.mark.usefixtures("group")
def test_recurrent_layers_go_back_on_other_ranks(tmp_path: Path) -> None:
    hybrid = tiny.load(tiny.make_model(tmp_path, "qwen3_5_text", seed=3))
    check_steps(hybrid, "spd", {"stage_layers": "1,2,1,2", **FIRST, "head": "split"}, "random")


def check_steps(target: Target, name: str, options: dict[str, str], drafter: str) -> None:
    """They are those of the same pipeline in one process, and their tokens the target's own."""
    far, near = load(target, name, options, drafter), load(target, name, {**options, "executor": "inline"}, drafter)
    try:
        for prompt in (tiny.PROMPT, tiny.PROMPT[:1], tuple(range(60, 160))):
            request = tiny.greedy(prompt, 30)
            steps = list(far.generate(request))
            assert steps == list(near.generate(request))
            assert [token for step in steps for token in step.token_ids] == list(decode(target.decoder, request))
        if "oracle" not in drafter:
            request = GenerationRequest(tiny.PROMPT, (), 30, Sampling(1.0, 0.9, 40), 7, frozenset())
            assert list(far.generate(request)) == list(near.generate(request))
        left_early = far.generate(tiny.greedy(tiny.PROMPT, 40))
        next(left_early), next(left_early)
        left_early.close()  # type: ignore[attr-defined]
        assert list(far.generate(tiny.greedy(tiny.PROMPT, 9))) == list(near.generate(tiny.greedy(tiny.PROMPT, 9)))
        assert far.describe().chosen["executor"] == "torchrun"
    finally:
        far.close()
        far.close()
        near.close()


@pytest.mark.usefixtures("group")
def test_ranks_have_the_usual_layout_where_they_choose(target: Target) -> None:
    """What parts take is known of rank 0's machine only."""
    backend = load(target, "spd", {"stages": "3", "drafting": "auto", "head": "auto"})
    try:
        assert "layout" not in backend.describe().chosen
    finally:
        backend.close()


@pytest.mark.usefixtures("group")
def test_rank_0_may_run_the_first_stage(target: Target) -> None:
    backend = load(target, "spd", {"stage_layers": "2,1,2,1", **FIRST, "head": "drafter"}, "oracle:1")
    try:
        info = backend.describe()
        assert info.chosen["layout"] == "drafter with the first stage, head with the drafter"
        assert info.chosen["nodes"] == "0, 0, 0, 1 by stage"
        assert info.chosen["clock_offsets_us"].startswith("0 ± 0, ")
        assert info.devices == ("cpu", "cpu:node0", "cpu:node1")
        assert info.stage_layers == (2, 1, 2, 1)
        list(backend.generate(tiny.greedy(tiny.PROMPT, 9)))
        lanes = {(span.lane, span.kind) for span in backend.spans()}
        assert {(0, "target"), (0, "draft"), (0, "head"), (3, "target")} <= lanes
        assert (3, "head") not in lanes
    finally:
        backend.close()
    message = r"spd\.drafting=first_stage: rows from the first stage .* Allowed with it: transport=pipe, not gloo"
    with pytest.raises(InputError, match=message):
        load(target, "spd", {"stage_layers": "2,1,2,1", **FIRST, "transport": "gloo"})


@pytest.mark.usefixtures("group")
def test_result_names_nodes_and_clocks_and_spans_carry_rank_0s_time(target: Target) -> None:
    backend = load(target, "spd", {"stages": "3"})
    try:
        info = backend.describe()
        assert info.chosen["nodes"] == "0, 0, 1 by stage"
        assert "±" in info.chosen["clock_offsets_us"]
        assert info.devices == ("cpu:node0", "cpu:node1")
        request = tiny.greedy(tiny.PROMPT, 30)
        measured = measure(backend, request)
        spans = backend.spans()
        for lane in range(3):
            kept = Counter(s.position for s in spans if s.lane == lane and s.kind == "target" and s.kept)
            assert kept == Counter(range(len(tiny.PROMPT), len(tiny.PROMPT) + 29))
        ends = [measured.start_ns + at for at in measured.steps.t_ns]
        assert min(s.start_ns for s in spans) > measured.start_ns
        assert max(s.end_ns for s in spans) < ends[-1] + 10**9
        assert sum(lane_time(read_spans(spans, 3), ends).shares().model_dump().values()) == pytest.approx(1)
        assert peak_memory_bytes(info.devices) is None
        assert not energy_meter(info.devices).counters
    finally:
        backend.close()


def test_spans_of_a_clock_that_is_far_off_carry_rank_0s_time(
    group: RankGroup, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: every rank's clock counts as an hour ahead. The spans come out an hour early, so it is really used."""
    hour = 3600 * 10**9
    monkeypatch.setattr(group.ranks, "offsets", ((hour, 0),) * 4)
    backend = load(target, "spd", {"stages": "3"})
    try:
        list(backend.generate(tiny.greedy(tiny.PROMPT, 9)))
        now = time.perf_counter_ns()
        stages = [span for span in backend.spans() if span.lane < 3 and span.kind == "target"]
        assert stages
        assert all(now - 2 * hour < span.start_ns < now - hour for span in stages)
    finally:
        backend.close()


def test_threads_of_rank_0s_drafter_are_those_that_the_stages_on_its_machine_leave() -> None:
    class Session:
        """To a rank on another machine, with our clock."""

        def send_bytes(self, _: bytes) -> None: ...

        def recv_bytes(self) -> bytes:
            return b"%d" % time.perf_counter_ns()

    own = place_of(job_of(0, 4, 1))
    far = [replace(own, rank=rank, node=1, machine="another") for rank in (2, 3)]
    sessions = cast("list[Connection]", [Session()] * 3)
    ranks = remote.Ranks([own, replace(own, rank=1), *far], sessions, b"")
    assert ranks.threads(3, 16) == (8, 1)  # stage 0 here, two there
    assert ranks.threads(4, 16) == (8, 2)  # rank 0 runs one as well
    assert ranks.is_here == (True, True, False, False)


def test_clock_offset_is_right_within_its_error() -> None:
    """The way there takes 40 us, the way back 10 or more: half the difference is the error that nobody can see."""
    ahead, delays = 5_000_000_000, iter([40, 10, 40, 300] * 20)

    def wait(us: int) -> int:
        until = time.perf_counter_ns() + us * 1000
        while time.perf_counter_ns() < until:
            pass
        return time.perf_counter_ns()

    def ping() -> int:
        theirs = wait(next(delays)) + ahead
        wait(next(delays))
        return theirs

    offset, error = clock_offset(ping)
    assert error >= 25_000
    assert abs(offset - ahead) <= error


@pytest.mark.usefixtures("group")
def test_number_of_ranks_has_to_fit_the_stages(target: Target) -> None:
    for count in (2, 6):
        said = rf"spd\.executor=torchrun: {count} stages need {count + 1} ranks, .* torchrun started 4"
        with pytest.raises(InputError, match=said):
            load(target, "spd", {"stages": str(count)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "decoder", property(lambda _: pytest.fail("weights are loaded for nothing")))
        with pytest.raises(InputError, match="2 stages need 3 ranks"):
            load(target, "spd", {"stages": "2"})
    said = r"4 stages need 5 ranks, .* started 4.* product is 5, or stages=3, or spd\.drafting=first_stage, "
    with pytest.raises(InputError, match=said):
        load(target, "spd", {"stage_layers": "2,1,2,1"})
    said = r"3 stages need 3 ranks, as rank 0 measures and runs the first one and .* is 3, or stages=4\."
    with pytest.raises(InputError, match=said):
        load(target, "spd", {"stages": "3", **FIRST})


def test_a_world_size_that_does_not_fit_ends_all_ranks_with_one_message(tiny_model: Path, tmp_path: Path) -> None:
    """As `torchrun --nproc_per_node=2` starts them, which itself always ends with 1."""
    port = free_port()
    words = ["run", str(write_suite(tmp_path)), "-m", str(tiny_model), "--dtype", "float32", "--devices", "cpu"]
    words += ["--drafter", "oracle:1", "-b", "spd", "-o", "spd.stages=3", "-o", "spd.executor=torchrun"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "spdbench", *words, "--results", str(tmp_path / "results")],
            env={**os.environ, **variables(job_of(rank, 2, port)), "SPDBENCH_CACHE": str(tmp_path / "cache")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (out, err), other = (rank.communicate(timeout=JOIN_S) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [line for line in err.splitlines() if line.startswith("Error: ")] == [
        "Error: -o spd.executor=torchrun: 3 stages need 4 ranks, as rank 0 measures and every other rank runs one, but "
        "torchrun started 2. Give --nnodes and --nproc_per_node whose product is 4, or stages=1."
    ]
    assert (out, other) == ("", ("", ""))
    assert not list((tmp_path / "results").glob("*spd*"))


def test_without_torchrun_it_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_joined", None)
    with pytest.raises(InputError, match=r"spd\.executor=torchrun: torchrun has to start the run: torchrun .*process"):
        load(target, "spd", {"stages": "3"})


def lost(backend: Backend, match: str) -> None:
    """What is said when the backend is lost in the middle of a request, which it is soon."""
    began = time.monotonic()
    with pytest.raises(BackendLostError, match=match):
        list(backend.generate(tiny.greedy(tiny.PROMPT, 200)))
    assert time.monotonic() - began < SOON


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_rank_that_is_killed_is_named_and_takes_its_stage_with_it(own_group: RankGroup, target: Target) -> None:
    backend = load(target, "spd", {"stages": "2", "timeout_s": "300"})
    stages = workers()
    assert len(stages) == 2
    own_group.hosts[1].kill()
    lost(backend, r"stage 1 of 2 of spd \(layers 3 to 5, rank 2 on node 0, process \d+\) is lost")
    assert own_group.ranks.lost() == ["rank 2 on node 0"]
    backend.close()
    assert all(map(is_gone, stages))
    assert workers() == []


@pytest.mark.usefixtures("own_group")
def test_a_stage_that_is_killed_is_named_and_the_ranks_serve_the_next(target: Target) -> None:
    backend = load(target, "spd", {"stages": "2", "timeout_s": "300"})
    assert own_cpu_ns() > 0
    os.kill(workers()[0], signal.SIGKILL)
    lost(backend, r"stage 0 of 2 of spd \(layers 0 to 2, rank 1 .*\) was killed by SIGKILL")
    backend.close()
    again = load(target, "spd", {"stages": "2"})
    request = tiny.greedy(tiny.PROMPT, 20)
    assert [id_ for step in again.generate(request) for id_ in step.token_ids] == list(decode(target.decoder, request))
    again.close()


@pytest.mark.parametrize("rank_too", [False, True], ids=["stage", "stage and rank"])
def test_silence_is_noticed_within_the_limit(own_group: RankGroup, target: Target, rank_too: bool) -> None:
    """Both stopped: as a node that is cut off looks from rank 0."""
    backend = load(target, "spd", {"stages": "2", "timeout_s": "2"})
    stages = workers()
    stopped = [stages[1], *([own_group.hosts[1].pid] if rank_too else [])]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    why = "its rank does not answer either" if rank_too else "does not even answer signals"
    lost(backend, rf"(?s)stage 1 of 2 .*rank 2 on node 0.* no answer within 2 s \(spd\.timeout_s\).*{why}")
    backend.close()
    if rank_too:
        own_group.hosts[1].kill()
    assert all(map(is_gone, stages))


def test_ranks_end_when_rank_0_is_killed(own_group: RankGroup, target: Target) -> None:
    """A connection that ends without an exit code is all that they see of it."""
    backend = load(target, "spd", {"stages": "2"})
    stages = workers()
    for session in own_group.ranks._sessions:
        session.close()
    for rank, host in enumerate(own_group.hosts, 1):
        _, err = host.communicate(timeout=SOON)
        assert (host.returncode, err.count("Error: ")) == (1, 1)
        assert f"rank {rank} on node 0 lost rank 0" in err
    assert all(map(is_gone, stages))
    backend.close()


@pytest.mark.usefixtures("own_group")
def test_model_that_is_not_on_the_other_node(
    tmp_path: Path,
) -> None:
    folder = tiny.make_model(tmp_path / "here")
    target = tiny.load(folder)
    target.decoder  # noqa: B018 - loads the weights
    folder.rename(tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"rank 1 on node 0: the model's files are not there .*here.* at the same path"
    ):
        load(target, "spd", {"stages": "2"})


def test_rank_0_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    for name, value in variables(job_of(1, 2, port)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli_ranks, "die_with", lambda *_: None)
    assert cli_ranks.run_rank([], limit_s=0.5) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"Error: rank 1 on node 0 cannot reach rank 0's node at 127.0.0.1:{port} within 0.5 s")
    assert len(err.splitlines()) == 1


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in variables(job_of(0, 2, free_port())).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli_ranks, "die_with", lambda *_: None)
    assert cli_ranks.run_rank(["suites"], limit_s=0.5) == 2
    said = capfd.readouterr()
    assert said.err.splitlines() == ["Error: rank 1 of 2 did not come within 0.5 s"]
    assert said.out == ""


def test_incomplete_variables_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv("RANK", raising=False)
    assert cli_ranks.run_rank([]) == 2
    assert "not all of torchrun's variables are ('RANK')" in capfd.readouterr().err


def test_a_stranger_gets_no_connection() -> None:
    """Who does not know the job's key can neither give orders nor be mistaken for a rank."""
    store = socket.create_server(("127.0.0.1", 0))
    job = job_of(1, 2, store.getsockname()[1])
    listener, place = listen(job)
    key, other = (bytes.fromhex(new_key()) for _ in range(2))

    for their_key in (key, other):
        answers: list[bool] = []

        def call(with_key: bytes = their_key, into: list[bool] = answers) -> None:
            try:
                connect(place, with_key, Purpose("session")).close()
                into.append(True)
            except OSError:
                into.append(False)

        caller = threading.Thread(target=call)
        caller.start()
        found = accept(listener, key)
        caller.join()
        assert answers == [their_key == key]
        assert (found is not None) == (their_key == key)
        if found is not None:
            found[0].close()
    listener.close()
    store.close()
