"""Backends that take several requests at once, ask for time, or report more of an answer than its steps."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import BackendLostError, PromptFailedError, TryAgainError
from spdbench.types import UNKNOWN_ID, DraftCounts, EngineReport, GenerationRequest, Prompt, Step
from tests.mock_backend import MockBackend, MockDraftVerify
from tests.unit.measure.test_runner import Bench, workload

MANY = tuple(Prompt(f"p{i}", "maths", ("one", "two")) for i in range(6))


class Wide(MockDraftVerify):
    """Takes three requests at once, and answers when three are there."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.concurrency = 3
        self.gate = threading.Barrier(3)
        self.met = False

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        with suppress(threading.BrokenBarrierError):
            # The first three have to meet; later the last block ends, and users stop to ask.
            self.gate.wait(timeout=0.5 if self.met else 20)
            self.met = True
        yield from super().generate(request)


def test_as_many_conversations_go_on_at_once_as_the_backend_takes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, wide := Wide(), prompts=MANY)
    runs = bench.run()
    assert wide.met
    assert sorted(run.key for run in runs) == [(f"p{i}", turn, 0) for i in range(6) for turn in (0, 1)]
    assert all(run.finish_reason == "length" for run in runs)


def test_a_wide_backend_never_shares_the_machine_with_another(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend(), Wide(), MockDraftVerify(), prompts=MANY)
    bench.run()
    labels = [label for label, _ in bench.watcher.seen]
    assert set(labels[:24]) == {"first", "third"}
    assert labels[24:] == ["second"] * 12


def test_a_wide_baseline_goes_first_and_gives_the_context(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Wide(), MockBackend(), prompts=MANY)
    bench.run()
    labels = [label for label, _ in bench.watcher.seen]
    assert labels == ["first"] * 12 + ["second"] * 12
    runs = {run.key: run for run in bench.journals[0].runs()}
    assert all(run.prompt_sha256 == runs[run.key].prompt_sha256 for run in bench.journals[1].runs())


def test_a_finished_wide_run_is_not_run_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Wide(), prompts=MANY)
    bench.run()
    bench.close()
    again = Bench(tmp_path, wide := Wide(), prompts=MANY, resume=True)
    again.run()
    assert wide.requests == []


def test_answers_under_load_are_scored_when_nobody_is_measured(tmp_path: Path) -> None:
    """Also those that an earlier process measured, and was ended before it scored them."""
    bench, measured = Bench(tmp_path, Wide(), prompts=MANY), list[int]()

    def killed(*_: Any) -> float:
        measured.append(len(bench.journals[0]))
        if len(measured) == 2:
            raise BackendLostError("killed")
        return 0.5

    bench.runner._score = killed
    with pytest.raises(BackendLostError, match="killed"):
        bench.run()
    assert measured == [12, 12]
    bench.close()
    again = Bench(tmp_path, wide := Wide(), prompts=MANY, resume=True, score=lambda *_: 0.25)
    assert Counter({run.key: run.score for run in again.run()}.values()) == {0.25: 11, 0.5: 1}
    assert wide.requests == []


