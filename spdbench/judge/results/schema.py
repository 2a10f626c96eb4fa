"""The result file: one label of one run, as integers and timestamps from which everything printed is computed.

Schema `spdbench.result/1`. A reader accepts every older version; a writer writes the newest. Field names and units are
the file's contract. This module must not know how results are measured or shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from operator import le
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from spdbench.errors import InputError, first_problem, short_repr
from spdbench.input_files import BOM, parse_json, read_input
from spdbench.judge.results.kept import DraftColumns, RunDivergence, SpanColumns
from spdbench.judge.results.lanes import BubbleParts, CyclesByFill, FullCycles, PartTimes
from spdbench.judge.results.machine_load import MachineLoad, Seconds, SetAside
from spdbench.types import BackendKind, FinishReason, MeasurementKind

SCHEMA = "spdbench.result/1"
SCHEMA_FILE = Path(__file__).parents[1] / "result.schema.json"
UNKNOWN = "unknown"
"""What a result says of a model's weights and dtype where only a server has them."""
INT32, INT64 = 2**31 - 1, 2**63 - 1
MAX_CHUNK = 2**20
TIME_TOLERANCE = 1e-3
"""Of totals against their columns: in seconds, and as a share; other tools write few digits."""
MAX_FORWARDS = 1e10
MAX_DEPTH = 2**16
"""Far above any real draft, and low enough that counting by position stays cheap whatever a damaged file says."""

# Bounds keep a damaged file from overflowing the arrays that its numbers go into.
Count = Annotated[int, Field(ge=0, le=INT32)]
Large = Annotated[int, Field(ge=0, le=INT64)]
TokenId = Annotated[int, Field(ge=-INT64, le=INT64)]
Chunk = Annotated[int, Field(ge=0, le=MAX_CHUNK)]
Depth = Annotated[int, Field(ge=0, le=MAX_DEPTH)]
Forwards = Annotated[float, Field(ge=0, le=MAX_FORWARDS, allow_inf_nan=False)]

