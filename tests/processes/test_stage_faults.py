"""A stage that dies, fails or hangs, or a user who ends the run: it ends soon, names the cause, keeps what
was finished, and leaves nothing running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from spdbench.backend import BackendContext, find_backend, parse_options
from spdbench.errors import BackendLostError
from spdbench.judge.results.schema import read_result
from spdbench.pipeline.processes.stages import StageWorkers, _signals_wait
from spdbench.pipeline.processes.worker import StageSpec
from spdbench.types import GenerationRequest, Step
from spdbench_backends.spd.pipelined import Pipelined
from tests import tiny
from tests.processes.runs import SECONDS, Process

MARK = "SPDBENCH_TEST_RUN"
SOON = 10.0
"""Seconds within which a run has to end after a fault."""


def load(model: Path, **options: str) -> Pipelined:
    cls = find_backend("spd")
    context = BackendContext("spd", tiny.load(model), "oracle:0.7", ("cpu",), 1, seed=0)
    backend = cls(parse_options("spd", cls.Options, {"stages": "2", **options}), context)
    assert isinstance(backend, Pipelined)
    return backend


def workers(backend: Pipelined) -> list[int]:
    assert backend._pipeline is not None
    return backend._pipeline._workers.process_ids  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def backend(tiny_model: Path) -> Iterator[Pipelined]:
    loaded = load(tiny_model, timeout_s="20")
    loaded.load()
    pids = workers(loaded)
    yield loaded
    loaded.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def request() -> GenerationRequest:
    return tiny.greedy(tiny.PROMPT, 40)


def begun(backend: Pipelined, num_steps: int) -> Iterator[Step]:
    steps = backend.generate(request())
    for _ in range(num_steps):
        next(steps)
    return steps


def lost(work: Callable[[], object], match: str) -> str:
    """What is said when the backend is lost, which it is soon."""
    began = time.monotonic()
    with pytest.raises(BackendLostError, match=match) as error:
        work()
    assert time.monotonic() - began < SOON
    return str(error.value)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 7], ids=["prefill", "decode"])
def test_a_worker_killed_while_it_is_waited_for(backend: Pipelined, stage: int, num_steps: int) -> None:
    steps = begun(backend, num_steps)
    victim = workers(backend)[stage]
    os.kill(victim, signal.SIGSTOP)  # so that the controller waits for it
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    said = lost(
        lambda: list(steps), rf"stage {stage} of 2 of spd \(layers .*, process {victim}\) was killed by SIGKILL"
    )
    assert "memory runs out" in said
    lost(lambda: list(backend.generate(request())), f"stage {stage} of 2")  # it stays lost


def test_a_worker_killed_between_requests(backend: Pipelined) -> None:
    list(backend.generate(request()))
    os.kill(workers(backend)[1], signal.SIGSEGV)
    lost(lambda: list(backend.generate(request())), r"stage 1 of 2 .* was killed by SIGSEGV")


def test_a_stage_that_runs_out_of_memory_shows_its_traceback(backend: Pipelined) -> None:
    assert backend._pipeline is not None
    pipeline = backend._pipeline
    said = lost(lambda: pipeline.prefill(tiny.PROMPT, 1 << 50, greedy=True), r"stage [01] of 2 .* failed:\nTraceback")
    assert "new_cache" in said
    assert "memory" in said


def test_a_stage_that_hangs_is_found_by_its_silence(tiny_model: Path) -> None:
    backend = load(tiny_model, timeout_s="1")
    backend.load()
    try:
        steps = begun(backend, 5)
        os.kill(workers(backend)[1], signal.SIGSTOP)
        lost(lambda: list(steps), r"stage 1 of 2 .* gave no answer within 1 s \(spd\.timeout_s\)")
    finally:
        backend.close()


def test_a_long_prompt_to_a_stage_that_hangs_ends_in_time(tiny_model: Path) -> None:
    backend = load(tiny_model, timeout_s="1")
    backend.load()
    try:
        assert backend._pipeline is not None
        pipeline = backend._pipeline
        os.kill(workers(backend)[0], signal.SIGSTOP)
        said = lost(lambda: pipeline.prefill(range(20_000), 20_001, greedy=True), "stage 0 of 2 .* gave no answer")
        assert "within 1 s" in said
    finally:
        backend.close()


def test_a_worker_killed_while_it_loads(tiny_model: Path) -> None:
    backend = load(tiny_model)

    def kill_a_child() -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for child in multiprocessing.active_children():
                child.kill()
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_child)
    killer.start()
    try:
        lost(backend.load, r"stage [01] of 2 .* was killed by SIGKILL")
    finally:
        killer.join()
        backend.close()


def test_a_worker_killed_before_it_joins_its_group(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0 would wait for it for minutes."""
    wait = StageWorkers._wait_until_ready

    def kill_then_wait(workers: StageWorkers, specs: Sequence[StageSpec]) -> None:
        os.kill(workers.process_ids[1], signal.SIGKILL)
        wait(workers, specs)

    monkeypatch.setattr(StageWorkers, "_wait_until_ready", kill_then_wait)
    lost(load(tiny_model, transport="gloo").load, r"stage 1 of 2 .* was killed by SIGKILL")