class Lost(Wide):
    """Its server is gone after three requests, while others wait for an answer that never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        if self.gate.wait(timeout=20) == 0:
            raise BackendLostError("the server is gone")
        self.closed.wait(20)
        if self.closed.is_set():
            raise PromptFailedError("the connection was lost")
        yield from super().generate(request)

    def close(self) -> None:
        self.closed.set()
        self.gate.abort()


def test_a_lost_backend_ends_the_run_and_waiting_requests_have_not_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Lost(), prompts=MANY)
    with pytest.raises(BackendLostError, match="gone"):
        bench.run()
    assert [run.error for run in bench.journals[0].runs()] == ["the server is gone"]


class Busy(MockDraftVerify):
    """Busy twice before each answer."""

    tries = 0

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.tries += 1
        if self.tries % 3:
            raise TryAgainError("busy", 0.5)
        yield from super().generate(request)


def test_a_request_that_has_to_wait_is_measured_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Busy(), prompts=(Prompt("p", "maths", ("one",)),))
    (run,) = bench.run()
    assert run.finish_reason == "length"
    assert run.ttft_s is not None
    assert run.ttft_s < 0.5
    assert bench.candidates[0].backend.log.count("prepare") == 3  # type: ignore[attr-defined]


class Teller(MockDraftVerify):
    """Knows text only, and reports why it stopped."""

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.requests.append(request)
        yield Step((UNKNOWN_ID,), 0, 0, 0, 0.0)
        yield Step((UNKNOWN_ID, UNKNOWN_ID), 0, 0, 0, 0.0)

    def account(self) -> EngineReport:
        return EngineReport("an answer", "eos", 21, DraftCounts(2, None, 1))


def test_what_an_engine_reports_of_an_answer_is_kept_and_is_the_next_turns_context(tmp_path: Path) -> None:
    bench = Bench(tmp_path, teller := Teller())
    run = bench.run()[0]
    assert (run.text, run.num_prompt_tokens, run.finish_reason) == ("an answer", 21, "eos")
    assert (run.num_new_tokens, run.output_ids) == (3, [])
    assert run.drafts is not None
    assert (run.drafts.rounds, run.drafts.judged, run.drafts.accepted) == (2, None, 1)
    assert teller.requests[1].messages[1] == {"role": "assistant", "content": "an answer"}


class Unlucky(MockDraftVerify):
    """Its first answer breaks off, which is not a bug."""

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        self.requests.append(request)
        yield Step((1,), 0, 0, 0, 1.0)
        if len(self.requests) == 1:
            raise PromptFailedError("the server died")
        yield Step((2, 3, 4), 0, 0, 0, 1.0)


def test_an_answer_that_breaks_off_is_a_failed_prompt_without_a_number_or_a_traceback(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Unlucky())
    runs = {run.key: run for run in bench.run()}
    failed = runs["a", 0, 0]
    assert (failed.error, failed.ttft_s, failed.num_new_tokens) == ("the server died", None, 0)
    assert bench.watcher.traces == ["the server died"]
    assert runs["b", 0, 0].finish_reason == "length"


PATIENCE_S = 2
"""How long a request that is alone waits for another user to ask."""


class Watched(MockDraftVerify):
    """Takes three requests at once; `least` are, for each request that was measured, the fewest at any of its steps.
    A request that is alone waits for `patience_s`, once at the end of each block, when no other comes."""

    concurrency = 3

    def __init__(self, fails: bool = False, patience_s: float = 0.0) -> None:
        super().__init__()
        self.fails = fails
        self.patience_s = patience_s
        self.failures = 0
        self.at_once = 0
        self.least: list[int] = []
        self._local = threading.local()
        self._lock = threading.Lock()

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        with self._lock:
            self.at_once += 1
        try:
            self._local.least = 3
            for step in super().generate(request):
                time.sleep(0.01)
                self._wait_for_company()
                self._local.least = min(self._local.least, self.at_once)
                yield step
            if self.fails and threading.current_thread().name.endswith("_0"):
                self.failures += 1
                raise PromptFailedError("the server died")
        finally:
            with self._lock:
                self.at_once -= 1

    def _wait_for_company(self) -> None:
        """Gives a user whom the system delays the time to ask; a load that is not kept up never comes."""
        end = time.monotonic() + self.patience_s
        while self.at_once < 2 and time.monotonic() < end:
            time.sleep(0.005)

    def account(self) -> EngineReport:
        self.least.append(self._local.least)
        return EngineReport(finish="length")


SINGLE = tuple(Prompt(f"p{i}", "maths", ("one",)) for i in range(12))


@pytest.mark.parametrize("num_prompts", [2, 7])
def test_every_measured_request_meets_the_whole_load(tmp_path: Path, num_prompts: int) -> None:
    wide = Watched(patience_s=PATIENCE_S)
    bench = Bench(tmp_path, wide, prompts=SINGLE[:num_prompts], warmup=2, max_new_tokens=5)
    assert len(bench.run()) == num_prompts
    # Users have to ask the next time; until they do, one less is under way.
    assert len(wide.least) == num_prompts
    assert min(wide.least) >= 2
    assert len(wide.requests) >= num_prompts + 2 * 3


def test_wide_backends_take_turns_block_by_block(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Watched(), Watched(), prompts=SINGLE)
    bench.run()
    labels = [label for label, _ in bench.watcher.seen]
    assert labels == ["first"] * 6 + ["second"] * 12 + ["first"] * 6
    assert [len(list(journal.runs())) for journal in bench.journals] == [12, 12]


def test_the_first_wide_backend_answers_before_others_go_on_from_its_answers(tmp_path: Path) -> None:
    prompts = tuple(Prompt(f"p{i}", "maths", ("one", "two")) for i in range(12))
    bench = Bench(tmp_path, Watched(), Watched(), prompts=prompts)
    bench.run()
    labels = [label for label, _ in bench.watcher.seen]
    assert labels == (["first"] * 12 + ["second"] * 12) * 2


def test_unrecorded_requests_that_fail_end_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, wide := Watched(fails=True), prompts=SINGLE[:4], warmup=2)
    runs = bench.run()
    assert wide.failures >= 1  # in the first user's warm-up
    assert sorted(run.prompt_id for run in runs) == ["p0", "p1", "p2", "p3"]
    assert {run.error for run in runs} <= {None, "the server died"}


@pytest.mark.parametrize(("num", "width", "sizes"), [(3, 4, [3]), (12, 3, [6, 6]), (34, 4, [8, 9, 9, 8])])
def test_blocks_hold_twice_as_many_conversations_as_there_are_users(num: int, width: int, sizes: list[int]) -> None:
    prompts = tuple(Prompt(f"p{i}", "maths", ("one",)) for i in range(num))
    blocks = workload(prompts=prompts).blocks(width)
    assert [len(block) for block in blocks] == sizes
    assert [prompt for block in blocks for prompt in block] == list(prompts)