RunKey = tuple[str, int, int]
"""Prompt id, turn, repeat."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteInfo(Record):
    name: str
    version: int
    sha256: str
    source: str
    num_prompts: int = Field(description="conversations asked for, after --limit")
    score: str | dict[str, str] | None = Field(None, description="the judge of answers, or judges by category; or null")


class DecodingInfo(Record):
    max_new_tokens: int = Field(ge=1)
    temperature: float | None = Field(
        ge=0, allow_inf_nan=False, description="null where an export of another load generator does not say it"
    )
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)
    seed: int
    eos_ids: list[int]


class BackendRecord(Record):
    name: str
    label: str
    kind: BackendKind
    options: dict[str, Any]
    devices: list[str]
    num_devices: int = Field(ge=1, le=INT32)
    lossy: bool
    lanes: int = Field(ge=1, le=INT32)
    lane_bytes: list[Large] = Field(description="the target's bytes that each lane reads for one token, head included")
    stage_layers: list[Count]
    chosen: dict[str, str] = Field(
        default_factory=dict, description="what the backend decided for itself where the options left it open"
    )
    kernels: str | None = Field(None, description="what computes the target's layers; null where that is not reported")
    unknown: list[MeasurementKind] = Field(
        default_factory=list, description="what the backend cannot know of its steps; metrics made of it are null"
    )
    other_model: str | None = Field(
        None, description="what it runs where that is not the model as vanilla runs it; outputs are not compared then"
    )

    @property
    def num_stages(self) -> int:
        """The lanes that hold layers: all but one on which a drafter runs with a part of the output head."""
        return sum(map(bool, self.stage_layers)) or self.lanes


class ModelInfo(Record):
    id: str
    sha256: str
    dtype: str
    num_layers: int | None = Field(description="null, as the next two, of a model that only its server knows")
    num_parameters: int | None
    bytes: int | None
    template_sha256: str | None
    template_args: dict[str, Any] = Field(
        default_factory=dict, description="what --template-arg gave the chat template"
    )
    chat_template: str | None = Field(None, description="what --chat-template named; null for the model's own")
    tokenizer_sha256: str | None = Field(None, description="of the tokenizer's files; null in files of older versions")


def served_model(name: str, template_args: Mapping[str, Any] | None = None) -> ModelInfo:
    """The record of a model that only a server has: nothing but its name there is known."""
    return ModelInfo(
        id=name,
        sha256=f"{UNKNOWN}, served as {name}",
        dtype=UNKNOWN,
        num_layers=None,
        num_parameters=None,
        bytes=None,
        template_sha256=None,
        template_args=dict(template_args or {}),
    )


class DrafterRecord(Record):
    id: str
    sha256: str | None
    method: str
    trained_tokens: int | None
    synthetic: bool


class Steps(Record):
    """Columns of equal length, one entry a step; the first step is prefill. `t_ns` counts from the request's start.

    Time never runs backwards, and at every step accepted <= judged <= drafted.
    """

    t_ns: list[Large]
    emitted: list[Chunk]
    drafted: list[Depth]
    judged: list[Depth]
    accepted: list[Depth]
    forwards: list[Forwards]

    @model_validator(mode="after")
    def _columns_fit_together(self) -> Steps:
        num_steps, times = len(self.t_ns), self.t_ns
        for column in (self.emitted, self.drafted, self.judged, self.accepted, self.forwards):
            if len(column) != num_steps:
                lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
                raise ValueError(f"columns of different length: {lengths}")
        if not all(map(le, times, times[1:])):
            at = next(index for index, pair in enumerate(pairwise(times)) if not le(*pair))
            raise ValueError(f"t_ns.{at + 1}: {times[at + 1]} comes before the {times[at]} of the step before")
        for fewer, more in (("accepted", "judged"), ("judged", "drafted")):
            low, high = getattr(self, fewer), getattr(self, more)
            if not all(map(le, low, high)):
                at = next(index for index, pair in enumerate(zip(low, high, strict=True)) if not le(*pair))
                raise ValueError(f"{fewer}.{at}: {low[at]} is more than {more}, which is {high[at]}")
        return self


class Drafts(Record):
    """What an engine counted of its drafts over one request, prefill omitted."""

    rounds: Count = Field(description="verify steps")
    judged: Count | None = Field(description="drafts that got a verdict; null where it is not reported")
    accepted: Count
    drafted: Count | None = Field(None, description="all drafted tokens; null where it is not reported")
    rounds_accepting: list[Count] | None = Field(None, description="verify steps that accepted 0, 1, 2, ... drafts")
    judged_at: list[Count] | None = Field(None, description="drafts that got a verdict at depth 1, 2, ...")
    source: str = Field("", description="where the counts come from: the response itself, or the server's counters")

    @model_validator(mode="after")
    def _agree(self) -> Drafts:
        judged, accepting = self.judged_at, self.rounds_accepting
        accepted = self.accepted if accepting is None else sum(n * rounds for n, rounds in enumerate(accepting))
        if accepted != self.accepted or (judged is not None and sum(judged) != self.judged):
            raise ValueError("rounds_accepting or judged_at: not as many drafts as in total")
        return self


class Run(Record):
    """One request: a turn of a prompt, in one repeat."""

    prompt_id: str
    category: str
    turn: Count
    repeat: Count
    prompt_sha256: str = Field(description="sha256 of the ids fed in, as decimal numbers joined by commas")
    num_prompt_tokens: Count
    num_new_tokens: Count
    finish_reason: FinishReason
    error: str | None = None
    transient: bool = Field(False, description="failed for a reason that may pass; `run --resume` asks again")
    output_ids: list[TokenId]
    ttft_s: Seconds | None
    decode_s: Seconds | None
    steps: Steps
    score: Annotated[float, Field(ge=-1e10, le=1e10, allow_inf_nan=False)] | None = None
    bubble: BubbleParts | None = None
    full_cycles: FullCycles | None = None
    cycles_by_fill: CyclesByFill | None = Field(None, description="null where not measured, and in older files")
    parts: PartTimes | None = Field(None, description="null without spans, and in files of older versions")
    peak_memory_bytes: Large | None = None
    energy_j: Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)] | None = None
    text: str | None = Field(None, description="the answer as an engine reported it; null where the ids say it")
    drafts: Drafts | None = Field(None, description="null unless the engine counts them and the steps cannot tell")
    num_cached_tokens: Count | None = Field(None, description="of the prompt, from a server's cache")
    engine_decode_s: Seconds | None = Field(None, description="decode time by a server's own clock")
    contradiction: str | None = Field(None, description="which counts of a server contradict each other")
    machine: MachineLoad | None = Field(None, description="what else the machine did; null where it was not watched")
    set_aside: list[SetAside] = Field(default_factory=list, description="disturbed measurements that do not count")
    spans: SpanColumns | None = Field(None, description="what the lanes did; null without `run --trace`")
    drafted_tokens: DraftColumns | None = Field(None, description="by step; null without `run --keep-drafts`")

    @property
    def key(self) -> RunKey:
        return self.prompt_id, self.turn, self.repeat


class Divergence(Record):
    """How many runs equal vanilla's, and what the first difference was in the others."""

    identical: Count
    ties: Count
    near_ties: Count
    real: Count
    unclassified: Count
    first: list[RunDivergence] = Field(default_factory=list, description="of each run that differs; [] in older files")

    @property
    def counts(self) -> dict[str, int]:
        """Runs by class."""
        return self.model_dump(exclude={"first"})


