"""The result file: one label of one run, as integers and timestamps from which everything printed is computed.

Schema `spdbench.result/1`. A reader accepts every older version; a writer writes the newest. Field names and units are
the file's contract. This module must not know how results are measured or shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spdbench.errors import InputError
from spdbench.types import BackendKind, FinishReason

SCHEMA = "spdbench.result/1"
SCHEMA_FILE = Path(__file__).with_name("result.schema.json")


Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteInfo(Record):
    name: str
    version: int
    sha256: str
    source: str
    num_prompts: int = Field(description="conversations asked for, after --limit")


class DecodingInfo(Record):
    max_new_tokens: int = Field(ge=1)
    temperature: float
    top_p: float
    top_k: int
    seed: int
    eos_ids: list[int]


class BackendRecord(Record):
    name: str
    label: str
    kind: BackendKind
    options: dict[str, Any]
    devices: list[str]
    num_devices: int = Field(ge=1)
    lossy: bool
    lanes: int = Field(ge=1)
    lane_bytes: list[int] = Field(description="the target's bytes that each lane reads for one token, head included")
    stage_layers: list[int]


class ModelInfo(Record):
    id: str
    sha256: str
    dtype: str
    num_layers: int
    num_parameters: int
    bytes: int
    template_sha256: str | None


class DrafterRecord(Record):
    id: str
    sha256: str | None
    method: str
    trained_tokens: int | None
    synthetic: bool


class Steps(Record):
    """Columns of equal length, one entry a step; the first step is prefill. `t_ns` counts from the request's start."""

    t_ns: list[Count]
    emitted: list[Count]
    drafted: list[Count]
    judged: list[Count]
    accepted: list[Count]
    forwards: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    @model_validator(mode="after")
    def _columns_are_equally_long(self) -> Steps:
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different length: {lengths}")
        return self


class BubbleParts(Record):
    """Shares of lanes x decode time; see METRICS: useful + wasted + the rest = 1."""

    useful: float
    wasted: float
    fill: float
    verify: float
    draft: float
    imbalance: float
    host: float
    unattributed: float


class Run(Record):
    """One request: a turn of a prompt, in one repeat."""

    prompt_id: str
    category: str
    turn: int
    repeat: int
    prompt_sha256: str = Field(description="sha256 of the ids fed in, as decimal numbers joined by commas")
    num_prompt_tokens: Count
    num_new_tokens: Count
    finish_reason: FinishReason
    error: str | None = None
    output_ids: list[int]
    ttft_s: Seconds | None
    decode_s: Seconds | None
    steps: Steps
    score: float | None = None
    bubble: BubbleParts | None = None
    peak_memory_bytes: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.prompt_id, self.turn, self.repeat


class Divergence(Record):
    """How many runs equal vanilla's, and what the first difference was in the others."""

    identical: int
    ties: int
    near_ties: int
    real: int
    unclassified: int


class Flag(Record):
    name: str
    reason: str
    remedy: str


class Summary(Record):
    """Metrics by name. `NAME` is micro, `NAME_macro` the mean over runs, `NAME_ci` its 95 % interval."""

    overall: dict[str, Any]
    by_category: dict[str, dict[str, Any]]


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
    runs: list[Run]
    divergence: Divergence | None
    summary: Summary
    flags: list[Flag]


def read_result(path: Path) -> Result:
    """The result in `path`.

    Raises:
        InputError: the file is not there, is not JSON, or is not a result that this version reads.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return Result.model_validate_json(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_why(raw, error)}") from None


def _why(raw: bytes, error: ValidationError) -> str:
    try:
        data = json.loads(raw)
    except ValueError:
        return "is not JSON (an interrupted run leaves a .journal.jsonl; `spdbench run --resume` finishes it)"
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if not isinstance(schema, str) or not schema.startswith("spdbench.result/"):
        return "is not a spdbench result: no 'schema: spdbench.result/N' in it"
    if schema != SCHEMA:
        return f"has schema {schema}, written by a newer spdbench; this one reads up to {SCHEMA}"
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result file; `result.schema.json` holds it for tools that are not Python."""
    schema = Result.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}
