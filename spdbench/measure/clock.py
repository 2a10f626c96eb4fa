"""The only clock: one request, timed from outside the backend.

TTFT is the time until the first new id is an int on the host, which implies device synchronisation; every later id is
timed in the same way. Nothing but the backend's own work happens between two readings.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spdbench.backend import Backend, closing_steps, engine_report
from spdbench.judge.results.schema import Steps
from spdbench.processors import is_elsewhere, workers
from spdbench.types import Drafted, EngineReport, FinishReason, GenerationRequest, Step


@dataclass(frozen=True)
class Measurement:
    """One request as counted and timed; `output_ids` end with the first end-of-sequence id or at the limit.

    `start_ns` is the clock's reading at the start, from which the steps count. `report` is what the engine reported
    at the end, `drafts` what each step drafted where the request asks for it.
    """

    start_ns: int
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    ttft_s: float
    decode_s: float
    steps: Steps
    report: EngineReport
    drafts: tuple[Drafted | None, ...]


def peak_memory_bytes(devices: Sequence[str]) -> int | None:
    """The most memory in bytes that this process and its workers have held so far, on GPUs too; shared pages count once
    for each process. This is a backend's own peak only if it is the only one in the process.

    None if workers use one of the GPUs in `devices`: torch counts GPU memory only within the process that uses it. None
    also if one of `devices` is on another node.
    """
    helpers = workers()
    if any(map(is_elsewhere, devices)) or (helpers and any(device.startswith("cuda") for device in devices)):
        return None
    total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total += sum(map(_peak_bytes, helpers))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        total += sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return total


def _peak_bytes(process: int) -> int:
    """Another process's peak, or 0 where the system does not show it."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(peak.split()[1]) * 1024


class IncompleteOutputError(RuntimeError):
    """A backend stopped before the limit without an end of sequence: a bug of the backend, and a failed prompt."""


def measure(backend: Backend, request: GenerationRequest) -> Measurement:
    """Runs `request` once. Tokens past its end of sequence or its limit neither count nor take time.

    Raises:
        IncompleteOutputError: the backend stopped too early.
    """
    ids: list[int] = []
    rows: list[tuple[int, int, Step]] = []
    finish: FinishReason | None = None
    now = time.perf_counter_ns
    start = now()
    with closing_steps(backend.generate(request)) as steps:
        for step in steps:
            at = now() - start
            kept, finish = _cut(step.token_ids, request, len(ids))
            ids.extend(kept)
            rows.append((at, len(kept), step))
            if finish is not None:
                break
    report = engine_report(backend)
    if finish is None and ids:
        finish = report.finish
    if finish is None:
        raise IncompleteOutputError(
            f"it stopped after {len(ids)} of {request.max_new_tokens} tokens, none of which ends the sequence"
        )
    counted = [at for at, emitted, _ in rows if emitted]
    columns = Steps(
        t_ns=[at for at, _, _ in rows],
        emitted=[emitted for _, emitted, _ in rows],
        drafted=[step.drafted for _, _, step in rows],
        judged=[step.judged for _, _, step in rows],
        accepted=[step.accepted for _, _, step in rows],
        forwards=[step.forwards for _, _, step in rows],
    )
    drafts = tuple(step.drafts for _, _, step in rows) if request.keep_drafts else ()
    ttft_s, decode_s = counted[0] / 1e9, (counted[-1] - counted[0]) / 1e9
    return Measurement(start, tuple(ids), finish, ttft_s, decode_s, columns, report, drafts)


def _cut(
    token_ids: tuple[int, ...], request: GenerationRequest, num_before: int
) -> tuple[tuple[int, ...], FinishReason | None]:
    """The ids that count, and why generation ends with them; None if it goes on."""
    kept = token_ids[: request.max_new_tokens - num_before]
    for index, token in enumerate(kept):
        if token in request.eos_ids:
            return kept[: index + 1], "eos"
    return kept, "length" if num_before + len(kept) == request.max_new_tokens else None
