"""The file of `spdbench eval`: one label's scores on lm-eval's tasks, with every answer behind them.

Schema `spdbench.eval/1`. Times are not in it: a result says how fast a backend is, an evaluation how good its answers
are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from spdbench.judge.results.schema import BackendRecord, DrafterRecord, ModelInfo, Record

SCHEMA = "spdbench.eval/1"
Number = Annotated[float, Field(allow_inf_nan=False)]


class EvalSettings(Record):
    tasks: list[str]
    limit: int | None
    num_fewshot: int | None = Field(description="null: each task's own")
    apply_chat_template: bool
    template_args: dict[str, Any] = Field(default_factory=dict)
    allow_code_execution: bool
    seed: int


class EvalScore(Record):
    value: Number | None
    stderr: Number | None


class EvalTask(Record):
    """One task; `scores` by lm-eval's `METRIC,FILTER`."""

    version: str | None
    num_fewshot: int
    num_documents: int
    scores: dict[str, EvalScore]


class EvalSample(Record):
    """One document of a task through one of its filters; `scores` by metric."""

    task: str
    document: int
    filter: str
    prompt_sha256: str
    answers: list[Any]
    scores: dict[str, Number]


class Evaluation(Record):
    schema_: Literal["spdbench.eval/1"] = Field(alias="schema")
    created: str
    spdbench: dict[str, str | None]
    versions: dict[str, str]
    settings: EvalSettings
    backend: BackendRecord
    model: ModelInfo
    drafter: DrafterRecord | None
    tasks: dict[str, EvalTask]
    samples: list[EvalSample]
