"""Exports of other load generators as results: guidellm's report (JSON), and aiperf's records (JSONL).

Both hold a line for each request: when it was sent, when its first and last token came, and how many tokens it had. So
decode speed, times to the first token and throughput are known, times between tokens are not. Two exports of the same
prompts pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from spdbench.cli.exports.aiperf import read_aiperf
from spdbench.cli.exports.guidellm import read_guidellm
from spdbench.cli.exports.requests import Export
from spdbench.errors import InputError, first_problem
from spdbench.input_files import BOM, json_rows, parse_json, read_input

OTHERS = {
    "the result of `vllm bench serve` or of SGLang's bench_serving": {"request_throughput", "mean_ttft_ms"},
    "the profile of genai-perf": {"experiments", "service_kind"},
    "the summary of llmperf": {"results_num_completed_requests"},
}
"""Reports that are recognised by their keys, of which a file may hold several, and not read."""
EXPECTED = "expected the report of `guidellm run --output kind=json`, or aiperf's profile_export.jsonl"


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
    raw = read_input(path).removeprefix(BOM)
    where = str(path)
    if raw.lstrip()[:1] != b"{":
        raise InputError(f"{path}: is no export; {EXPECTED}")
    first = raw.lstrip().partition(b"\n")[0]
    try:
        line = parse_json(first)
    except ValueError:
        line = None
    _refuse_others(path, line)
    try:
        if isinstance(line, Mapping) and "metadata" in line and {"metrics", "error"} & line.keys():
            return [read_aiperf(path, list(json_rows(raw, where)))]
        report = parse_json(raw)
    except ValidationError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    _refuse_others(path, report)
    if isinstance(report, Mapping) and "benchmarks" in report:
        return read_guidellm(where, report)
    if isinstance(report, Mapping) and "input_config" in report:
        raise InputError(f"{path}: is aiperf's summary, which holds no single requests; import profile_export.jsonl")
    raise InputError(f"{path}: is no export; {EXPECTED}")


def _refuse_others(path: Path, report: object) -> None:
    """Raises `InputError` for a report of another tool, which says what to do instead."""
    for what, keys in OTHERS.items():
        if isinstance(report, Mapping) and keys <= report.keys():
            raise InputError(
                f"{path}: is {what}, which is not read; {EXPECTED}. Or measure the server: `spdbench run quick "
                "-b NAME=openai -o NAME.base_url=URL`"
            )
