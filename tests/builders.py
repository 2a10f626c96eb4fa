"""Hand-made runs and results for tests, with numbers chosen by the test instead of measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from spdbench.judge.metrics.flags import flags_for
from spdbench.judge.metrics.metrics import Metrics
from spdbench.judge.results.machine_load import MachineLoad
from spdbench.judge.results.schema import (
    BackendRecord,
    DecodingInfo,
    Divergence,
    DrafterRecord,
    ModelInfo,
    Result,
    Run,
    Steps,
    SuiteInfo,
    Summary,
)
from spdbench.judge.results.table import RunTable, table_from
from spdbench.types import BackendKind, FinishReason

MS = 1_000_000
READ_BANDWIDTH = 20e9


def make_steps(
    emitted: Sequence[int],
    *,
    step_ns: int = 10 * MS,
    prefill_ns: int = 50 * MS,
    drafted: Sequence[int] | None = None,
    judged: Sequence[int] | None = None,
    accepted: Sequence[int] | None = None,
    forwards: Sequence[float] | None = None,
) -> Steps:
    """Steps of equal duration; `emitted` has prefill's entry first, and omitted columns are those of vanilla."""
    zeros = [0] * len(emitted)
    return Steps(
        t_ns=[prefill_ns + index * step_ns for index in range(len(emitted))],
        emitted=list(emitted),
        drafted=list(drafted or zeros),
        judged=list(judged or zeros),
        accepted=list(accepted or zeros),
        forwards=list(forwards or [1.0] * len(emitted)),
    )


def vanilla_steps(num_new_tokens: int, *, step_ns: int = 10 * MS) -> Steps:
    return make_steps([1] * num_new_tokens, step_ns=step_ns)


def chunk_steps(chunks: Sequence[int], *, depth: int = 4, step_ns: int = 10 * MS) -> Steps:
    """Draft-verify rounds that commit `chunks` ids each, prefill's first: k ids are k - 1 accepted drafts and one."""
    accepted = [0, *(chunk - 1 for chunk in chunks[1:])]
    judged = [0, *(min(count + 1, depth) for count in accepted[1:])]
    drafted = [0, *(depth for _ in chunks[1:])]
    forwards = [1.0, *(depth + 1.0 for _ in chunks[1:])]
    return make_steps(chunks, drafted=drafted, judged=judged, accepted=accepted, forwards=forwards, step_ns=step_ns)


def pipeline_steps(verdicts: Sequence[bool], num_stages: int, *, step_ns: int = 10 * MS) -> Steps:
    """A pipeline's cycles up to its last verdict; n - 1 of them fill it after prefill and after each rejection."""
    emitted, judged, accepted = [1], [0], [0]
    fill = True
    for verdict in verdicts:
        empty = [0] * (num_stages - 1) if fill else []
        emitted += [*empty, 1]
        judged += [*empty, 1]
        accepted += [*empty, int(verdict)]
        fill = not verdict
    return make_steps(emitted, drafted=judged, judged=judged, accepted=accepted, step_ns=step_ns)


def make_run(
    steps: Steps | None = None,
    *,
    prompt: str = "p0",
    category: str = "math",
    turn: int = 0,
    repeat: int = 0,
    finish: FinishReason = "eos",
    output_ids: Sequence[int] | None = None,
    prompt_sha256: str | None = None,
    **more: Any,
) -> Run:
    """A run whose counts and times follow from `steps`; its prompt's hash from prompt and turn."""
    steps = vanilla_steps(5) if steps is None else steps
    num_new_tokens = sum(steps.emitted)
    last = max(index for index, count in enumerate(steps.emitted) if count)
    return Run(
        prompt_id=prompt,
        category=category,
        turn=turn,
        repeat=repeat,
        prompt_sha256=prompt_sha256 or sha256(f"{prompt}/{turn}"),
        num_prompt_tokens=7,
        num_new_tokens=num_new_tokens,
        finish_reason=finish,
        output_ids=list(range(100, 100 + num_new_tokens) if output_ids is None else output_ids),
        ttft_s=steps.t_ns[0] / 1e9,
        decode_s=(steps.t_ns[last] - steps.t_ns[0]) / 1e9,
        steps=steps,
        **more,
    )


def make_load(others: float = 0.0, **more: Any) -> MachineLoad:
    """A second on two cores."""
    return MachineLoad(wall_s=1.0, cores=2, others=others, **more)


