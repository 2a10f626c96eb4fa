"""The runner: order, contexts, seeds, failures, resuming."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.judge.results.schema import Run, RunKey
from spdbench.measure.clock import peak_memory_bytes
from spdbench.measure.energy import Counter, EnergyMeter
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.request_turn import Gauges, Workload
from spdbench.measure.runner import Candidate, Runner
from spdbench.types import FirstDivergence, GenerationRequest, Message, Prompt, Sampling, Step
from tests.mock_backend import MockBackend, MockDraftVerify, MockPipeline, Watcher, WordChat, one_by_one

PROMPTS = (
    Prompt("a", "maths", ("one", "two")),
    Prompt("b", "code", ("three",)),
    Prompt("c", "maths", ("four",)),
)


def workload(**changes: Any) -> Workload:
    facts: dict[str, Any] = {
        "prompts": PROMPTS,
        "max_new_tokens": 4,
        "sampling": Sampling(),
        "seed": 0,
        "eos_ids": frozenset(),
        "repeats": 1,
        "warmup": 0,
        "context_limit": 100,
    }
    return Workload(**{**facts, **changes})


def never(_candidate: Any, _turn: Any, expected: Run, found: Run) -> None:
    assert expected.output_ids == found.output_ids, "nothing differs here"


def same_output(words: Sequence[Any]) -> bool:
    _, _, expected, found = words
    return bool(expected.output_ids == found.output_ids)


class Bench:
    """Two mock backends, `first` being the baseline, on journals in a folder."""

    def __init__(
        self,
        folder: Path,
        *backends: MockBackend,
        resume: bool = False,
        compare: Any = never,
        score: Any = None,
        **changes: Any,
    ) -> None:
        self.watcher = Watcher()
        self.journals: list[Journal] = []
        self.candidates: list[Candidate] = []
        folder.mkdir(exist_ok=True)
        for number, backend in enumerate(backends):
            path = folder / f"{number}.journal.jsonl"
            journal = resume_journal(path, {}) if resume else create_journal(path, "now", {})
            self.journals.append(journal)
            self.candidates.append(Candidate(["first", "second", "third"][number], backend, journal))
        self.runner = Runner(workload(**changes), self.candidates, WordChat(), compare, self.watcher, score)

    def run(self) -> list[Run]:
        self.runner.run()
        return [run for journal in self.journals for run in journal.runs()]

    def close(self) -> None:
        for journal in self.journals:
            journal.close()


def test_backends_take_turns_in_alternating_order(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend(), MockBackend())
    bench.run()
    labels = [label for label, _ in bench.watcher.seen]
    assert labels == ["first", "second", "second", "first", "first", "second", "second", "first"]
    keys = [key for _, key in bench.watcher.seen]
    assert keys[::2] == keys[1::2] == [("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("c", 0, 0)]


def test_the_first_backends_answers_are_everyones_context(tmp_path: Path) -> None:
    other = MockDraftVerify(lambda r: [Step((50 + i,), 0, 0, 0, 1.0) for i in range(r.max_new_tokens)])
    bench = Bench(tmp_path, MockBackend(), other, compare=lambda *_: FirstDivergence("real", 0, 1, 2))
    bench.run()
    second_turn = other.requests[1]
    assert [message["role"] for message in second_turn.messages] == ["user", "assistant", "user"]
    assert second_turn.messages[1]["content"] == "100 101 102 103"
    runs = {(run.prompt_id, run.turn): run.prompt_sha256 for run in bench.journals[0].runs()}
    assert {(run.prompt_id, run.turn): run.prompt_sha256 for run in bench.journals[1].runs()} == runs


def test_all_backends_get_the_same_request_with_a_seed_of_its_own(tmp_path: Path) -> None:
    first, second = MockBackend(), MockBackend()
    Bench(tmp_path, first, second, repeats=2).run()
    assert first.requests == second.requests
    assert len({request.seed for request in first.requests}) == len(first.requests) == 8
    other = MockBackend()
    Bench(tmp_path / "other", other, seed=1, repeats=2).run()
    assert {r.seed for r in other.requests}.isdisjoint(r.seed for r in first.requests)


def test_repeats_share_the_context_of_the_first(tmp_path: Path) -> None:
    count = iter(range(1000))
    drifting = MockBackend(lambda r: [Step((next(count),), 0, 0, 0, 1.0) for _ in range(r.max_new_tokens)])
    Bench(tmp_path, drifting, repeats=3).run()
    second_turns = [r.prompt_ids for r in drifting.requests[3:6]]
    assert second_turns[0] == second_turns[1] == second_turns[2]


def test_answers_are_scored_after_the_clock_has_stopped(tmp_path: Path) -> None:
    log: list[str] = []

    def score(prompt: Prompt, turn: int, answer: str) -> float | None:
        log.append(f"score {prompt.id}/{turn} {answer}")
        return None if turn else 0.5

    runs = Bench(tmp_path, MockBackend(log=log), score=score, prompts=PROMPTS[:1]).run()
    asked = ["prepare", "generate", "closed"]
    assert log == [*asked, "score a/0 100 101 102 103", *asked, "score a/1 100 101 102 103"]
    assert [run.score for run in runs] == [0.5, None]


def test_failed_answers_have_no_score(tmp_path: Path) -> None:
    runs = Bench(tmp_path, MockBackend(crash_on(5)), score=lambda *_: 1.0, prompts=PROMPTS[1:]).run()
    assert [(run.finish_reason, run.score) for run in runs] == [("error", None), ("length", 1.0)]


def test_warm_up_is_short_and_leaves_no_trace(tmp_path: Path) -> None:
    backend = MockBackend()
    runs = Bench(tmp_path, backend, warmup=2, max_new_tokens=20, prompts=PROMPTS[:1], context_limit=1000).run()
    assert [r.max_new_tokens for r in backend.requests] == [8, 8, 20, 20]
    assert len(runs) == 2


def test_preparing_comes_before_the_clock(tmp_path: Path) -> None:
    log: list[str] = []
    Bench(tmp_path, MockBackend(log=log), prompts=PROMPTS[1:2]).run()
    assert log == ["prepare", "generate", "closed"]


def crash_on(prompt_length: int) -> Any:
    def script(request: GenerationRequest) -> Sequence[Step]:
        if len(request.prompt_ids) == prompt_length:
            raise ZeroDivisionError("a bug")
        return one_by_one(request)

    return script


def test_a_crash_fails_its_prompt_and_no_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend(), MockPipeline(crash_on(5)))
    bench.run()
    failed = [run for run in bench.journals[1].runs() if run.finish_reason == "error"]
    assert [(run.prompt_id, run.error) for run in failed] == [("b", "ZeroDivisionError: a bug")]
    assert failed[0].output_ids == []
    assert failed[0].ttft_s is None
    assert "crash_on" in bench.watcher.traces[0] or "script" in bench.watcher.traces[0]
    assert len(bench.journals[1]) == 4


def test_a_conversation_cannot_go_on_from_a_failed_answer(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend(crash_on(3)), MockBackend())
    bench.run()
    errors = {run.key: run.error for run in bench.journals[1].runs() if run.error}
    assert errors == {("a", 1, 0): "first failed in turn 0: nothing to go on from"}


def test_an_unmendable_input_ends_the_run(tmp_path: Path) -> None:
    def refuse(request: GenerationRequest) -> Sequence[Step]:  # noqa: ARG001
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        Bench(tmp_path, MockBackend(refuse)).run()


def test_the_context_bounds_the_answer_and_then_the_conversation(tmp_path: Path) -> None:
    backend = MockBackend()
    bench = Bench(tmp_path, backend, context_limit=6, prompts=PROMPTS[:1])
    runs = bench.run()
    assert runs[0].num_new_tokens == 3
    assert runs[1].error == "the conversation no longer fits into the model's context"
    assert len(backend.requests) == 1


def test_what_the_journal_holds_is_not_run_again(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    seen: list[GenerationRequest] = []

    def dies_on_the_third(request: GenerationRequest) -> Sequence[Step]:
        seen.append(request)
        if len(seen) == 3:
            raise Killed
        return one_by_one(request)

    bench = Bench(tmp_path, MockBackend(dies_on_the_third), MockBackend())
    with pytest.raises(Killed):
        bench.runner.run()
    bench.close()
    again = (MockBackend(), MockBackend())
    bench = Bench(tmp_path, *again, resume=True)
    runs = bench.run()
    assert sorted(run.key for run in runs) == sorted(2 * [("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("c", 0, 0)])
    assert len(seen) - 1 + len(again[0].requests) == 4


def test_a_finished_run_needs_no_backend(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend())
    bench.run()
    bench.close()
    untouched = MockBackend()
    Bench(tmp_path, untouched, resume=True, warmup=3).run()
    assert untouched.log == []


def test_outcomes_that_a_kill_left_out_are_made_up_for(tmp_path: Path) -> None:
    backends = (MockBackend(), MockPipeline())
    bench = Bench(tmp_path, *backends)
    bench.run()
    bench.close()
    path = tmp_path / "1.journal.jsonl"
    path.write_bytes(b"".join(line for line in path.read_bytes().splitlines(True) if b"outcome" not in line))
    again = Bench(tmp_path, MockBackend(), MockPipeline(), resume=True)
    again.run()
    assert list(again.journals[1].outcomes.values()) == ["identical"] * 4


def test_outputs_are_compared_with_vanillas_and_classified_where_they_differ(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def compare(*words: Any) -> FirstDivergence | None:
        asked.append(words)
        return None if same_output(words) else FirstDivergence("near_tie", 0, 1, 2)

    def differs_once(request: GenerationRequest) -> Sequence[Step]:
        wrong = len(request.prompt_ids) == 5
        return [Step((100 + i + wrong * (i == 2),), 0, 0, 0, 2.6) for i in range(request.max_new_tokens)]

    bench = Bench(tmp_path, MockBackend(), MockDraftVerify(differs_once), compare=compare)
    bench.run()
    assert bench.journals[0].outcomes == {}
    assert sorted(bench.journals[1].outcomes.values()) == ["identical"] * 3 + ["near_tie"]
    ((_, turn, expected, found),) = [words for words in asked if not same_output(words)]
    assert (len(turn.request.prompt_ids), expected.output_ids[2], found.output_ids[2]) == (5, 102, 103)
    assert {candidate.label for candidate, *_ in asked} == {"second"}


@pytest.mark.parametrize("change", ["sampling", "lossy", "no vanilla"])
def test_outputs_that_may_differ_are_not_compared(tmp_path: Path, change: str) -> None:
    first, second = MockDraftVerify() if change == "no vanilla" else MockBackend(), MockDraftVerify()
    second.lossless = change != "lossy"
    sampling = Sampling(0.5) if change == "sampling" else Sampling()
    bench = Bench(tmp_path, first, second, sampling=sampling)
    bench.run()
    assert [journal.outcomes for journal in bench.journals] == [{}, {}]


def test_times_never_run_backwards(tmp_path: Path) -> None:
    for run in Bench(tmp_path, MockBackend()).run():
        assert all(a <= b for a, b in pairwise(run.steps.t_ns))


def test_memory_is_reported_only_of_a_backend_that_runs_alone(tmp_path: Path) -> None:
    alone = Bench(tmp_path, MockBackend()).run()
    assert all(10_000_000 < (run.peak_memory_bytes or 0) < 10**11 for run in alone)
    shared = Bench(tmp_path / "shared", MockBackend(), MockPipeline()).run()
    assert {run.peak_memory_bytes for run in shared} == {None}


def test_memory_of_gpus_that_workers_hold_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak_memory_bytes(["cuda:0"]) or 0) > 10_000_000
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [multiprocessing.current_process()])
    assert (peak_memory_bytes(["cpu"]) or 0) > 10_000_000
    assert peak_memory_bytes(["cpu", "cuda:0"]) is None


def ticking(log: list[str]) -> Counter:
    """A counter that moves by a joule at each reading, and logs the reading."""

    def read() -> int:
        log.append("read")
        return log.count("read") * 1_000_000

    return Counter("ticking", read)


def test_energy_is_read_before_and_after_a_request_and_never_within(tmp_path: Path) -> None:
    log: list[str] = []
    bench = Bench(tmp_path, MockBackend(log=log), prompts=PROMPTS[1:2])
    candidate = replace(bench.candidates[0], gauges=Gauges(EnergyMeter((ticking(log),))))
    Runner(workload(prompts=PROMPTS[1:2]), [candidate], WordChat(), never, bench.watcher).run()
    assert log == ["prepare", "read", "generate", "closed", "read"]
    assert [run.energy_j for run in bench.journals[0].runs()] == [1.0]


def test_without_a_counter_a_run_has_no_energy(tmp_path: Path) -> None:
    assert {run.energy_j for run in Bench(tmp_path, MockBackend()).run()} == {None}


def test_a_crash_shows_neither_home_nor_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/planted")
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")

    def crash(request: GenerationRequest) -> Sequence[Step]:  # noqa: ARG001
        raise OSError("cannot open /home/planted/model with hf_planted_token")

    bench = Bench(tmp_path, MockBackend(crash), prompts=PROMPTS[1:2])
    runs = bench.run()
    assert [run.error for run in runs] == ["OSError: cannot open ~/model with ***"]
    assert "planted" not in (tmp_path / "0.journal.jsonl").read_text()
    assert "OSError: cannot open ~/model with ***" in bench.watcher.traces[0]
    assert "planted" not in bench.watcher.traces[0]


def test_conversations_that_are_finished_are_not_put_into_tokens_again(tmp_path: Path) -> None:
    """A resumed run of ten thousand prompts would spend seconds on it."""
    bench = Bench(tmp_path, MockBackend(), MockDraftVerify())
    bench.run()
    bench.close()
    path = tmp_path / "1.journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-2]))  # without the last run and its outcome
    asked: list[str] = []

    class Listening(WordChat):
        def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
            asked.append(messages[0]["content"])
            return super().encode(messages)

    last = MockDraftVerify()
    again = Bench(tmp_path, MockBackend(), last, resume=True)
    Runner(workload(), again.candidates, Listening(), never, again.watcher).run()
    assert asked == ["one", "four"], "the first is warm-up's"
    assert [request.messages[0]["content"] for request in last.requests] == ["four"]


@pytest.mark.parametrize("key", [("a", 0, 0), ("a", 1, 0), ("b", 0, 0)], ids=["first turn", "later turn", "finished"])
def test_a_resumed_run_of_another_prompt_is_refused(tmp_path: Path, key: RunKey) -> None:
    bench = Bench(tmp_path, MockBackend(), MockPipeline())
    bench.run()
    bench.close()
    path = tmp_path / "1.journal.jsonl"
    content = path.read_bytes()
    own = bench.journals[1].identity
    with resume_journal(path, own) as journal:
        sha256 = journal.resumed_prompts[key].encode()
    lines = content.splitlines(True)
    path.write_bytes(b"".join(line.replace(sha256, b"0" * 64) for line in lines))
    again = Bench(tmp_path, MockBackend(), MockPipeline(), resume=True)
    with pytest.raises(InputError, match=rf"prompt {key[0]}, turn {key[1]}, repeat 0 was measured with other tokens"):
        again.run()


def test_a_lone_label_shows_another_prompt_by_the_hash_of_first_turns_and_on_the_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path, MockBackend())
    bench.run()
    bench.close()
    path = tmp_path / "0.journal.jsonl"
    whole = path.read_bytes().splitlines(True)
    with resume_journal(path, {}) as journal:
        hashes = journal.resumed_prompts
    changed = [line.replace(hashes["a", 0, 0].encode(), b"0" * 64) for line in whole]
    path.write_bytes(b"".join(changed))
    refused = Bench(tmp_path, MockBackend(), resume=True, first_prompts={"a": hashes["a", 0, 0]})
    with pytest.raises(InputError, match="prompt a, turn 0"):
        refused.run()
    refused.close()
    path.write_bytes(b"".join(changed[:2]))  # unknown before, and noticed before its second turn is measured
    refused = Bench(tmp_path, MockBackend(), resume=True)
    with pytest.raises(InputError, match="prompt a, turn 0"):
        refused.run()
