"""Measures several backends on the same prompts, interleaved, one request at a time.

Order: conversation, turn, repeat, backend; the backends in alternating order (A B, B A, ...) so that drift affects all
alike. The first backend's answers are the context for all, so that every backend gets the same prompts in every turn.
A backend that takes several requests at once has the run to itself while it works, with as many conversations in
parallel as it takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Protocol

from spdbench.backend import Backend, concurrency_of
from spdbench.errors import BackendLostError, InputError, PromptFailedError, SpdbenchError
from spdbench.judge.results.machine_load import SetAside
from spdbench.judge.results.schema import DecodingInfo, Run, RunKey
from spdbench.measure.clock import peak_memory_bytes
from spdbench.measure.journal import Journal
from spdbench.measure.request_turn import (
    Gauges,
    RequestTurn,
    StoppedError,
    attempt,
    failed_run,
    measure_when_ready,
    prompt_sha256,
)
from spdbench.types import FirstDivergence, GenerationRequest, Message, Prompt, Sampling, request_seed

WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """The requests that every backend gets: prompts, decoding, repeats. `context_limit` is the model's, in tokens.

    A request that the machine disturbed is measured up to `remeasure` more times. `keep_spans` and `keep_drafts` record
    what lanes did and which tokens were drafted. `first_prompts` holds hashes of first turns' prompts, as far as known.
    """

    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    repeats: int
    warmup: int
    context_limit: int
    remeasure: int = 0
    keep_spans: bool = False
    keep_drafts: bool = False
    first_prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def decoding(self) -> DecodingInfo:
        """The settings of decoding as results record them."""
        return DecodingInfo(
            max_new_tokens=self.max_new_tokens, seed=self.seed, eos_ids=sorted(self.eos_ids), **asdict(self.sampling)
        )

    def keys_of(self, prompt: Prompt) -> list[RunKey]:
        """Every request of one conversation, in order."""
        return [(prompt.id, turn, repeat) for turn in range(len(prompt.turns)) for repeat in range(self.repeats)]

    def keys(self) -> set[RunKey]:
        """Every request that each backend gets."""
        return {key for prompt in self.prompts for key in self.keys_of(prompt)}


class Chat(Protocol):
    """Messages to ids and back."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


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
        self._workload = workload
        self._candidates = tuple(candidates)
        self._chat = chat
        self._compare = compare
        self._observer = observer
        in_turns = (c for c in candidates if concurrency_of(c.backend) == 1)
        self._reference = next((c for c in in_turns if c.backend.kind == "autoregressive"), None)
        self._first = self._candidates[0].backend.describe()
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
        everything = self._workload.keys()
        if any(everything - candidate.journal.offsets.keys() for candidate in self._candidates):
            self._warm_up()
        for group in _groups(self._candidates):
            if (width := concurrency_of(group[0].backend)) > 1:
                self._run_in_parallel(group[0], width)
            else:
                self._run_in_turns(group)

    def _check_resumed(self) -> None:
        """Raises `InputError` for a run of another prompt in a journal that is resumed. Tokenizes nothing: first turns
        are known, and in later ones all backends have the same prompt."""
        first, repeats = self._workload.first_prompts, range(self._workload.repeats)
        known = {(prompt, 0, repeat): sha256 for prompt, sha256 in first.items() for repeat in repeats}
        for candidate in self._candidates:
            for key, sha256 in candidate.journal.resumed_prompts.items():
                candidate.journal.require_prompt(key, known.setdefault(key, sha256))

    def _run_in_turns(self, candidates: Sequence[Candidate]) -> None:
        """All of `candidates`, one request at a time."""
        number = 0
        for prompt in self._workload.prompts:
            if not self._is_complete(prompt, candidates):
                self._run_conversation(prompt, number, candidates)
            number += len(self._workload.keys_of(prompt))

    def _run_in_parallel(self, candidate: Candidate, width: int) -> None:
        """One candidate, with `width` conversations in parallel until they run out."""
        todo = [prompt for prompt in self._workload.prompts if not self._is_complete(prompt, [candidate])]
        with ThreadPoolExecutor(width, thread_name_prefix=candidate.label) as pool:
            conversations = [pool.submit(self._run_conversation, prompt, 0, [candidate]) for prompt in todo]
            try:
                wait(conversations, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if any(not one.done() for one in conversations):  # interrupted, or one raised: end the others' waits
                    self._stopped.set()
                    candidate.backend.close()
        errors = [one.exception() for one in conversations if not one.cancelled()]
        if error := next((error for error in errors if error and not isinstance(error, StoppedError)), None):
            raise error

    def _is_complete(self, prompt: Prompt, candidates: Sequence[Candidate]) -> bool:
        """True if a conversation has nothing left to do, so that it need not even be tokenized again."""
        keys = self._workload.keys_of(prompt)
        return all(key in candidate.journal for candidate in candidates for key in keys) and all(
            key in candidate.journal.outcomes for candidate in self._compared for key in keys
        )

    def _run_conversation(self, prompt: Prompt, first: int, candidates: Sequence[Candidate]) -> None:
        """All turns of one conversation on `candidates`; its first request is number `first` of the run."""
        for number, turn in enumerate(self._turns(prompt), start=first):
            order = candidates if number % 2 == 0 else candidates[::-1]
            for candidate in order:
                if turn.key not in candidate.journal:
                    self._run_request(candidate, turn)
                else:
                    candidate.journal.require_prompt(turn.key, prompt_sha256(turn.request.prompt_ids))
            if concurrency_of(candidates[0].backend) == 1:
                self._compare_outputs(turn)

    def _turns(self, prompt: Prompt) -> Iterator[RequestTurn]:
        """The conversation's requests; a turn's first answer has to be in the first journal before the next turn."""
        messages: list[Message] = []
        obstacle: str | None = None
        workload = self._workload
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            for repeat in range(workload.repeats):
                request, new_obstacle = self._request(prompt, turn, repeat, messages)
                obstacle = obstacle or new_obstacle
                yield RequestTurn(prompt, turn, repeat, request, obstacle, workload.keep_spans)
            if turn + 1 < len(prompt.turns):
                with self._lock:
                    answered = self._candidates[0].journal.run((prompt.id, turn, 0))
                if answered.finish_reason == "error":
                    obstacle = obstacle or f"{self._candidates[0].label} failed in turn {turn}: nothing to go on from"
                messages.append({"role": "assistant", "content": self._answer(answered)})

    def _answer(self, run: Run) -> str:
        """The text of a run's answer."""
        if run.text is not None:
            return run.text
        with self._lock:
            return self._chat.decode(run.output_ids)

    def _request(
        self, prompt: Prompt, turn: int, repeat: int, messages: Sequence[Message]
    ) -> tuple[GenerationRequest, str | None]:
        """The request, and why it cannot be made, if so."""
        workload, ids, obstacle = self._workload, tuple[int, ...](), None
        try:
            with self._lock:
                ids = self._chat.encode(messages)
        except InputError as error:
            obstacle = str(error)
        if len(ids) >= workload.context_limit:
            obstacle = "the conversation no longer fits into the model's context"
        request = GenerationRequest(
            prompt_ids=ids,
            messages=tuple(messages),
            max_new_tokens=min(workload.max_new_tokens, workload.context_limit - len(ids)),
            sampling=workload.sampling,
            seed=request_seed(workload.seed, prompt.id, turn, repeat),
            eos_ids=workload.eos_ids,
            keep_drafts=workload.keep_drafts,
        )
        return request, obstacle

    def _warm_up(self) -> None:
        """Runs the first request that can be made unrecorded. One that fails here fails again when it is measured, and
        is recorded then."""
        asked = (
            self._request(prompt, 0, 0, [{"role": "user", "content": prompt.turns[0]}])
            for prompt in self._workload.prompts
        )
        for request in islice((request for request, obstacle in asked if obstacle is None), 1):
            request = replace(request, max_new_tokens=min(WARMUP_TOKENS, request.max_new_tokens))
            for _ in range(self._workload.warmup):
                for candidate in self._candidates:
                    try:
                        measure_when_ready(candidate.backend, candidate.gauges, request, self._stopped)
                    except Exception as error:
                        if isinstance(error, SpdbenchError) and not isinstance(error, PromptFailedError):
                            raise

    def _run_request(self, candidate: Candidate, turn: RequestTurn) -> None:
        """Measures and scores one request, and adds it to the candidate's journal."""
        lost: BackendLostError | None = None
        try:
            run, trace = self._least_disturbed(candidate, turn)
        except BackendLostError as error:
            lost, run, trace = error, failed_run(turn, str(error).partition("\n")[0]), ""
        if self._stopped.is_set():  # it failed because the run ends, so it has not been measured
            raise StoppedError
        # Backends that share this process have no memory of their own, and that of a server is unknown.
        if len(self._candidates) == 1 and (devices := self._first.known_devices) is not None:
            run = run.model_copy(update={"peak_memory_bytes": peak_memory_bytes(devices)})
        if self._score is not None and run.finish_reason != "error":
            run = run.model_copy(update={"score": self._score(turn.prompt, turn.turn, self._answer(run))})
        with self._lock:
            candidate.journal.append(run)
            self._observer.finished(candidate.label, run)
            if trace:
                self._observer.crashed(candidate.label, run, trace)
        if lost is not None:
            raise lost

    def _least_disturbed(self, candidate: Candidate, turn: RequestTurn) -> tuple[Run, str]:
        """The run of one request, and its traceback if it crashed. What the machine disturbed is measured again, up to
        `remeasure` times; then the run counts from which the machine took least, however fast it was."""
        journal = candidate.journal
        runs, trace = journal.taken_aside(turn.key), ""
        while not runs or (_is_disturbed(runs[-1]) and len(runs) <= self._workload.remeasure):
            run, trace = attempt(candidate.backend, candidate.gauges, turn, self._stopped)
            if self._stopped.is_set() or run.machine is None:  # a failure has no load, and is never measured away
                return run, trace
            runs.append(run)
            if self._workload.remeasure and _is_disturbed(run):
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
    """Candidates that run interleaved, in order: all that take one request at a time, and each of the others alone.

    The first candidate's group comes first, since its answers are the context of all others.
    """
    alone = [[candidate] for candidate in candidates if concurrency_of(candidate.backend) > 1]
    in_turns = [candidate for candidate in candidates if concurrency_of(candidate.backend) == 1]
    groups = [*alone, in_turns] if alone and alone[0][0] is candidates[0] else [in_turns, *alone]
    return [group for group in groups if group]
