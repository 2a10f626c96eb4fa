"""Exports of other load generators as results: guidellm's report (JSON), and aiperf's records (JSONL).

Both hold a line for each request: when it was sent, when its first and last token came, and how many tokens it had. So
decode speed, times to the first token and throughput are known, times between tokens are not. A request is known by the
hash of what it asked, in aiperf's records by its number, so that two exports of the same prompts pair. What was asked
for (model, load, limit, temperature) is in aiperf's summary, which it writes into the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spdbench.errors import InputError, first_problem
from spdbench.input_files import json_rows, parse_json, read_input
from spdbench.judge.results.schema import Drafts, Run, Steps

GUIDELLM_VERSIONS = (2,)
"""Versions of guidellm's report that are read: what guidellm 0.8 writes."""
EXPECTED = "expected the report of `guidellm run --output kind=json`, or aiperf's profile_export.jsonl"
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}
MAX_TEMPERATURE = 1e3
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Export:
    """The requests that a `tool` of some version made with one load. `None` for what the export does not say."""

    tool: str
    version: str
    model: str
    at_once: int
    created_s: float
    max_new_tokens: int | None
    temperature: float | None
    runs: tuple[Run, ...]

    @property
    def prompts_sha256(self) -> str:
        """The hash of all that was asked, in any order."""
        return _sha256(json.dumps(sorted({run.prompt_sha256 for run in self.runs})))


@dataclass(frozen=True)
class _Request:
    """One request; times in seconds, the first token's and the last's since it was sent."""

    asked: str
    turn: int
    num_prompt_tokens: int
    num_new_tokens: int
    first_s: float
    last_s: float
    text: str | None = None
    error: str | None = None
    drafts: Drafts | None = None


def read_exports(path: Path) -> list[Export]:
    """One export for each load in the file.

    Raises:
        InputError: it cannot be read, is neither tool's, is of an unknown version, or is damaged.
    """
    try:
        return _read(path)
    except ValidationError as error:  # a number that a request cannot have
        loc, reason = first_problem(error)
        raise InputError(f"{path}: a request's {'.'.join(loc)}: {reason}") from None


def _read(path: Path) -> list[Export]:
    raw = read_input(path)
    where = str(path)
    if raw.lstrip()[:1] != b"{":
        raise InputError(f"{path}: is no export; {EXPECTED}")
    first = raw.lstrip().partition(b"\n")[0]
    try:
        line = parse_json(first)
    except ValueError:
        line = None
    try:
        if isinstance(line, Mapping) and {"metadata", "metrics"} <= line.keys():
            return [_aiperf(path, [row for _, row in json_rows(raw, where)])]
        report = parse_json(raw)
    except ValidationError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if isinstance(report, Mapping) and "benchmarks" in report:
        return _guidellm(where, report)
    if isinstance(report, Mapping) and "input_config" in report:
        raise InputError(f"{path}: is aiperf's summary, which holds no single requests; import profile_export.jsonl")
    raise InputError(f"{path}: is no export; {EXPECTED}")


def _guidellm(where: str, report: Mapping[str, Any]) -> list[Export]:
    try:
        version, written_by = report["metadata"]["version"], str(report["metadata"]["guidellm_version"])
    except DAMAGED:
        version, written_by = None, "of unknown version"
    if version not in GUIDELLM_VERSIONS:
        known = ", ".join(map(str, GUIDELLM_VERSIONS))
        raise InputError(
            f"{where}: metadata.version: {json.dumps(version)[:40]} is not known; guidellm's reports are read in "
            f"version {known}, which guidellm 0.8 writes"
        )
    found = []
    for number, benchmark in enumerate(_list(report, "benchmarks", where)):
        place = f"{where}: benchmarks.{number}"
        config = _field(benchmark, "config", place)
        strategy, backend = _field(config, "strategy", place), _field(config, "backend", place)
        listed = _field(benchmark, "requests", place)
        rows = [*_list(listed, "successful", place), *_list(listed, "errored", place)]
        requests = [_checked(_guidellm_request, row, f"{place}.requests.{row_at}") for row_at, row in enumerate(rows)]
        bodies = [_body_of(row) for row in rows]
        found.append(
            Export(
                "guidellm",
                written_by,
                str(backend.get("model") or "served"),
                _at_once(strategy.get("streams") or strategy.get("max_concurrency")),
                float(benchmark.get("start_time") or 0.0),
                _limit(bodies),
                _temperature(bodies),
                _runs(requests),
            )
        )
    return found


