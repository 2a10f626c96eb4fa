"""Measures several backends on the same prompts, interleaved, one request at a time.

Order: conversation, turn, repeat, backend; the backends in alternating order (A B, B A, ...) so that drift affects all
alike. The first backend's answers are the context for all, so that every backend gets the same prompts in every turn.
A backend that takes several requests at once works alone and under constant load: as many users as it takes, each of
whom asks again as soon as its answer is there (a closed loop). Before the first measured request and after the last
one, users ask what is not recorded, so that every measured request meets the whole load. Several such backends take
turns, one block of conversations at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Protocol

from spdbench.backend import Backend, concurrency_of
from spdbench.errors import BackendLostError, PromptFailedError, SpdbenchError, TryAgainError
from spdbench.judge.results.machine_load import SetAside
from spdbench.judge.results.schema import Run
from spdbench.measure.clock import peak_memory_bytes
from spdbench.measure.journal import Journal
from spdbench.measure.request_turn import (
    Gauges,
    RequestTurn,
    StoppedError,
    Workload,
    attempt,
    failed_run,
    measure_when_ready,
    prompt_sha256,
)
from spdbench.types import Chat, FirstDivergence, Prompt

WARMUP_TOKENS = 8
RETRY_S = 0.2
"""How long a user whose unrecorded request failed waits before the next one."""


class Observer(Protocol):
    """Hears of every request that ends; must be quick."""

    def finished(self, label: str, run: Run) -> None: ...
    def crashed(self, label: str, run: Run, trace: str) -> None: ...


Score = Callable[[Prompt, int, str], float | None]
"""(prompt, turn, answer) -> score of the answer; None where it cannot be scored."""


@dataclass(frozen=True)
class Candidate:
    """A loaded backend with its journal and what is read around its requests. The first of a run is the baseline."""

    label: str
    backend: Backend
    journal: Journal
    gauges: Gauges = field(default_factory=Gauges)


Compare = Callable[[Candidate, RequestTurn, Run, Run], FirstDivergence | None]
"""(candidate, request, vanilla's run, the candidate's run) -> where their outputs differ first."""


def is_comparable(candidate: Candidate) -> bool:
    """True if the backend's greedy ids should be vanilla's."""
    info, backend = candidate.backend.describe(), candidate.backend
    own = info.other_model is None and info.knows_ids
    return own and backend.lossless and concurrency_of(backend) == 1


class Runner:
    """Runs a workload to its end; what the journals already hold is not run again."""

    def __init__(
        self,
        workload: Workload,
        candidates: Sequence[Candidate],
        chat: Chat,
        compare: Compare,
        observer: Observer,
        score: Score | None = None,
        comparable: Callable[[Candidate], bool] = is_comparable,
    ) -> None:
        """`compare` gets the greedy outputs of all `comparable` candidates."""
        self.workload = workload
        self.candidates = tuple(candidates)
        self._chat = chat
        self._compare = compare
        self._observer = observer
        in_turns = (c for c in candidates if concurrency_of(c.backend) == 1)
        self._reference = next((c for c in in_turns if c.backend.kind == "autoregressive"), None)
        self._first = self.candidates[0].backend.describe()
        self._score = score
        has_answer = self._reference is not None and workload.sampling.greedy
        self._compared = [c for c in candidates if has_answer and c is not self._reference and comparable(c)]
        self._lock = threading.Lock()  # around journals, observer and tokenizer, none of which is thread-safe
        self._stopped = threading.Event()

    def run(self) -> None:
        """Measures all that is missing.

        A backend's crash only fails its prompt. After a `BackendLostError` the prompt has failed, and the run ends.

        Raises:
            SpdbenchError: what ends the whole run.
            InputError: a journal that is resumed holds a run of another prompt.
        """
        self._check_resumed()
        everything = self.workload.keys()
        if any(everything - candidate.journal.offsets.keys() for candidate in self.candidates):
            self._warm_up()
        for group in _groups(self.candidates):
            if (width := concurrency_of(group[0].backend)) > 1:
                self._run_under_load(group, width)
            else:
                self._run_in_turns(group)

    def _check_resumed(self) -> None:
        """Raises `InputError` for a run of another prompt in a journal that is resumed. Tokenizes nothing: first turns
        are known, and in later ones all backends have the same prompt."""
        first, repeats = self.workload.first_prompts, range(self.workload.repeats)
        known = {(prompt, 0, repeat): sha256 for prompt, sha256 in first.items() for repeat in repeats}
        for candidate in self.candidates:
            for key, sha256 in candidate.journal.resumed_prompts.items():
                candidate.journal.require_prompt(key, known.setdefault(key, sha256))

    def _run_in_turns(self, candidates: Sequence[Candidate]) -> None:
        """All of `candidates`, one request at a time."""
        number = 0
        for prompt in self.workload.prompts:
            if not self._is_complete(prompt, candidates):
                self._run_conversation(prompt, number, candidates)
            number += len(self.workload.keys_of(prompt))

    def _run_under_load(self, candidates: Sequence[Candidate], width: int) -> None:
        """All of `candidates`, which take `width` requests at once, block by block in alternating order. Where later
        turns follow on answers of the first of them, that one always comes first."""
        has_turns = any(len(prompt.turns) > 1 for prompt in self.workload.prompts)
        gives_context = has_turns and candidates[0] is self.candidates[0]
        for number, block in enumerate(self.workload.blocks(width)):
            for candidate in candidates if gives_context or number % 2 == 0 else candidates[::-1]:
                todo = [prompt for prompt in block if not self._is_complete(prompt, [candidate])]
                if not todo:
                    continue
                try:
                    self._run_in_parallel(candidate, todo, width)
                except BackendLostError:  # the run ends with what it has
                    self._score_all(candidates)
                    raise
        self._score_all(candidates)

    def _run_in_parallel(self, candidate: Candidate, prompts: Sequence[Prompt], width: int) -> None:
        """One candidate, with `width` users who answer `prompts` between them."""
        todo, done, lock = deque(prompts), threading.Event(), threading.Lock()
        open_conversations = len(prompts)
        others = cycle(reversed(self.workload.prompts))

        def ask_more() -> None:
            with lock:
                prompt = next(others)
            self._ask_unrecorded(candidate, prompt, done)

        def user() -> None:
            nonlocal open_conversations
            for _ in range(self.workload.warmup):
                ask_more()
            while not done.is_set():
                with lock:
                    prompt = todo.popleft() if todo else None
                if prompt is None:
                    ask_more()
                    continue
                self._run_conversation(prompt, 0, [candidate])
                with lock:
                    open_conversations -= 1
                    if not open_conversations:
                        done.set()

        with ThreadPoolExecutor(width, thread_name_prefix=candidate.label) as pool:
            users = [pool.submit(user) for _ in range(width)]
            try:
                wait(users, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                done.set()
                if any(not one.done() for one in users):  # interrupted, or one raised: end the others' waits
                    self._stopped.set()
                    candidate.backend.close()
        errors = [one.exception() for one in users if not one.cancelled()]
        if error := next((error for error in errors if error and not isinstance(error, StoppedError)), None):
            raise error

    def _ask_unrecorded(self, candidate: Candidate, prompt: Prompt, done: threading.Event) -> None:
        """One request that keeps the load up and leaves no trace; given up when `done` is set. It never raises: what is
        wrong here meets a recorded request as well."""
        wait_s = RETRY_S
        try:
            with self._lock:
                messages = prompt.first_messages
                request, obstacle = self.workload.request(self._chat, prompt, 0, 0, messages)
            if obstacle is None:
                candidate.backend.prepare(request)
                for _ in candidate.backend.generate(request):
                    if done.is_set():
                        break
                return
        except TryAgainError as later:
            wait_s = later.wait_s
        except Exception:
            pass
        done.wait(wait_s)

    def _is_complete(self, prompt: Prompt, candidates: Sequence[Candidate]) -> bool:
        """True if a conversation has nothing left to do, so that it need not even be tokenized again."""
        keys = self.workload.keys_of(prompt)
        return all(key in candidate.journal for candidate in candidates for key in keys) and all(
            key in candidate.journal.outcomes for candidate in self._compared for key in keys
        )

    def _run_conversation(self, prompt: Prompt, first: int, candidates: Sequence[Candidate]) -> None:
        """All turns of one conversation on `candidates`; its first request is number `first` of the run."""
        for number, turn in enumerate(self.turns(prompt), start=first):
            order = candidates if number % 2 == 0 else candidates[::-1]
            for candidate in order:
                if turn.key not in candidate.journal:
                    self._run_request(candidate, turn)
                else:
                    candidate.journal.require_prompt(turn.key, prompt_sha256(turn.request.prompt_ids))
            if concurrency_of(candidates[0].backend) == 1:
                self._compare_outputs(turn)

    def turns(self, prompt: Prompt) -> Iterator[RequestTurn]:
        """A conversation's requests; a turn's first answer has to be in the first journal before the next turn."""
        messages = list(prompt.context)
        obstacle: str | None = None
        is_transient = False
        workload = self.workload
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            for repeat in range(workload.repeats):
                with self._lock:
                    request, new_obstacle = workload.request(self._chat, prompt, turn, repeat, messages)
                obstacle = obstacle or new_obstacle
                yield RequestTurn(prompt, turn, repeat, request, obstacle, workload.keep_spans, is_transient)
            if turn + 1 < len(prompt.turns):
                with self._lock:
                    answered = self.candidates[0].journal.run((prompt.id, turn, 0))
                if answered.finish_reason == "error":
                    is_transient = answered.transient and (obstacle is None or is_transient)
                    obstacle = obstacle or f"{self.candidates[0].label} failed in turn {turn}: nothing to go on from"
                messages.append({"role": "assistant", "content": self._answer(answered)})

    def _answer(self, run: Run) -> str:
        """The text of a run's answer."""
        if run.text is not None:
            return run.text
        with self._lock:
            return self._chat.decode(run.output_ids)

    def _warm_up(self) -> None:
        """Runs the first request that can be made unrecorded. One that fails here fails again when it is measured, and
        is recorded then."""
        asked = (
            self.workload.request(self._chat, prompt, 0, 0, prompt.first_messages) for prompt in self.workload.prompts
        )
        for request in islice((request for request, obstacle in asked if obstacle is None), 1):
            request = replace(request, max_new_tokens=min(WARMUP_TOKENS, request.max_new_tokens))
            for _ in range(self.workload.warmup):
                for candidate in self.candidates:
                    if concurrency_of(candidate.backend) > 1:  # its users warm it up
                        continue
                    try:
                        measure_when_ready(candidate.backend, candidate.gauges, request, self._stopped)
                    except Exception as error:
                        if isinstance(error, SpdbenchError) and not isinstance(error, PromptFailedError):
                            raise

    def _run_request(self, candidate: Candidate, turn: RequestTurn) -> None:
        """Measures one request, scores it unless others are measured at the time, and adds it to the candidate's
        journal."""
        lost: BackendLostError | None = None
        try:
            run, trace = self._least_disturbed(candidate, turn)
        except BackendLostError as error:
            reason, _, _ = str(error).partition("\n")
            lost, run, trace = error, failed_run(turn, reason, is_transient=error.is_transient), ""
        if self._stopped.is_set():  # it failed because the run ends, so it has not been measured
            raise StoppedError
        # Backends that share this process have no memory of their own, and that of a server is unknown.
        if len(self.candidates) == 1 and (devices := self._first.known_devices) is not None:
            run = run.model_copy(update={"peak_memory_bytes": peak_memory_bytes(devices)})
        if concurrency_of(candidate.backend) == 1:  # else a user that waits for the score would lighten the load
            run = self._scored(run, turn.prompt)
        with self._lock:
            candidate.journal.append(run)
            self._observer.finished(candidate.label, run)
            if trace:
                self._observer.crashed(candidate.label, run, trace)
        if lost is not None:
            raise lost

    def _scored(self, run: Run, prompt: Prompt) -> Run:
        if self._score is None or run.finish_reason == "error":
            return run
        return run.model_copy(update={"score": self._score(prompt, run.turn, self._answer(run))})

    def _score_all(self, candidates: Sequence[Candidate]) -> None:
        """Scores what was measured under load, also by an earlier process, and adds these runs once more."""
        if self._score is None:
            return
        prompts = {prompt.id: prompt for prompt in self.workload.prompts}
        for candidate in candidates:
            for key in list(candidate.journal.offsets):
                run = candidate.journal.run(key)
                if run.score is None and (scored := self._scored(run, prompts[run.prompt_id])).score is not None:
                    candidate.journal.append(scored)

    def _least_disturbed(self, candidate: Candidate, turn: RequestTurn) -> tuple[Run, str]:
        """The run of one request, and its traceback if it crashed. What the machine disturbed is measured again, up to
        `remeasure` times; then the run counts from which the machine took least, however fast it was."""
        journal = candidate.journal
        runs, trace = journal.taken_aside(turn.key), ""
        while not runs or (_is_disturbed(runs[-1]) and len(runs) <= self.workload.remeasure):
            run, trace = attempt(candidate.backend, candidate.gauges, turn, self._stopped)
            if self._stopped.is_set() or run.machine is None:  # a failure has no load, and is never measured away
                return run, trace
            runs.append(run)
            if self.workload.remeasure and _is_disturbed(run):
                journal.set_aside(run)
        best = min(runs, key=_taken)
        others = [
            SetAside(ttft_s=run.ttft_s, decode_s=run.decode_s, machine=run.machine)
            for run in runs
            if run is not best and run.machine
        ]
        return best.model_copy(update={"set_aside": others}), trace

    def _compare_outputs(self, turn: RequestTurn) -> None:
        """Records how each lossless backend's greedy output differs from vanilla's, if it does. Untimed."""
        for candidate in self._compared:
            if self._reference is None or turn.key in candidate.journal.outcomes:
                continue
            expected, found = self._reference.journal.run(turn.key), candidate.journal.run(turn.key)
            if "error" in (expected.finish_reason, found.finish_reason):
                continue
            candidate.journal.add_comparison(turn.key, self._compare(candidate, turn, expected, found))


def _is_disturbed(run: Run) -> bool:
    """True if the machine took too much time from a request to ignore."""
    return run.machine is not None and run.machine.disturbed


def _taken(run: Run) -> float:
    return run.machine.taken if run.machine else 0.0


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that take turns, by how many requests they take at once. The first candidate's group comes first,
    since its answers are the context of all others."""
    widths = [concurrency_of(candidate.backend) for candidate in candidates]
    return [
        [candidate for candidate, its in zip(candidates, widths, strict=True) if its == width]
        for width in dict.fromkeys(widths)
    ]