@pytest.mark.parametrize(("transport", "timeout_s"), [("pipe", 2), ("gloo", 8)])
def test_a_worker_that_hangs_while_it_loads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, transport: str, timeout_s: int
) -> None:
    """Loading may take long, but not without progress; gloo's own thread polls all the time, which is not progress."""
    wait = StageWorkers._wait_until_ready

    def stop_then_wait(workers: StageWorkers, specs: Sequence[StageSpec]) -> None:
        os.kill(workers.process_ids[1], signal.SIGSTOP)
        wait(workers, specs)

    monkeypatch.setattr(StageWorkers, "_wait_until_ready", stop_then_wait)
    backend = load(tiny_model, transport=transport, timeout_s=str(timeout_s))
    said = rf"^stage 1 of 2 of spd .* no answer within {timeout_s} s \(spd\.timeout_s; it was loading"
    with pytest.raises(BackendLostError, match=said):
        backend.load()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_rows_that_are_not_taken_are_not_their_senders_fault(tiny_model: Path, how: signal.Signals) -> None:
    """A prompt's rows fill the way to the next stage, so that their sender waits, or hears of a closed connection."""
    backend = load(tiny_model, transport="gloo" if how == signal.SIGKILL else "pipe", timeout_s="2")
    backend.load()
    try:
        steps = begun(backend, 5)
        os.kill(workers(backend)[1], how)
        if how == signal.SIGSTOP:
            steps.close()  # type: ignore[attr-defined]
            steps = backend.generate(tiny.greedy(tuple(range(250)) * 6, 5))
        said = lost(lambda: list(steps), r"^stage 1 of 2 ")
        assert "Traceback" not in said
    finally:
        backend.close()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_until_a_stage_knows_what_it_is(kind: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(kind, lambda number, _: came.append(number))
    try:
        with _signals_wait():
            signal.raise_signal(kind)
            assert not came
        assert came == [kind]
        signal.raise_signal(kind)
        assert came == [kind, kind]
    finally:
        signal.signal(kind, before)


# The whole command


class Marked(Process):
    """Its processes carry a mark by which they are found."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__(model, folder, "-o", "spd.stages=2", "-o", "spd.transport=gloo")
        self.mark = uuid.uuid4().hex
        self.environment[MARK] = self.mark

    def workers(self) -> list[int]:
        """The stages' processes, in order."""
        return sorted(pid for pid, _ in processes(self.mark) if _text(f"/proc/{pid}/comm").startswith("spdbench-stage"))

    def is_gone(self) -> bool:
        deadline = time.monotonic() + SOON
        while processes(self.mark):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def processes(mark: str = "") -> list[tuple[int, str]]:
    """Process ids with their command lines: all, or those with a mark."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [(pid, _text(f"/proc/{pid}/cmdline")) for pid in pids if mark in _text(f"/proc/{pid}/environ")]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Iterator[Marked]:
    shared = set(Path("/dev/shm").iterdir())
    marked = Marked(tiny_model, tmp_path)
    yield marked
    assert marked.is_gone()
    assert set(Path("/dev/shm").iterdir()) <= shared


def test_a_lost_stage_ends_the_run_with_what_is_finished(run: Marked) -> None:
    running = run.start("--limit", "8")
    run.wait_for(6, running)
    os.kill(run.workers()[1], signal.SIGKILL)
    began = time.monotonic()
    out, err = running.communicate(timeout=SECONDS)
    assert time.monotonic() - began < SOON
    assert running.returncode == 1
    assert "stage 1 of 2 of spd (layers 3 to 5, process " in err
    assert "was killed by SIGKILL" in err
    assert "Traceback" not in err
    assert "--resume goes on from there" in err
    assert not out
    partial = read_result(run.results / "mini__spd__tiny-llama.json")
    failed = [done for done in partial.runs if done.finish_reason == "error"]
    assert len(failed) == 1
    assert "stage 1 of 2" in (failed[0].error or "")
    assert len(read_result(run.results / "mini__vanilla__tiny-llama.json").runs) >= 3
    assert run.is_gone()
    code, err = run.finish("--limit", "8", "--resume")
    assert code == 1  # the failed prompt stays failed
    assert "Traceback" not in err
    result = read_result(run.results / "mini__spd__tiny-llama.json")
    assert len(result.runs) == 16
    assert sum(done.finish_reason == "error" for done in result.runs) == 1


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_that_ends_the_run_ends_its_stages(run: Marked, how: signal.Signals, code: int) -> None:
    running = run.start()
    run.wait_for(6, running)
    assert len(run.workers()) >= 2
    running.send_signal(how)
    began = time.monotonic()
    _, err = running.communicate(timeout=SECONDS)
    assert time.monotonic() - began < SOON
    assert running.returncode == code
    assert "Traceback" not in err
    assert run.lines() >= 6


def test_ctrl_c_for_the_whole_process_group(run: Marked) -> None:
    """As a terminal sends it: to the stages too."""
    running = run.start()
    run.wait_for(6, running)
    for pid in [*run.workers(), running.pid]:
        os.kill(pid, signal.SIGINT)
    _, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert "stage" not in err.partition("finished requests")[2]


@pytest.mark.parametrize("num_started", [1, 2])
def test_ended_while_its_stages_load(run: Marked, num_started: int) -> None:
    running = run.start()
    deadline = time.monotonic() + SECONDS
    while len(run.workers()) < num_started and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 143
    assert "Traceback" not in err


def test_two_runs_at_once_do_not_collide(run: Marked, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Marked(tiny_model, tmp_path / "other")
    both = [each.start("--limit", "2") for each in (run, other)]
    for running in both:
        _, err = running.communicate(timeout=SECONDS)
        assert running.returncode == 0, err
    assert other.is_gone()
    for each in (run, other):
        divergence = read_result(each.results / "mini__spd__tiny-llama.json").divergence
        assert divergence is not None
        assert divergence.identical == 4