def failed_run(prompt: str = "p0", category: str = "math") -> Run:
    return Run(
        prompt_id=prompt,
        category=category,
        turn=0,
        repeat=0,
        prompt_sha256=sha256(f"{prompt}/0"),
        num_prompt_tokens=7,
        num_new_tokens=0,
        finish_reason="error",
        error="RuntimeError: out of memory",
        output_ids=[],
        ttft_s=None,
        decode_s=None,
        steps=Steps(t_ns=[], emitted=[], drafted=[], judged=[], accepted=[], forwards=[]),
    )


def make_backend(kind: BackendKind = "autoregressive", *, label: str | None = None, **more: Any) -> BackendRecord:
    """One device; a pipeline has three stages of 10 layers in which the last also reads the head."""
    name = {"autoregressive": "vanilla", "draft_verify": "eagle", "pipeline": "spd"}[kind]
    pipeline = kind == "pipeline"
    fields: dict[str, Any] = {
        "name": name,
        "label": label or name,
        "kind": kind,
        "options": {},
        "devices": ["cpu"],
        "num_devices": 1,
        "lossy": False,
        "lanes": 3 if pipeline else 1,
        "lane_bytes": [60_000_000, 60_000_000, 80_000_000] if pipeline else [200_000_000],
        "stage_layers": [10, 10, 10] if pipeline else [30],
    }
    return BackendRecord(**(fields | more))


ORACLE = DrafterRecord(id="oracle:0.8", sha256=None, method="oracle", trained_tokens=None, synthetic=True)
TRAINED = DrafterRecord(id="smollm2-spd", sha256="d" * 64, method="spd", trained_tokens=1_000_000, synthetic=False)
RANDOM = DrafterRecord(id="random", sha256=None, method="spd", trained_tokens=0, synthetic=False)


def summarise(runs: Iterable[Run], backend: BackendRecord, read_bandwidth: float | None) -> Summary:
    """Every metric, overall and by category."""
    runs = list(runs)
    parts = {name: [run for run in runs if run.category == name] for name in sorted({run.category for run in runs})}
    overall, *others = (dict(Metrics(table_from(part), backend, read_bandwidth)) for part in (runs, *parts.values()))
    return Summary(overall=overall, by_category=dict(zip(parts, others, strict=True)))


def make_result(
    runs: Iterable[Run],
    backend: BackendRecord | None = None,
    *,
    drafter: DrafterRecord | None = None,
    divergence: Divergence | None = None,
    suite: str = "quick",
    dtype: str = "float32",
    temperature: float = 0.0,
    machine: str = "machine-a",
    template: str | None = "t" * 64,
    num_prompts: int | None = None,
) -> Result:
    """A result with summary and flags; complete unless `num_prompts` is larger than the number of prompts in `runs`."""
    runs, backend = list(runs), backend or make_backend()
    summary = summarise(runs, backend, READ_BANDWIDTH)
    model = ModelInfo(
        id="smollm2",
        sha256="m" * 64,
        dtype=dtype,
        num_layers=30,
        num_parameters=134_515_008,
        bytes=200_000_000,
        template_sha256=template,
    )
    return Result(
        schema="spdbench.result/1",
        created="2026-06-01T12:00:00Z",
        run_key="k" * 16,
        spdbench={"version": "0.1.0", "git": None},
        suite=SuiteInfo(
            name=suite,
            version=1,
            sha256=sha256(suite),
            source="inline",
            num_prompts=num_prompts or len({run.prompt_id for run in runs}),
        ),
        decoding=DecodingInfo(max_new_tokens=64, temperature=temperature, top_p=1.0, top_k=0, seed=0, eos_ids=[2]),
        backend=backend,
        model=model,
        drafter=drafter,
        environment={"cpu": "Testium 9000", "read_bandwidth_bytes_per_s": READ_BANDWIDTH, "fingerprint": machine},
        runs=runs,
        divergence=divergence,
        summary=summary,
        flags=flags_for(summary.overall, backend, model, drafter, divergence),
    )


def contents(table: RunTable) -> dict[str, Any]:
    """All that a table says of its runs, as lists."""
    columns = {field.name: getattr(table, field.name) for field in fields(table)}
    return {name: column.tolist() if isinstance(column, np.ndarray) else column for name, column in columns.items()}


def write_result(result: Result, path: Path) -> Path:
    path.write_text(result.model_dump_json(by_alias=True))
    return path


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