class Flag(Record):
    name: str
    reason: str
    remedy: str


class Summary(Record):
    """Metrics by name. `NAME` is micro, `NAME_macro` the mean over runs, `NAME_ci` its 95 % interval."""

    overall: dict[str, Any]
    by_category: dict[str, dict[str, Any]]


def times_agree(stated_s: float | None, counted_ns: int) -> bool:
    """True unless a total of seconds is another than its columns say, up to what rounding makes of it."""
    return stated_s is None or abs(stated_s - counted_ns / 1e9) <= TIME_TOLERANCE * (1 + counted_ns / 1e9)


def require_totals(run: Run) -> None:
    """Raises `ValueError` where a run's tokens are not as many as its columns count, or its times not theirs."""
    emitted = sum(run.steps.emitted)
    if run.num_new_tokens != emitted:
        raise ValueError(f"num_new_tokens: {run.num_new_tokens}, and its steps emit {emitted}")
    if run.output_ids and len(run.output_ids) != emitted:
        raise ValueError(f"output_ids: {len(run.output_ids)} ids, and its steps emit {emitted} tokens")
    if run.finish_reason == "error" or not emitted:
        return
    counted = [at for at, count in zip(run.steps.t_ns, run.steps.emitted, strict=True) if count]
    for name, stated_s, counted_ns in (
        ("ttft_s", run.ttft_s, counted[0]),
        ("decode_s", run.decode_s, counted[-1] - counted[0]),
    ):
        if not times_agree(stated_s, counted_ns):
            raise ValueError(f"{name}: {stated_s:g}, and its steps say {counted_ns / 1e9:g}")


def _one_run_a_key(runs: list[Run]) -> list[Run]:
    places: dict[RunKey, int] = {}
    for place, run in enumerate(runs):
        try:
            require_totals(run)
        except ValueError as error:
            raise ValueError(f"entry {place}: {error}") from None
        if run.key in places:
            prompt, turn, repeat = run.key
            raise ValueError(
                f"entries {places[run.key]} and {place} are both prompt '{prompt}', turn {turn}, repeat {repeat}"
            )
        places[run.key] = place
    return runs


class Result(Record):
    schema_: Literal["spdbench.result/1"] = Field(alias="schema")
    created: str
    run_key: str
    spdbench: dict[str, str | None]
    suite: SuiteInfo
    decoding: DecodingInfo
    backend: BackendRecord
    model: ModelInfo
    drafter: DrafterRecord | None
    environment: dict[str, Any]
    baseline: str | None = Field(None, description="label of the run's first -b; null in files of older versions")
    labels: list[str] = Field(
        default_factory=list, description="of the run, in the order of its -b; none in files of older versions"
    )
    runs: Annotated[list[Run], AfterValidator(_one_run_a_key)]
    divergence: Divergence | None
    summary: Summary
    flags: list[Flag]


def read_result(path: Path, raw: bytes | None = None) -> Result:
    """The result in `path`, or in `raw` where its content is in memory already.

    Raises:
        InputError: the file is not there, is not JSON, or is not a result that this version reads.
    """
    raw = (read_input(path) if raw is None else raw).removeprefix(BOM)
    try:
        found = Result.model_validate_json(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_why(raw, error)}") from None
    try:
        parse_json(raw)  # a repeated key would hide a part of the file
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _why(raw: bytes, error: ValidationError) -> str:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return "is not JSON (an interrupted run leaves a .journal.jsonl; `spdbench run --resume` finishes it)"
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if not isinstance(schema, str) or not schema.startswith("spdbench.result/"):
        return "is not a spdbench result: no 'schema: spdbench.result/N' in it"
    if schema != SCHEMA:
        return f"has schema {schema[:60]}, {_age(schema)}; this one reads {SCHEMA}"
    loc, reason = first_problem(error)
    if not loc:  # nested more deeply than our reader goes
        return f"cannot be read ({reason})"
    return f"{'.'.join(loc)}: {reason}{_value(error.errors()[0]['input'])}"


def _age(schema: str) -> str:
    """How another schema than ours came about: only a higher number is a newer one."""
    numbers = [re.fullmatch(r"spdbench\.result/([1-9][0-9]{0,8})", text) for text in (schema, SCHEMA)]
    found, ours = (int(match[1]) if match else 0 for match in numbers)
    return "written by a newer spdbench" if found > ours else "which no spdbench writes"


def _value(value: object) -> str:
    """`, not VALUE` for a single value; nothing for a part of the file that is too large to show."""
    return f", not {short_repr(value)}" if isinstance(value, str | int | float) else ""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result file; `result.schema.json` holds it for tools that are not Python."""
    schema = Result.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}
