"""Measures several backends on the same prompts, interleaved, one request at a time.

Order: conversation, turn, repeat, backend; the backends in alternating order (A B, B A, ...) so that drift hits all
alike. The first backend's answers are everyone's context, so that all face the same prompts in every turn. A backend
that takes several requests at once has the run to itself for as long as it works, with so many conversations going on.
Must not know of models, tables, progress bars or the command line.
"""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from spdbench.backend import Backend, concurrency_of
from spdbench.errors import BackendLostError, PromptFailedError, SpdbenchError, TryAgainError
from spdbench.judge.results.schema import Drafts, Run, Steps
from spdbench.measure.clock import Measurement, measure, peak_memory_bytes
from spdbench.measure.energy import EnergyMeter
from spdbench.measure.journal import Journal, Outcome, RunKey
from spdbench.measure.lanes import lane_figures
from spdbench.measure.privacy import without_secrets
from spdbench.types import UNKNOWN_ID, EngineReport, GenerationRequest, Message, Prompt, Sampling

WARMUP_TOKENS = 8
NO_STEPS = Steps(t_ns=[], emitted=[], drafted=[], judged=[], accepted=[], forwards=[])


@dataclass(frozen=True)
class Workload:
    """What every backend is asked: prompts, how to decode them, how often. `context_limit` is the model's."""

    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    eos_ids: frozenset[int]
    repeats: int
    warmup: int
    context_limit: int

    def keys(self) -> set[RunKey]:
        """Every request that each backend is asked."""
        turns = ((prompt.id, turn) for prompt in self.prompts for turn in range(len(prompt.turns)))
        return {(name, turn, repeat) for name, turn in turns for repeat in range(self.repeats)}


