"""Comparisons and requests for programs: JSON with everything, CSV with one header and a line a row, Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from spdbench.errors import InputError, install_command
from spdbench.judge.comparison.compare import Row, Table
from spdbench.judge.comparison.load import conclude, loads
from spdbench.judge.comparison.pairing import concurrency
from spdbench.judge.comparison.summary import Summary, summaries
from spdbench.judge.conclusion import Conclusion, conclusions
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.results.schema import Drafts
from spdbench.judge.results.table import COLUMNS
from spdbench.render.columns import decoding, harmless, machine
from spdbench.render.notes import sentence

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What begins a formula in Excel, LibreOffice and Google Sheets."""


def to_json(tables: Sequence[Table]) -> str:
    """One object: `tables`, each with its rows and every metric."""
    levels = [load for load in loads(tables) if len(load.tables) > 1]
    more: dict[str, Any] = {"loads": [[asdict(found) for found in conclude(load)] for load in levels]} if levels else {}
    if over_suites := summaries(tables):
        more["summaries"] = [_summary(each) for each in over_suites]
    return json.dumps({"tables": [_table(table) for table in tables], **more}, indent=2) + "\n"


def _summary(summary: Summary) -> dict[str, Any]:
    head = summary.tables[0].head
    named = {"suites": summary.suites, "model": head.model.model_dump(), "baseline": summary.tables[0].baseline}
    return {**named, "labels": [asdict(each) for each in summary.labels]}


def _table(table: Table) -> dict[str, Any]:
    head = table.head
    return {
        "suite": head.suite.model_dump(),
        "model": head.model.model_dump(),
        "decoding": head.decoding.model_dump(),
        "environment": head.environment,
        "requests_at_once": concurrency(head),
        "baseline": table.baseline,
        "dialects": {name: DIALECTS[name].rule for name in table.dialects},
        "notes": list(table.notes),
        "conclusions": [{"sentence": sentence(each), **asdict(each)} for each in conclusions(table)],
        "rows": [_row(row) for row in table.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    head = row.head
    return {
        "label": row.label,
        "file": row.file,
        "created": head.created,
        "category": row.category,
        "backend": head.backend.model_dump(),
        "drafter": head.drafter.model_dump() if head.drafter else None,
        "is_baseline": row.is_baseline,
        "best": row.best,
        "disqualified": row.disqualified,
        "difference_shown": row.difference_shown,
        "outputs": row.outputs and row.outputs._asdict(),
        "divergence": head.divergence.model_dump() if head.divergence else None,
        "flags": [flag.model_dump() for flag in row.flags],
        "metrics": dict(row.metrics),
    }


def to_csv(tables: Sequence[Table]) -> str:
    """One header; intervals as NAME_ci_low and NAME_ci_high, lists joined by semicolons, null as an empty field.

    Text that a spreadsheet would take for a formula has an apostrophe in front.
    """
    return csv_text(comparison_records(tables))


def comparison_records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """A flat record for each row of `tables`."""
    return [
        _record(table, row, concluded.get(row.label) if row.category is None else None)
        for table in tables
        for concluded in [{each.label: each for each in conclusions(table)}]
        for row in table.rows
    ]


def request_records(results: Sequence[LoadedResult]) -> list[dict[str, Any]]:
    """A flat record for each request of `results`, failed ones included. Numbers that are not known are None.

    `judged` and `accepted` are an engine's own counts where its steps cannot tell.
    """
    records = []
    for result in results:
        head, runs = result.head, result.runs
        named = {
            "suite": head.suite.name,
            "model": head.model.id,
            "dtype": head.model.dtype,
            "decoding": decoding(head.decoding),
            "machine": machine(head),
            "created": head.created,
            "label": result.label,
            "file": result.file,
            "backend": head.backend.name,
        }
        for row, (prompt_id, turn, repeat) in enumerate(runs.keys):
            numbers = dict(zip(COLUMNS, runs.sums[row].tolist(), strict=True))
            failed = bool(runs.failed[row])
            key = {"prompt_id": prompt_id, "category": runs.categories[row], "turn": turn, "repeat": repeat}
            hashes = {"prompt_sha256": runs.prompt_sha256[row], "output_sha256": runs.output_sha256[row].hex()}
            found = dict.fromkeys(REQUEST_NUMBERS) if failed else _request_numbers(numbers, runs.drafts[row])
            if "drafts" in head.backend.unknown and runs.drafts[row] is None:
                found |= {"judged": None, "accepted": None}
            records.append({**named, **key, "error": runs.errors[row], **hashes, **found})
    return [{name: _text(value) for name, value in record.items()} for record in records]


REQUEST_NUMBERS = (
    *("num_prompt_tokens", "num_new_tokens", "ttft_s", "decode_s", "decode_tokens_per_s"),
    *("steps", "judged", "accepted", "forwards", "score", "energy_j", "peak_memory_bytes", "disturbed"),
)


def _request_numbers(numbers: Mapping[str, float], drafts: Drafts | None) -> dict[str, Any]:
    """The `REQUEST_NUMBERS` of a request that did not fail."""
    values = (
        int(numbers["prompt_tokens"]),
        int(numbers["new_tokens"]),
        numbers["ttft_s"],
        numbers["decode_s"],
        numbers["decode_tokens"] / numbers["decode_s"] if numbers["decode_s"] else None,
        int(numbers["steps"]),
        int(numbers["judged"]) if drafts is None else drafts.judged,
        int(numbers["accepted"]) if drafts is None else drafts.accepted,
        numbers["forwards"],
        numbers["score"] if numbers["scored"] else None,
        numbers["energy_j"] or None,
        int(numbers["peak_memory_bytes"]) or None,
        bool(numbers["disturbed"]),
    )
    return dict(zip(REQUEST_NUMBERS, values, strict=True))


def _text(value: Any) -> Any:
    """`value`; of text, what UTF-8 has no bytes for as escapes: a file's name need not be Unicode."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def to_parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    """`records` as a Parquet file with a column for each of their names.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        needed = install_command("spdbench[parquet]")
        raise InputError(f"--format parquet: needs pyarrow, which is not installed; {needed}") from None
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: [_text(record.get(name)) for record in records] for name in names}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def json_text(records: Sequence[Mapping[str, Any]]) -> str:
    """`records` as an array, one a line."""
    return "[" + ",".join("\n" + json.dumps(record) for record in records) + "\n]\n"


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """`records` with one header of all their names; what a record lacks is an empty field."""
    header = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) if isinstance(value, str) else value for name, value in record.items()})
    return text.getvalue()


