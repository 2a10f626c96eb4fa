"""Measures several backends on the same prompts, interleaved, one request at a time.

Order: conversation, turn, repeat, backend; the backends in alternating order (A B, B A, ...) so that drift hits all
alike. The first backend's answers are everyone's context, so that all face the same prompts in every turn. Must not
know of models, tables, progress bars or the command line.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from spdbench.backend import Backend
from spdbench.errors import BackendLostError, SpdbenchError
from spdbench.judge.result import Run, Steps
from spdbench.measure.clock import measure, peak_memory_bytes
from spdbench.measure.energy import EnergyMeter
from spdbench.measure.journal import Journal, Outcome, RunKey
from spdbench.measure.lanes import lane_figures
from spdbench.measure.privacy import without_secrets
from spdbench.types import GenerationRequest, Message, Prompt, Sampling

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
class Contestant:
    """A loaded backend with its journal and its energy meter. The first of a run is the baseline."""

    label: str
    backend: Backend
    journal: Journal
    meter: EnergyMeter = field(default_factory=EnergyMeter)


@dataclass(frozen=True)
class _Ask:
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
        contestants: Sequence[Contestant],
        chat: Chat,
        classify: Classify,
        observer: Observer,
        score: Score | None = None,
    ) -> None:
        self._workload = workload
        self._contestants = tuple(contestants)
        self._chat = chat
        self._classify = classify
        self._observer = observer
        self._score = score
        self._reference = next((c for c in contestants if c.backend.kind == "autoregressive"), None)
        self._first_devices = self._contestants[0].backend.describe().devices
        comparable = self._reference is not None and workload.sampling.greedy
        self._compared = [c for c in contestants if comparable and c is not self._reference and c.backend.lossless]

    def run(self) -> None:
        """Raises `SpdbenchError` for what ends the whole run; a backend's crash only fails its prompt, unless it leaves
        nothing to go on with (`BackendLostError`): then the prompt has failed, and the run ends."""
        everything = self._workload.keys()
        if any(everything - contestant.journal.offsets.keys() for contestant in self._contestants):
            self._warm_up()
        number = 0
        for prompt in self._workload.prompts:
            keys = [(prompt.id, turn, repeat) for turn in range(len(prompt.turns)) for repeat in self._repeats]
            if not self._is_behind_us(keys):
                self._converse(prompt, number)
            number += len(keys)

    @property
    def _repeats(self) -> range:
        return range(self._workload.repeats)

    def _is_behind_us(self, keys: Sequence[RunKey]) -> bool:
        """True if a conversation has nothing left to do, so that it need not even be put into tokens again."""
        return all(key in contestant.journal for contestant in self._contestants for key in keys) and all(
            key in contestant.journal.outcomes for contestant in self._compared for key in keys
        )

    def _converse(self, prompt: Prompt, first: int) -> None:
        """Asks everybody all of one conversation, which begins with the run's request number `first`."""
        for number, ask in enumerate(self._asks(prompt), start=first):
            order = self._contestants if number % 2 == 0 else self._contestants[::-1]
            for contestant in order:
                if ask.key not in contestant.journal:
                    self._finish(contestant, ask)
            self._compare_outputs(ask)

    def _asks(self, prompt: Prompt) -> Iterator[_Ask]:
        messages: list[Message] = []
        obstacle: str | None = None
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            for repeat in self._repeats:
                request = self._request(prompt, turn, repeat, messages)
                if request.max_new_tokens < 1:
                    obstacle = obstacle or "the conversation no longer fits into the model's context"
                yield _Ask(prompt, turn, repeat, request, obstacle)
            if turn + 1 < len(prompt.turns):
                answered = self._contestants[0].journal.run((prompt.id, turn, 0))
                if answered.finish_reason == "error":
                    obstacle = obstacle or f"{self._contestants[0].label} failed in turn {turn}: nothing to go on from"
                answer = self._chat.decode(answered.output_ids)
                messages.append({"role": "assistant", "content": answer})

    def _request(self, prompt: Prompt, turn: int, repeat: int, messages: Sequence[Message]) -> GenerationRequest:
        workload = self._workload
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
                for contestant in self._contestants:
                    try:
                        contestant.backend.prepare(request)
                        measure(contestant.backend, request)
                    except SpdbenchError:
                        raise
                    except Exception:  # it will fail again on its first prompt, and be recorded there
                        continue

    def _finish(self, contestant: Contestant, ask: _Ask) -> None:
        lost: BackendLostError | None = None
        try:
            run, trace = _attempt(contestant, ask)
        except BackendLostError as error:
            lost, run, trace = error, _failed(ask, str(error).partition("\n")[0]), ""
        if len(self._contestants) == 1:  # backends that share a process have no memory of their own
            run = run.model_copy(update={"peak_memory_bytes": peak_memory_bytes(self._first_devices)})
        if self._score is not None and run.finish_reason != "error":
            answer = self._chat.decode(run.output_ids)
            run = run.model_copy(update={"score": self._score(ask.prompt, ask.turn, answer)})
        contestant.journal.append(run)
        self._observer.finished(contestant.label, run)
        if trace:
            self._observer.crashed(contestant.label, run, trace)
        if lost is not None:
            raise lost

    def _compare_outputs(self, ask: _Ask) -> None:
        """Notes how each lossless backend's greedy output differs from vanilla's, if it does. Untimed."""
        for contestant in self._compared:
            if self._reference is None or ask.key in contestant.journal.outcomes:
                continue
            expected, found = self._reference.journal.run(ask.key), contestant.journal.run(ask.key)
            if "error" in (expected.finish_reason, found.finish_reason):
                continue
            outcome: Outcome = "identical"
            if expected.output_ids != found.output_ids:
                width = max(1, round(max(found.steps.forwards[1:], default=1)))
                outcome = self._classify(ask.request.prompt_ids, expected.output_ids, found.output_ids, width)
            contestant.journal.add_outcome(ask.key, outcome)


def _attempt(contestant: Contestant, ask: _Ask) -> tuple[Run, str]:
    """The run, and the traceback if the backend crashed: a bug, and a failed prompt instead of a number."""
    if ask.obstacle is not None:
        return _failed(ask, ask.obstacle), ""
    try:
        backend, meter = contestant.backend, contestant.meter
        backend.prepare(ask.request)
        before = meter.read()
        measured = measure(backend, ask.request)
        energy_j = meter.joules(before, meter.read())
        figures = lane_figures(backend, measured)
    except SpdbenchError:
        raise
    except Exception as error:
        return _failed(ask, f"{type(error).__name__}: {error}"), traceback.format_exc()
    run = _run(ask).model_copy(
        update={
            "num_new_tokens": len(measured.output_ids),
            "finish_reason": measured.finish_reason,
            "output_ids": list(measured.output_ids),
            "ttft_s": measured.ttft_s,
            "decode_s": measured.decode_s,
            "steps": measured.steps,
            "energy_j": energy_j,
            **figures,
        }
    )
    return run, ""


def _failed(ask: _Ask, reason: str) -> Run:
    return _run(ask).model_copy(update={"error": without_secrets(reason)})


def _run(ask: _Ask) -> Run:
    """The record of a request that gave nothing yet."""
    ids = ask.request.prompt_ids
    return Run(
        prompt_id=ask.prompt.id,
        category=ask.prompt.category,
        turn=ask.turn,
        repeat=ask.repeat,
        prompt_sha256=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
        num_prompt_tokens=len(ids),
        num_new_tokens=0,
        finish_reason="error",
        output_ids=[],
        ttft_s=None,
        decode_s=None,
        steps=NO_STEPS,
    )