def _body_of(row: Any) -> Mapping[str, Any]:
    try:
        body = parse_json(row["request_args"])["body"]
    except DAMAGED:
        return {}
    return body if isinstance(body, Mapping) else {}


def _guidellm_request(row: Mapping[str, Any]) -> _Request:
    info, body = row["info"], _body_of(row)
    asked = json.dumps(body.get("messages") or body.get("prompt") or info["request_id"])
    tokens = int(row["output_metrics"]["text_tokens"] or 0)
    timings = info["timings"]
    if info.get("error") or not timings.get("first_token_iteration"):
        return _Request(asked, int(info["turn_index"]), 0, 0, 0.0, 0.0, error=str(info.get("error") or "no token came"))
    start = timings["request_start"]
    return _Request(
        asked,
        int(info["turn_index"]),
        int(row["input_metrics"]["text_tokens"] or 0),
        tokens,
        timings["first_token_iteration"] - start,
        timings["last_token_iteration"] - start,
        row.get("output"),
    )


def _aiperf_settings(records: Path) -> tuple[str, str, int | None, Mapping[str, Any]]:
    """Version, model, load and further keys of requests, from the summary that aiperf writes next to its records; the
    load is None and others are empty where that is missing or cannot be read."""
    try:
        summary = parse_json(read_input(records.with_name(f"{records.stem}_aiperf.json")))
        config = summary["input_config"]
        [model] = [one["name"] for one in config["models"]["items"]]
        [load] = [phase.get("concurrency") for phase in config["phases"] if phase["kind"] == "profiling"]
        body = dict(config["endpoint"].get("extra") or {})
        return str(summary.get("aiperf_version") or ""), str(model), load and _at_once(load), body
    except (InputError, *DAMAGED):
        return "", "", None, {}


def _aiperf(path: Path, rows: Sequence[Mapping[str, Any]]) -> Export:
    rows = [row for row in rows if (row.get("metadata") or {}).get("benchmark_phase", "profiling") == "profiling"]
    if not rows:
        raise InputError(f"{path}: holds no request of a profiling phase")
    requests = [_checked(_aiperf_request, row, f"{path} line {number}") for number, row in enumerate(rows, start=1)]
    times = [(row["metadata"]["request_start_ns"], row["metadata"]["request_end_ns"]) for row in rows]
    version, model, load, body = _aiperf_settings(path)
    return Export(
        "aiperf",
        version,
        model or "served",
        load or _most_at_once(times),
        min(times)[0] / 1e9,
        _limit([body]),
        _temperature([body]),
        _runs(requests),
    )


def _aiperf_request(row: Mapping[str, Any]) -> _Request:
    metadata, metrics = row["metadata"], row["metrics"]
    asked = str(metadata["session_num"])  # conversations have other ids in every run
    turn = int(metadata.get("turn_index") or 0)
    start_ns, end_ns = int(metadata["request_start_ns"]), int(metadata["request_end_ns"])
    if end_ns < start_ns:
        raise ValueError("ends before it begins")
    if row.get("error"):
        return _Request(asked, turn, 0, 0, 0.0, 0.0, error=str((row["error"] or {}).get("message") or row["error"]))
    tokens = int(metrics["output_sequence_length"]["value"])
    drafts = None
    if "spec_decode_steps" in metrics:
        rounds, accepted, drafted = (
            int(metrics[f"spec_decode_{name}"]["value"]) for name in ("steps", "accepted_draft_tokens", "draft_tokens")
        )
        drafts = Drafts(rounds=rounds, judged=None, accepted=accepted, drafted=drafted, source="aiperf's records")
    last_s = _seconds(metrics["request_latency"])
    prompt_tokens = metrics.get("input_sequence_length") or {"value": 0}
    first_s = _seconds(metrics["time_to_first_token"])
    return _Request(asked, turn, int(prompt_tokens["value"]), tokens, first_s, last_s, drafts=drafts)