def _record(table: Table, row: Row, found: Conclusion | None) -> dict[str, Any]:
    head = row.head
    record = {
        "suite": head.suite.name,
        "suite_version": head.suite.version,
        "suite_num_prompts": head.suite.num_prompts,
        "model": head.model.id,
        "dtype": head.model.dtype,
        "decoding": decoding(head.decoding),
        "machine": machine(head),
        "requests_at_once": concurrency(head),
        "label": row.label,
        "file": row.file,
        "category": row.category,
        "backend": head.backend.name,
        "kind": head.backend.kind,
        "num_devices": head.backend.num_devices,
        "kernels": head.backend.kernels,
        "lossy": head.backend.lossy,
        "drafter": head.drafter.id if head.drafter else None,
        "synthetic": head.drafter.synthetic if head.drafter else None,
        "baseline": table.baseline,
        "is_baseline": row.is_baseline,
        "best": row.best,
        "disqualified": row.disqualified,
        "flags": ";".join(flag.name for flag in row.flags),
        "difference_shown": row.difference_shown,
        "outcome": found.outcome if found else None,
        "num_prompts_to_show": found.num_prompts_to_show if found else None,
        "own_devices_speedup": found.own_devices.speedup if found and found.own_devices else None,
        **_fields("own_devices_speedup_ci", found.own_devices.interval if found and found.own_devices else None),
        "outputs_compared": row.outputs.num_compared if row.outputs else None,
        "outputs_identical": row.outputs.num_identical if row.outputs else None,
    }
    for name, value in row.metrics.items():
        record |= _fields(name, value)
    return record


def _cell(text: str) -> str:
    return harmless(f"'{text}" if text.startswith(FORMULA) else text)


def _fields(name: str, value: Any) -> dict[str, Any]:
    if name.endswith("_ci"):
        low, high = value or (None, None)
        return {f"{name}_low": low, f"{name}_high": high}
    return {name: ";".join(map(str, value)) if isinstance(value, list) else value}
