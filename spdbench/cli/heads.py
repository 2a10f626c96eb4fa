"""The head of a result file, from the objects of a run. Copies facts; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spdbench.backend import Backend, BackendOptions
from spdbench.judge.results.schema import BackendRecord, DecodingInfo, DrafterRecord, ModelInfo, SuiteInfo
from spdbench.measure.assemble import ResultHead
from spdbench.measure.runner import Workload
from spdbench.models.remote_target import RemoteTarget
from spdbench.models.target import Target
from spdbench.prompts.chat import ChatFormat, PlainText
from spdbench.prompts.suite import Suite


def result_head(
    suite: Suite,
    workload: Workload,
    target: Target,
    chat: ChatFormat | PlainText,
    name: str,
    label: str,
    backend: Backend,
    options: BackendOptions,
    environment: Mapping[str, Any],
    git: str | None,
) -> ResultHead:
    """All of `label`'s result but its runs."""
    return ResultHead(
        suite=SuiteInfo(
            name=suite.name,
            version=suite.version,
            sha256=suite.sha256,
            source=suite.source,
            num_prompts=len(workload.prompts),
            score=suite.score if suite.score is None or isinstance(suite.score, str) else dict(suite.score),
        ),
        decoding=DecodingInfo(
            max_new_tokens=workload.max_new_tokens,
            temperature=workload.sampling.temperature,
            top_p=workload.sampling.top_p,
            top_k=workload.sampling.top_k,
            seed=workload.seed,
            eos_ids=sorted(workload.eos_ids),
        ),
        backend=backend_record(name, label, backend, options),
        model=model_record(target, chat),
        drafter=drafter_record(backend),
        environment=environment,
        git=git,
    )


def backend_record(name: str, label: str, backend: Backend, options: BackendOptions) -> BackendRecord:
    info = backend.describe()
    return BackendRecord(
        name=name,
        label=label,
        kind=backend.kind,
        options=options.model_dump(mode="json"),
        devices=list(info.devices),
        num_devices=len(info.devices),
        lossy=not backend.lossless,
        lanes=info.lanes,
        lane_bytes=list(info.lane_bytes),
        stage_layers=list(info.stage_layers),
        chosen=dict(info.chosen),
        kernels=info.kernels,
        unknown=list(info.unknown),
        other_model=info.other_model,
    )


def model_record(target: Target, chat: ChatFormat | PlainText) -> ModelInfo:
    known = not isinstance(target, RemoteTarget)
    return ModelInfo(
        id=target.files.id,
        sha256=target.files.sha256,
        dtype=target.dtype_name,
        num_layers=target.config.num_layers if known else None,
        num_parameters=target.num_parameters if known else None,
        bytes=target.num_bytes if known else None,
        template_sha256=chat.template_sha256,
        tokenizer_sha256=target.files.tokenizer_sha256,
    )


def drafter_record(backend: Backend) -> DrafterRecord | None:
    drafter = backend.describe().drafter
    return None if drafter is None else DrafterRecord(**asdict(drafter))