def _seconds(measured: Mapping[str, Any]) -> float:
    return float(measured["value"]) * SECONDS[measured["unit"]]


def _runs(requests: Sequence[_Request]) -> tuple[Run, ...]:
    """A run for each request; one that is asked again is a repeat."""
    seen = Counter[tuple[str, int]]()
    found = []
    for request in requests:
        sha256 = _sha256(request.asked)
        key = (sha256, request.turn)
        found.append(_run(request, sha256, seen[key]))
        seen[key] += 1
    return tuple(found)


def _run(request: _Request, sha256: str, repeat: int) -> Run:
    first_ns, last_ns = (round(seconds * 1e9) for seconds in (request.first_s, request.last_s))
    tokens, columns = request.num_new_tokens, [request.num_new_tokens > 0, request.num_new_tokens > 1]
    emitted = [1, tokens - 1][: sum(columns)] if request.error is None else []
    zeros = [0] * len(emitted)
    failed = request.error is not None or not emitted
    return Run(
        prompt_id=f"p-{sha256[:10]}",
        category="all",
        turn=request.turn,
        repeat=repeat,
        prompt_sha256=sha256,
        num_prompt_tokens=request.num_prompt_tokens,
        num_new_tokens=0 if failed else tokens,
        finish_reason="error" if failed else "eos",
        error=(request.error or "no token came") if failed else None,
        output_ids=[],
        ttft_s=None if failed else request.first_s,
        decode_s=None if failed else (request.last_s - request.first_s if tokens > 1 else 0.0),
        steps=Steps(
            t_ns=[first_ns, last_ns][: len(emitted)],
            emitted=emitted,
            drafted=zeros,
            judged=zeros,
            accepted=zeros,
            forwards=[0.0] * len(emitted),
        ),
        text=request.text,
        drafts=request.drafts,
    )


def _checked(read: Callable[[Any], _Request], row: Any, where: str) -> _Request:
    try:
        found = read(row)
        if found.error is None and not (0 <= found.first_s <= found.last_s < 1e6 and 0 <= found.num_new_tokens < 2**20):
            raise ValueError("times or tokens that cannot be")
        return found
    except DAMAGED as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: cannot be read: {what}") from None


def _field(holder: Any, name: str, where: str) -> Mapping[str, Any]:
    found = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(found, Mapping):
        raise InputError(f"{where}.{name}: is missing, or no object")
    return found


def _list(holder: Mapping[str, Any], name: str, where: str) -> list[Any]:
    found = holder.get(name)
    if not isinstance(found, list):
        raise InputError(f"{where}.{name}: is missing, or no list")
    return found


def _at_once(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 2**20 else 1


def _most_at_once(times: Sequence[tuple[int, int]]) -> int:
    """The most requests that were under way at one time."""
    events = sorted([(start, 1) for start, _ in times] + [(end, -1) for _, end in times])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return max(1, most)


def _limit(bodies: Iterable[Mapping[str, Any]]) -> int | None:
    """The most new tokens that any request asked for."""
    values = [body.get("max_completion_tokens") or body.get("max_tokens") for body in bodies]
    return max((value for value in values if isinstance(value, int) and value > 0), default=None)


def _temperature(bodies: Iterable[Mapping[str, Any]]) -> float | None:
    """The one temperature that all requests asked for."""
    values = [body.get("temperature") for body in bodies]
    first = values[0] if values and values.count(values[0]) == len(values) else None
    return float(first) if isinstance(first, int | float) and 0 <= first < MAX_TEMPERATURE else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
