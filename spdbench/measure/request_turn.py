"""What backends are asked, and one request to one backend, from the attempt to the record of a run."""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from spdbench.backend import Backend
from spdbench.errors import InputError, PromptFailedError, SpdbenchError, TryAgainError
from spdbench.judge.metrics.bubble import cycles_by_fill, full_cycles, lane_time, part_times, read_spans
from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.machine_load import MachineLoad
from spdbench.judge.results.schema import DecodingInfo, Drafts, Run, RunKey, Steps
from spdbench.measure.clock import Measurement, measure
from spdbench.measure.energy import EnergyMeter
from spdbench.measure.machine_watch import MachineWatch
from spdbench.measure.privacy import without_secrets
from spdbench.types import (
    UNKNOWN_ID,
    Chat,
    EngineReport,
    GenerationRequest,
    Message,
    Prompt,
    Sampling,
    request_seed,
)

MAX_BLOCKS = 4
NO_STEPS = Steps(t_ns=[], emitted=[], drafted=[], judged=[], accepted=[], forwards=[])


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

    def blocks(self, width: int) -> list[Sequence[Prompt]]:
        """The prompts in order, in blocks of about the same size: at most `MAX_BLOCKS`, each with at least twice as
        many conversations as there are users (`width`), since the start and the end of a block cost time."""
        number = max(1, min(MAX_BLOCKS, len(self.prompts) // (2 * width)))
        ends = [round(len(self.prompts) * part / number) for part in range(number + 1)]
        return [self.prompts[start:end] for start, end in pairwise(ends)]

    def request(
        self, chat: Chat, prompt: Prompt, turn: int, repeat: int, messages: Sequence[Message]
    ) -> tuple[GenerationRequest, str | None]:
        """The request, and why it cannot be made, if so."""
        ids, obstacle = tuple[int, ...](), None
        try:
            ids = chat.encode(messages)
        except InputError as error:
            obstacle = str(error)
        if len(ids) >= self.context_limit:
            obstacle = "the conversation no longer fits into the model's context"
        request = GenerationRequest(
            prompt_ids=ids,
            messages=tuple(messages),
            max_new_tokens=min(self.max_new_tokens, self.context_limit - len(ids)),
            sampling=self.sampling,
            seed=request_seed(self.seed, prompt.id, turn, repeat),
            eos_ids=self.eos_ids,
            keep_drafts=self.keep_drafts,
        )
        return request, obstacle


@dataclass(frozen=True)
class RequestTurn:
    """One turn of a conversation as a request that every backend gets; `obstacle` says why it cannot be made at all,
    which may pass if it `is_transient`. `keep_spans` keeps the spans in the run and not only what is computed from
    them."""

    prompt: Prompt
    turn: int
    repeat: int
    request: GenerationRequest
    obstacle: str | None
    keep_spans: bool = False
    is_transient: bool = False

    @property
    def key(self) -> RunKey:
        return self.prompt.id, self.turn, self.repeat


class StoppedError(Exception):
    """The run ends, so this request was given up without a measurement."""


@dataclass(frozen=True)
class Gauges:
    """What is read before and after each request of a backend; without a watch, nothing of the machine is known."""

    meter: EnergyMeter = field(default_factory=EnergyMeter)
    watch: MachineWatch | None = None


class Measured(NamedTuple):
    """A measurement of one request, its energy in joules, and what else the machine did."""

    request: Measurement
    energy_j: float | None
    load: MachineLoad | None


def attempt(backend: Backend, gauges: Gauges, turn: RequestTurn, stopped: threading.Event) -> tuple[Run, str]:
    """The run, and the traceback if the backend crashed: a bug, and a failed prompt instead of a number.

    Raises:
        SpdbenchError: what ends the whole run.
        StoppedError: `stopped` was set while the backend had to wait.
    """
    if turn.obstacle is not None:
        return failed_run(turn, turn.obstacle, is_transient=turn.is_transient), ""
    try:
        measured, energy_j, load = measure_when_ready(backend, gauges, turn.request, stopped)
        figures = lane_figures(backend, measured, keep_spans=turn.keep_spans)
    except PromptFailedError as error:
        return failed_run(turn, str(error), is_transient=error.is_transient), without_secrets(str(error))
    except SpdbenchError:
        raise
    except Exception as error:
        return failed_run(turn, f"{type(error).__name__}: {error}"), without_secrets(traceback.format_exc())
    run = {
        "num_new_tokens": len(measured.output_ids),
        "finish_reason": measured.finish_reason,
        "output_ids": [] if UNKNOWN_ID in measured.output_ids else list(measured.output_ids),
        "ttft_s": measured.ttft_s,
        "decode_s": measured.decode_s,
        "steps": measured.steps,
        "energy_j": energy_j,
        "machine": load,
        "drafted_tokens": DraftColumns.of(measured.drafts) if turn.request.keep_drafts else None,
        **figures,
        **_reported_fields(measured.report),
    }
    return _run_without_output(turn).model_copy(update=run), ""


def measure_when_ready(
    backend: Backend, gauges: Gauges, request: GenerationRequest, stopped: threading.Event
) -> Measured:
    """The measurement of `request`. Each `TryAgainError` starts it anew, on a new clock."""
    meter, watch = gauges.meter, gauges.watch
    while True:
        try:
            backend.prepare(request)
            state = watch.read() if watch else {}
            before = meter.read()
            measured = measure(backend, request)
            energy_j = meter.joules(before, meter.read())
            return Measured(measured, energy_j, watch.load(state, watch.read()) if watch else None)
        except TryAgainError as later:
            if stopped.wait(later.wait_s):
                raise StoppedError from None


def lane_figures(backend: Backend, measured: Measurement, *, keep_spans: bool = False) -> dict[str, Any]:
    """The fields of a run that come from the spans of the request just measured; none where there are no spans.
    `keep_spans`: the spans are one of them, if only as empty columns.

    Raises:
        ValueError: spans that cannot exist, such as two at once on one lane: the backend has a bug.
    """
    spans = backend.spans()
    step_ends = _decode_step_ends(measured)
    found: dict[str, Any] = {"spans": SpanColumns.of(spans, measured.start_ns)} if keep_spans else {}
    if not len(spans) or step_ends[0] == step_ends[-1]:
        return found
    info = backend.describe()
    table = read_spans(spans, info.lanes)
    found["bubble"] = lane_time(table, step_ends).shares()
    if len(info.stage_layers) == info.lanes:
        found["parts"] = part_times(table, step_ends, info.stage_layers)
    if backend.kind == "pipeline":
        found["full_cycles"] = full_cycles(table, step_ends)
        found["cycles_by_fill"] = cycles_by_fill(table, step_ends, sum(map(bool, info.stage_layers)) or info.lanes)
    return found


def _decode_step_ends(measured: Measurement) -> list[int]:
    """Ends in ns of the steps from the one with the first token to the one with the last, on the spans' clock."""
    counted = np.flatnonzero(measured.steps.emitted)
    ends = measured.steps.t_ns[counted[0] : counted[-1] + 1]
    return [measured.start_ns + at for at in ends]


def _reported_fields(report: EngineReport) -> dict[str, object]:
    """The fields of a run that the engine itself reported."""
    fields: dict[str, object] = {"text": report.text}
    if report.drafts is not None:
        fields["drafts"] = Drafts(**asdict(report.drafts))
    if report.num_prompt_tokens is not None:
        fields["num_prompt_tokens"] = report.num_prompt_tokens
    fields |= {"num_cached_tokens": report.num_cached_tokens, "engine_decode_s": report.decode_s}
    fields["contradiction"] = report.contradiction
    return fields


def failed_run(turn: RequestTurn, reason: str, *, is_transient: bool = False) -> Run:
    failure = {"error": without_secrets(reason), "transient": is_transient}
    return _run_without_output(turn).model_copy(update=failure)


def prompt_sha256(ids: Sequence[int]) -> str:
    """The hash by which results know a prompt."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def _run_without_output(turn: RequestTurn) -> Run:
    ids = turn.request.prompt_ids
    return Run(
        prompt_id=turn.prompt.id,
        category=turn.prompt.category,
        turn=turn.turn,
        repeat=turn.repeat,
        prompt_sha256=prompt_sha256(ids),
        num_prompt_tokens=len(ids),
        num_new_tokens=0,
        finish_reason="error",
        output_ids=[],
        ttft_s=None,
        decode_s=None,
        steps=NO_STEPS,
    )
