"""Reports of guidellm (JSON). A request is known by the hash of what it asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spdbench.cli.exports.requests import (
    DAMAGED,
    Export,
    Request,
    checked,
    field_of,
    limit_of,
    list_of,
    load_of,
    most_at_once,
    runs_of,
    temperature_of,
    text_of,
    time_of,
    whole,
)
from spdbench.errors import InputError
from spdbench.input_files import parse_json

VERSIONS = (2,)
"""Versions of the report that are read: what guidellm 0.8 writes."""


def read_guidellm(where: str, report: Mapping[str, Any]) -> list[Export]:
    """The requests of each load in the `report`, whose place is `where`.

    Raises:
        InputError: it is of an unknown version, is damaged, or holds no request.
    """
    try:
        version, written_by = report["metadata"]["version"], str(report["metadata"]["guidellm_version"])
    except DAMAGED:
        version, written_by = None, "of unknown version"
    if version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise InputError(
            f"{where}: metadata.version: {json.dumps(version)[:40]} is not known; guidellm's reports are read in "
            f"version {known}, which guidellm 0.8 writes"
        )
    found = []
    benchmarks = list_of(report, "benchmarks", where)
    for number, benchmark in enumerate(benchmarks):
        place = f"{where}: benchmarks.{number}"
        config = field_of(benchmark, "config", place)
        strategy, backend = field_of(config, "strategy", place), field_of(config, "backend", place)
        listed = field_of(benchmark, "requests", place)
        rows = [*list_of(listed, "successful", place), *list_of(listed, "errored", place)]
        requests = [checked(_request, row, f"{place}.requests.{row_at}") for row_at, row in enumerate(rows)]
        long = [request for request in requests if request.error is None and request.num_new_tokens > 1]
        if long and all(request.first_s == request.last_s for request in long):
            raise InputError(f"{place}: every answer came at once; let guidellm stream (its `stream` option)")
        bodies = [_body_of(row) for row in rows]
        found.append(
            Export(
                "guidellm",
                text_of(written_by),
                text_of(backend.get("model") or "served"),
                load_of(strategy["streams"]) if "streams" in strategy else _most_under_way(rows, requests),
                time_of(benchmark.get("start_time")),
                limit_of(bodies),
                temperature_of(bodies),
                runs_of(requests),
            )
        )
    if not any(export.runs for export in found):
        what = "no benchmark" if not benchmarks else "benchmarks, but no request that came to an end"
        raise InputError(f"{where}: holds {what}; let `guidellm run` finish, then import its report")
    return [export for export in found if export.runs]


def _most_under_way(rows: Sequence[Any], requests: Sequence[Request]) -> int:
    """The load of a strategy that sends requests at a rate, or all at once."""
    whole = [row["info"]["timings"] for row, request in zip(rows, requests, strict=True) if request.error is None]
    return most_at_once([(times["request_start"], times["last_token_iteration"]) for times in whole])


def _body_of(row: Any) -> Mapping[str, Any]:
    try:
        body = parse_json(row["request_args"])["body"]
    except DAMAGED:
        return {}
    return body if isinstance(body, Mapping) else {}


def _request(row: Mapping[str, Any]) -> Request:
    info, body = row["info"], _body_of(row)
    asked = json.dumps(body.get("messages") or body.get("prompt") or info["request_id"])
    tokens = whole(row["output_metrics"]["text_tokens"] or 0)
    timings, turn = info["timings"], int(info.get("turn_index") or 0)
    if info.get("error") or not timings.get("first_token_iteration"):
        return Request(asked, turn, 0, 0, 0.0, 0.0, error=str(info.get("error") or "no token came"))
    if lacking := [name for name in ("request_start", "last_token_iteration") if timings.get(name) is None]:
        return Request(asked, turn, 0, 0, 0.0, 0.0, error=f"cannot be timed: guidellm reports no {', '.join(lacking)}")
    start = timings["request_start"]
    return Request(
        asked,
        turn,
        whole((row.get("input_metrics") or {}).get("text_tokens") or 0),
        tokens,
        timings["first_token_iteration"] - start,
        timings["last_token_iteration"] - start,
        output if isinstance(output := row.get("output"), str) else None,
    )