class Chat(Protocol):
    """Messages to ids and back."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Observer(Protocol):
    """Told of everything that finishes; must be quick."""

    def finished(self, label: str, run: Run) -> None: ...
    def crashed(self, label: str, run: Run, trace: str) -> None: ...


Classify = Callable[[Sequence[int], Sequence[int], Sequence[int], int], Outcome]
"""(prompt ids, vanilla's output, the other output, the other's widest forward in tokens) -> what the difference is."""

Score = Callable[[Prompt, int, str], float | None]
"""(prompt, turn, answer) -> what the answer is worth; None where nobody can tell."""


@dataclass(frozen=True)
class Candidate:
    """A loaded backend with its journal and its energy meter. The first of a run is the baseline."""

    label: str
    backend: Backend
    journal: Journal
    meter: EnergyMeter = field(default_factory=EnergyMeter)


@dataclass(frozen=True)
class RequestTurn:
    """One request as asked of every backend; `obstacle` says why it cannot be asked at all."""

    prompt: Prompt
    turn: int
    repeat: int
    request: GenerationRequest
    obstacle: str | None

    @property
    def key(self) -> RunKey:
        return self.prompt.id, self.turn, self.repeat


class Runner:
    """Runs a workload to its end; what the journals already hold is not run again."""

    def __init__(
        self,
        workload: Workload,
        candidates: Sequence[Candidate],
        chat: Chat,
        classify: Classify,
        observer: Observer,
        score: Score | None = None,
    ) -> None:
        self._workload = workload
        self._candidates = tuple(candidates)
        self._chat = chat
        self._classify = classify
        self._observer = observer
        in_turns = (c for c in candidates if concurrency_of(c.backend) == 1)
        self._reference = next((c for c in in_turns if c.backend.kind == "autoregressive"), None)
        self._first = self._candidates[0].backend.describe()
        self._score = score
        comparable = self._reference is not None and workload.sampling.greedy
        self._compared = [c for c in candidates if comparable and c is not self._reference and _is_comparable(c)]
        self._writing = threading.Lock()  # for journals, observer and tokenizer, which know nothing of threads
        self._stopped = threading.Event()

    def run(self) -> None:
        """Raises `SpdbenchError` for what ends the whole run; a backend's crash only fails its prompt, unless it leaves
        nothing to go on with (`BackendLostError`): then the prompt has failed, and the run ends."""
        everything = self._workload.keys()
        if any(everything - candidate.journal.offsets.keys() for candidate in self._candidates):
            self._warm_up()
        for group in _groups(self._candidates):
            if (width := concurrency_of(group[0].backend)) > 1:
                self._run_wide(group[0], width)
            else:
                self._run_in_turns(group)

    def _run_in_turns(self, candidates: Sequence[Candidate]) -> None:
        """All of `candidates`, one request at a time."""
        number = 0
        for prompt in self._workload.prompts:
            keys = self._keys(prompt)
            if not self._is_behind_us(keys, candidates):
                self._converse(prompt, number, candidates)
            number += len(keys)

    def _run_wide(self, candidate: Candidate, width: int) -> None:
        """One candidate, with `width` conversations going on at any time until they run out."""
        todo = [prompt for prompt in self._workload.prompts if not self._is_behind_us(self._keys(prompt), [candidate])]
        with ThreadPoolExecutor(width, thread_name_prefix=candidate.label) as pool:
            asked = [pool.submit(self._converse, prompt, 0, [candidate]) for prompt in todo]
            try:
                wait(asked, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if any(not one.done() for one in asked):  # interrupted, or one failed for good: end the others' waits
                    self._stopped.set()
                    candidate.backend.close()
        errors = [one.exception() for one in asked if not one.cancelled()]
        if error := next((error for error in errors if error and not isinstance(error, _StoppedError)), None):
            raise error

    def _keys(self, prompt: Prompt) -> list[RunKey]:
        return [(prompt.id, turn, repeat) for turn in range(len(prompt.turns)) for repeat in self._repeats]

    @property
    def _repeats(self) -> range:
        return range(self._workload.repeats)

    def _is_behind_us(self, keys: Sequence[RunKey], candidates: Sequence[Candidate]) -> bool:
        """True if a conversation has nothing left to do, so that it need not even be put into tokens again."""
        return all(key in candidate.journal for candidate in candidates for key in keys) and all(
            key in candidate.journal.outcomes for candidate in self._compared for key in keys
        )

    def _converse(self, prompt: Prompt, first: int, candidates: Sequence[Candidate]) -> None:
        """Asks `candidates` all of one conversation, which begins with the run's request number `first`."""
        for number, turn in enumerate(self._turns(prompt), start=first):
            order = candidates if number % 2 == 0 else candidates[::-1]
            for candidate in order:
                if turn.key not in candidate.journal:
                    self._finish(candidate, turn)
            if concurrency_of(candidates[0].backend) == 1:
                self._compare_outputs(turn)

    def _turns(self, prompt: Prompt) -> Iterator[RequestTurn]:
        messages: list[Message] = []
        obstacle: str | None = None
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            for repeat in self._repeats:
                request = self._request(prompt, turn, repeat, messages)
                if request.max_new_tokens < 1:
                    obstacle = obstacle or "the conversation no longer fits into the model's context"
                yield RequestTurn(prompt, turn, repeat, request, obstacle)
            if turn + 1 < len(prompt.turns):
                with self._writing:
                    answered = self._candidates[0].journal.run((prompt.id, turn, 0))
                if answered.finish_reason == "error":
                    obstacle = obstacle or f"{self._candidates[0].label} failed in turn {turn}: nothing to go on from"
                messages.append({"role": "assistant", "content": self._answer(answered)})

    def _answer(self, run: Run) -> str:
        """What was answered, as text."""
        if run.text is not None:
            return run.text
        with self._writing:
            return self._chat.decode(run.output_ids)

    def _request(self, prompt: Prompt, turn: int, repeat: int, messages: Sequence[Message]) -> GenerationRequest:
        workload = self._workload
        with self._writing:  # tokenizers do not like to be asked from several threads at once
            ids = self._chat.encode(messages)
        seed = hashlib.sha256(f"{workload.seed}/{prompt.id}/{turn}/{repeat}".encode()).digest()
        return GenerationRequest(
            prompt_ids=ids,
            messages=tuple(messages),
            max_new_tokens=min(workload.max_new_tokens, workload.context_limit - len(ids)),
            sampling=workload.sampling,
            seed=int.from_bytes(seed[:6], "little"),
            eos_ids=workload.eos_ids,
        )

    def _warm_up(self) -> None:
        for prompt in self._workload.prompts[:1]:
            messages = [{"role": "user", "content": prompt.turns[0]}]
            request = self._request(prompt, 0, 0, messages)
            request = replace(request, max_new_tokens=min(WARMUP_TOKENS, request.max_new_tokens))
            for _ in range(self._workload.warmup):
                for candidate in self._candidates:
                    try:
                        _measure(candidate, request, self._stopped)
                    except PromptFailedError:  # the same holds of this
                        continue
                    except SpdbenchError:
                        raise
                    except Exception:  # it will fail again on its first prompt, and be recorded there
                        continue

    def _finish(self, candidate: Candidate, turn: RequestTurn) -> None:
        lost: BackendLostError | None = None
        try:
            run, trace = _attempt(candidate, turn, self._stopped)
        except BackendLostError as error:
            lost, run, trace = error, _failed(turn, str(error).partition("\n")[0]), ""
        if self._stopped.is_set():  # it failed because it was to stop, and has not been measured
            raise _StoppedError
        # Backends that share a process have no memory of their own, and of a server's nobody knows.
        if len(self._candidates) == 1 and "devices" not in self._first.unknown:
            run = run.model_copy(update={"peak_memory_bytes": peak_memory_bytes(self._first.devices)})
        if self._score is not None and run.finish_reason != "error":
            run = run.model_copy(update={"score": self._score(turn.prompt, turn.turn, self._answer(run))})
        with self._writing:
            candidate.journal.append(run)
            self._observer.finished(candidate.label, run)
            if trace:
                self._observer.crashed(candidate.label, run, trace)
        if lost is not None:
            raise lost

    def _compare_outputs(self, turn: RequestTurn) -> None:
        """Notes how each lossless backend's greedy output differs from vanilla's, if it does. Untimed."""
        for candidate in self._compared:
            if self._reference is None or turn.key in candidate.journal.outcomes:
                continue
            expected, found = self._reference.journal.run(turn.key), candidate.journal.run(turn.key)
            if "error" in (expected.finish_reason, found.finish_reason):
                continue
            outcome: Outcome = "identical"
            if expected.output_ids != found.output_ids:
                width = max(1, round(max(found.steps.forwards[1:], default=1)))
                outcome = self._classify(turn.request.prompt_ids, expected.output_ids, found.output_ids, width)
            candidate.journal.add_outcome(turn.key, outcome)


