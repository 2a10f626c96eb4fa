"""Records of aiperf (JSONL). A request is known by its number: what it asked is not in them.

What was asked for (model, load, limit, temperature) is in aiperf's summary, which it writes into the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spdbench.cli.exports.requests import (
    DAMAGED,
    MAX_TIME_S,
    Export,
    Request,
    checked,
    limit_of,
    load_of,
    most_at_once,
    runs_of,
    temperature_of,
    text_of,
    time_of,
    whole,
)
from spdbench.errors import InputError
from spdbench.input_files import parse_json, read_input
from spdbench.judge.results.schema import Drafts
from spdbench.types import DraftCounts

SCHEMA = "1"
"""The major version of aiperf's summary that is read: what aiperf 0.13 writes."""
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}
MAX_COUNT = 2**31
DRAFT_ROUNDS, ACCEPTED, DRAFTED = (f"spec_decode_{name}" for name in ("steps", "accepted_draft_tokens", "draft_tokens"))
NEEDED = {"output_sequence_length", "request_latency", "time_to_first_token"}
"""Metrics without which a request has no speed; aiperf leaves out what it could not measure."""
DRAFT_METRICS = {DRAFT_ROUNDS, ACCEPTED, DRAFTED}


def read_aiperf(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Export:
    """The requests in `rows`, pairs of place and record, with what the summary next to `path` says of them.

    Raises:
        InputError: a record is damaged, none is of a profiling phase, or the summary is of an unknown version.
    """
    rows = [(where, row) for where, row in rows if _is_measured(row)]
    if not rows:
        raise InputError(f"{path}: holds no request of a profiling phase")
    requests = [checked(_request, row, where) for where, row in rows]
    answered = [row["metrics"] for _, row in rows if not _failed(row)]
    if answered and all(metrics.get("time_to_first_token") is None for metrics in answered):
        raise InputError(f"{path}: no request has a time to its first token; run aiperf with --streaming")
    times = [_times(row["metadata"]) for _, row in rows]
    version, model, load, body = _settings(path)
    return Export(
        "aiperf",
        text_of(version),
        text_of(model or "served"),
        load or most_at_once(times),
        time_of(min(times)[0] / 1e9),
        limit_of([body]),
        temperature_of([body]),
        runs_of(requests),
        sum(request.odd_drafts for request in requests),
    )


def _settings(records: Path) -> tuple[str, str, int | None, Mapping[str, Any]]:
    """Version, model, load and further keys of requests, from the summary that aiperf writes next to its records; the
    load is None and others are empty where that is missing or cannot be read."""
    path = records.with_name(f"{records.stem}_aiperf.json")
    try:
        summary = parse_json(read_input(path))
        schema = summary.get("schema_version") or SCHEMA
    except (InputError, *DAMAGED):
        return "", "", None, {}
    if str(schema).partition(".")[0] != SCHEMA:
        raise InputError(
            f"{path}: schema_version: {json.dumps(schema)[:40]} is not known; aiperf's summaries are read in version "
            f"{SCHEMA}, which aiperf 0.13 writes"
        )
    try:
        config = summary["input_config"]
        [model] = [one["name"] for one in config["models"]["items"]]
        [load] = [phase.get("concurrency") for phase in config["phases"] if phase["kind"] == "profiling"]
        body = dict(config["endpoint"].get("extra") or {})
        return str(summary.get("aiperf_version") or ""), str(model), load and load_of(load), body
    except DAMAGED:
        return "", "", None, {}


def _is_measured(row: Mapping[str, Any]) -> bool:
    metadata = row.get("metadata")
    return not isinstance(metadata, Mapping) or metadata.get("benchmark_phase", "profiling") == "profiling"


def _failed(row: Mapping[str, Any]) -> bool:
    return bool(row.get("error") or row["metadata"].get("was_cancelled"))


def _times(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """When a request began and ended, in ns since 1970."""
    start_ns, end_ns = int(metadata["request_start_ns"]), int(metadata["request_end_ns"])
    if not 0 <= start_ns <= end_ns < MAX_TIME_S * 1e9:
        raise ValueError("ends before it begins, or at no time of a clock")
    return start_ns, end_ns


def _request(row: Mapping[str, Any]) -> Request:
    metadata, error = row["metadata"], row.get("error")
    asked = str(whole(metadata["session_num"]))  # conversations have other ids in every run
    turn = int(metadata.get("turn_index") or 0)
    _times(metadata)
    if _failed(row):
        message = error.get("message") if isinstance(error, Mapping) else None
        return Request(asked, turn, 0, 0, 0.0, 0.0, error=str(message or error or "cancelled"))
    metrics = row["metrics"]
    if lacking := sorted(name for name in NEEDED if metrics.get(name) is None):
        return Request(asked, turn, 0, 0, 0.0, 0.0, error=f"cannot be counted: aiperf reports no {', '.join(lacking)}")
    tokens = whole(metrics["output_sequence_length"]["value"])
    last_s = _seconds(metrics["request_latency"])
    prompt_tokens = metrics.get("input_sequence_length") or {"value": 0}
    first_s = _seconds(metrics["time_to_first_token"])
    reported = bool(DRAFT_METRICS & metrics.keys())
    drafts = _drafts(metrics, tokens) if reported else None
    odd = reported and drafts is None
    return Request(asked, turn, whole(prompt_tokens["value"]), tokens, first_s, last_s, drafts=drafts, odd_drafts=odd)


def _drafts(metrics: Mapping[str, Any], num_new_tokens: int) -> Drafts | None:
    """What the server reported of a request's drafts; None where that cannot be."""
    try:
        values = [metrics[name]["value"] for name in (DRAFT_ROUNDS, ACCEPTED, DRAFTED)]
        rounds, accepted, drafted = map(int, values)
        if [rounds, accepted, drafted] != values or not 0 <= max(rounds, accepted, drafted) < MAX_COUNT:
            return None
    except DAMAGED:
        return None
    counts = DraftCounts(rounds, None, accepted, drafted, source="aiperf's records")
    return Drafts(**asdict(counts)) if counts.is_possible(num_new_tokens) else None


def _seconds(measured: Mapping[str, Any]) -> float:
    unit = measured["unit"]
    if unit not in SECONDS:
        raise ValueError(f"unit {unit!r:.20} is not known. Known: {', '.join(SECONDS)}")
    return float(measured["value"]) * SECONDS[unit]