class _StoppedError(Exception):
    """A conversation was given up since the run ends."""


def _attempt(candidate: Candidate, turn: RequestTurn, stopped: threading.Event) -> tuple[Run, str]:
    """The run, and the traceback if the backend crashed: a bug, and a failed prompt instead of a number."""
    if turn.obstacle is not None:
        return _failed(turn, turn.obstacle), ""
    try:
        measured, energy_j = _measure(candidate, turn.request, stopped)
        figures = lane_figures(candidate.backend, measured)
    except PromptFailedError as error:
        return _failed(turn, str(error)), without_secrets(str(error))
    except SpdbenchError:
        raise
    except Exception as error:
        return _failed(turn, f"{type(error).__name__}: {error}"), without_secrets(traceback.format_exc())
    run = _run(turn).model_copy(
        update={
            "num_new_tokens": len(measured.output_ids),
            "finish_reason": measured.finish_reason,
            "output_ids": [] if UNKNOWN_ID in measured.output_ids else list(measured.output_ids),
            "ttft_s": measured.ttft_s,
            "decode_s": measured.decode_s,
            "steps": measured.steps,
            "energy_j": energy_j,
            **figures,
            **_told(measured.account),
        }
    )
    return run, ""


def _measure(
    candidate: Candidate, request: GenerationRequest, stopped: threading.Event
) -> tuple[Measurement, float | None]:
    """The request as measured, and its energy; made anew, on a new clock, for as long as the backend asks for it."""
    backend, meter = candidate.backend, candidate.meter
    while True:
        try:
            backend.prepare(request)
            before = meter.read()
            measured = measure(backend, request)
            return measured, meter.joules(before, meter.read())
        except TryAgainError as later:
            if stopped.wait(later.wait_s):
                raise _StoppedError from None


def _told(account: EngineReport) -> dict[str, object]:
    """What of a run an engine told itself."""
    told: dict[str, object] = {"text": account.text}
    if account.drafts is not None:
        told["drafts"] = Drafts(**asdict(account.drafts))
    if account.num_prompt_tokens is not None:
        told["num_prompt_tokens"] = account.num_prompt_tokens
    return told


def _is_comparable(candidate: Candidate) -> bool:
    """True if the backend's greedy ids should be vanilla's."""
    info, backend = candidate.backend.describe(), candidate.backend
    own = info.other_model is None and "ids" not in info.unknown
    return own and backend.lossless and concurrency_of(backend) == 1


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Who runs together, in order: those that take one request at a time, and each of the others by itself; the first
    candidate's group first, since everyone goes on from its answers."""
    alone = [[candidate] for candidate in candidates if concurrency_of(candidate.backend) > 1]
    in_turns = [candidate for candidate in candidates if concurrency_of(candidate.backend) == 1]
    groups = [*alone, in_turns] if alone and alone[0][0] is candidates[0] else [in_turns, *alone]
    return [group for group in groups if group]


def _failed(turn: RequestTurn, reason: str) -> Run:
    return _run(turn).model_copy(update={"error": without_secrets(reason)})


def _run(turn: RequestTurn) -> Run:
    """The record of a request that gave nothing yet."""
    ids = turn.request.prompt_ids
    return Run(
        prompt_id=turn.prompt.id,
        category=turn.prompt.category,
        turn=turn.turn,
        repeat=turn.repeat,
        prompt_sha256=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
        num_prompt_tokens=len(ids),
        num_new_tokens=0,
        finish_reason="error",
        output_ids=[],
        ttft_s=None,
        decode_s=None,
        steps=NO_STEPS,
    )
