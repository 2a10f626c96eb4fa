"""`spdbench import`: exports of guidellm and aiperf, in the shape that both tools write, as results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from spdbench.judge.results.schema import json_schema, read_result
from tests.cli.run_helpers import spdbench

Change = Callable[[dict[str, Any]], object]


def guidellm_request(number: int, first_s: float = 0.2, token_s: float = 0.01, tokens: int = 11) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": f"Question {number}?"}],
        "max_completion_tokens": 64,
        "temperature": 0,
    }
    start = 1000.0 + number
    return {
        "request_args": json.dumps({"stream": True, "body": body}),
        "output": f"Answer {number}.",
        "info": {
            "request_id": f"id-{number}",
            "turn_index": 0,
            "error": None,
            "timings": {
                "request_start": start,
                "first_token_iteration": start + first_s,
                "last_token_iteration": start + first_s + (tokens - 1) * token_s,
            },
        },
        "input_metrics": {"text_tokens": 30},
        "output_metrics": {"text_tokens": tokens},
    }


def guidellm(*levels: int, num: int = 9, token_s: float = 0.01) -> dict[str, Any]:
    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1"},
        "benchmarks": [
            {
                "config": {"strategy": {"streams": level}, "backend": {"model": "m"}},
                "start_time": 1000.0,
                "requests": {
                    "successful": [guidellm_request(i, token_s=token_s * level) for i in range(num)],
                    "errored": [],
                    "incomplete": [],
                },
            }
            for level in levels
        ],
    }


def aiperf_record(number: int, token_s: float = 0.01, tokens: int = 11, **more: Any) -> dict[str, Any]:
    start_ns = (1000 + number) * 10**9
    latency_s = 0.2 + (tokens - 1) * token_s
    return {
        "metadata": {
            "session_num": number,
            "conversation_id": f"session_{number:06d}",
            "turn_index": 0,
            "request_start_ns": start_ns,
            "request_end_ns": start_ns + round(latency_s * 1e9),
            "benchmark_phase": "profiling",
        },
        "metrics": {
            "time_to_first_token": {"value": 200.0, "unit": "ms"},
            "request_latency": {"value": latency_s * 1000, "unit": "ms"},
            "output_sequence_length": {"value": tokens, "unit": "tokens"},
            "input_sequence_length": {"value": 30, "unit": "tokens"},
            **more,
        },
        "error": None,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return path


def test_a_report_of_guidellm_is_a_result_for_each_load(tmp_path: Path) -> None:
    report = guidellm(1, 4)
    report["benchmarks"][1]["requests"]["errored"] = [
        {**guidellm_request(99), "info": {**guidellm_request(99)["info"], "error": "timed out"}}
    ]
    said = spdbench(
        "import", write(tmp_path / "load test.json", report), "--results", tmp_path / "r", "--label", "mine"
    )
    assert said.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        f"load-test__mine__m__c{level}.json" for level in (1, 4)
    ]
    for level in (1, 4):
        path = tmp_path / "r" / f"load-test__mine__m__c{level}.json"
        jsonschema.validate(json.loads(path.read_text()), json_schema())
        result = read_result(path)
        assert result.backend.options["concurrency"] == level
        assert (result.decoding.temperature, result.decoding.max_new_tokens) == (0.0, 64)
        overall = result.summary.overall
        assert overall["ttft_s"] == pytest.approx(0.2)
        assert overall["decode_tokens_per_s"] == pytest.approx(100 / level)
        assert overall["throughput_tokens_per_s"] == pytest.approx(level * 11 / (0.2 + 0.1 * level))
        assert overall["itl_p50_s"] is None
        assert result.runs[0].text == "Answer 0."
    assert [run.error for run in result.runs if run.error] == ["timed out"]


def test_a_number_that_no_request_has_is_one_line(tmp_path: Path) -> None:
    report = guidellm(1)
    report["benchmarks"][0]["requests"]["successful"][3]["input_metrics"]["text_tokens"] = 10**12
    record = aiperf_record(0)
    record["metrics"]["input_sequence_length"]["value"] = 1e300
    for path in (write(tmp_path / "a.json", report), write_lines(tmp_path / "b.jsonl", [record])):
        said = spdbench("import", path, "--results", tmp_path / "r")
        assert said.code == 2
        assert said.err == (
            f"Error: {path}: a request's num_prompt_tokens: Input should be less than or equal to 2147483647\n"
        )


def test_arguments_that_cannot_be_read_are_as_if_not_there(tmp_path: Path) -> None:
    report = guidellm(1)
    requests = report["benchmarks"][0]["requests"]["successful"]
    for request, args in zip(
        requests, ("[" * 5000, '{"body": {}, "body": {}}', "{}", "no JSON", '"text"'), strict=False
    ):
        request["request_args"] = args
    said = spdbench("import", write(tmp_path / "load.json", report), "--results", tmp_path / "r")
    assert said.code == 0, said.err


def test_records_of_aiperf_are_a_result_with_what_drafts_they_hold(tmp_path: Path) -> None:
    drafts: dict[str, Any] = {
        f"spec_decode_{name}": {"value": value, "unit": "tokens"}
        for name, value in (("steps", 4), ("accepted_draft_tokens", 6), ("draft_tokens", 12))
    }
    rows = [aiperf_record(i, **drafts) for i in range(9)]
    rows[0]["metadata"]["benchmark_phase"] = "warmup"
    rows[1]["error"] = {"code": 500, "message": "out of memory"}
    said = spdbench("import", write_lines(tmp_path / "profile_export.jsonl", rows), "--results", tmp_path, "-m", "m")
    assert said.code == 0, said.err
    result = read_result(tmp_path / "profile_export__aiperf__m.json")
    assert len(result.runs) == 8
    assert result.runs[0].error == "out of memory"
    overall = result.summary.overall
    assert (overall["num_failed"], overall["num_runs"]) == (1, 7)
    assert overall["decode_tokens_per_s"] == pytest.approx(100)
    assert overall["acceptance_length"] == pytest.approx(1 + 6 / 4)
    assert result.backend.options["concurrency"] == 1


@pytest.mark.parametrize(
    ("steps", "accepted", "drafted"),
    [(4, 13, 12), (-1, 6, 12), (4, -6, 12), (0, 6, 12), (12, 0, 12), (4, 600, 1200), (4, 6, 1e308), (4, 6.5, 12)],
)
def test_counts_of_drafts_that_cannot_be_are_dropped_and_said(
    tmp_path: Path, steps: float, accepted: float, drafted: float
) -> None:
    def counts(*values: float) -> dict[str, Any]:
        names = ("spec_decode_steps", "spec_decode_accepted_draft_tokens", "spec_decode_draft_tokens")
        return {name: {"value": value} for name, value in zip(names, values, strict=True)}

    rows = [aiperf_record(0, **counts(4, 6, 12)), aiperf_record(1, **counts(steps, accepted, drafted))]
    said = spdbench("import", write_lines(tmp_path / "x.jsonl", rows), "--results", tmp_path)
    assert said.code == 0, said.err
    assert "counts of drafts contradict themselves or the answer in 1 request, whose acceptance" in said.err
    result = read_result(tmp_path / "x__aiperf__served.json")
    assert [run.drafts is None for run in result.runs] == [False, True]
    assert result.summary.overall["acceptance_length"] == pytest.approx(1 + 6 / 4)


def test_one_request_that_cannot_be_counted_is_one_failed_request(tmp_path: Path) -> None:
    rows = [aiperf_record(i) for i in range(9)]
    rows[0] = {"metadata": rows[0]["metadata"], "error": {"code": 499, "message": "gone"}}
    rows[2]["metadata"]["was_cancelled"] = True
    del rows[4]["metrics"]["output_sequence_length"]
    rows[6]["metrics"]["time_to_first_token"] = None
    report = guidellm(1)
    requests = report["benchmarks"][0]["requests"]["successful"]
    requests[0]["info"]["turn_index"] = requests[1]["input_metrics"] = None
    requests[2]["info"]["timings"]["last_token_iteration"] = requests[4]["info"]["timings"]["request_start"] = None
    for source in (write_lines(tmp_path / "a.jsonl", rows), write(tmp_path / "g.json", report)):
        source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
        said = spdbench("import", source, "--results", tmp_path)
        assert said.code == 0, said.err
    assert [run.error for run in read_result(tmp_path / "a__aiperf__served.json").runs if run.error] == [
        "gone",
        "cancelled",
        "cannot be counted: aiperf reports no output_sequence_length",
        "cannot be counted: aiperf reports no time_to_first_token",
    ]
    runs = read_result(tmp_path / "g__guidellm__m.json").runs
    assert [run.error for run in runs if run.error] == [
        "cannot be timed: guidellm reports no last_token_iteration",
        "cannot be timed: guidellm reports no request_start",
    ]
    for row in rows:
        row.get("metrics", {}).pop("time_to_first_token", None)
    said = spdbench("import", write_lines(tmp_path / "b.jsonl", rows), "--results", tmp_path)
    assert (said.code, "run aiperf with --streaming" in said.err) == (2, True)


def test_overlapping_requests_of_aiperf_say_how_many_were_under_way(tmp_path: Path) -> None:
    rows = [aiperf_record(i) for i in range(4)]
    for row in rows[:3]:
        row["metadata"]["request_start_ns"], row["metadata"]["request_end_ns"] = 10**12, 10**12 + 5
    said = spdbench("import", write_lines(tmp_path / "x.jsonl", rows), "--results", tmp_path)
    assert said.code == 0, said.err
    assert "3 at once" in said.err


def aiperf_summary(**extra: Any) -> dict[str, Any]:
    phases = [{"kind": "warmup", "concurrency": 1}, {"kind": "profiling", "concurrency": 8}]
    config = {"models": {"items": [{"name": "org/m"}]}, "phases": phases, "endpoint": {"extra": extra}}
    return {"aiperf_version": "0.4", "input_config": config}


def test_what_was_asked_for_comes_from_aiperfs_summary_or_stays_unknown(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "profile_export.jsonl", [aiperf_record(i) for i in range(4)])
    summary, results = tmp_path / "profile_export_aiperf.json", tmp_path / "r"
    assert spdbench("import", source, "--results", results).code == 0
    plain = results / "profile_export__aiperf__served.json"
    result = read_result(plain)
    assert (result.decoding.temperature, result.decoding.max_new_tokens) == (None, 11)
    jsonschema.validate(json.loads(plain.read_text()), json_schema())
    said = spdbench("compare", results)
    assert said.code == 0, said.err
    assert "temperature unknown" in said.out
    write(summary, aiperf_summary(temperature=0, max_tokens=64))
    assert spdbench("import", source, "--results", results).code == 0
    result = read_result(results / "profile_export__aiperf__m__c8.json")
    assert (result.decoding.temperature, result.decoding.max_new_tokens) == (0.0, 64)
    assert result.backend.options["concurrency"] == 8
    damaged: Any
    for damaged in ({}, aiperf_summary(temperature=[1], max_tokens="x"), {"input_config": {"models": 1}}, []):
        write(summary, damaged)
        assert spdbench("import", source, "--results", results, "--force").code == 0
    write(summary, {**aiperf_summary(), "schema_version": "2.0"})
    said = spdbench("import", source, "--results", results, "--force")
    assert said.code == 2
    assert 'profile_export_aiperf.json: schema_version: "2.0" is not known' in said.err


def test_two_loads_of_one_export_have_two_files(tmp_path: Path) -> None:
    for level in (1, 4, 8):
        source = write(tmp_path / "g.json", guidellm(level))
        assert spdbench("import", source, "--results", tmp_path / "r").code == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "g__guidellm__m.json",
        "g__guidellm__m__c4.json",
        "g__guidellm__m__c8.json",
    ]


def test_loads_at_a_rate_have_files_of_their_own(tmp_path: Path) -> None:
    """guidellm's sweep ends with such; their requests say how many were under way."""
    report = guidellm(1, 1, 4)
    for strategy in (report["benchmarks"][1]["config"], report["benchmarks"][2]["config"]):
        strategy["strategy"] = {"type_": "constant", "rate": 2.0, "max_concurrency": 512}
    for request in report["benchmarks"][2]["requests"]["successful"]:
        request["info"]["timings"].update(
            request_start=1000.0, first_token_iteration=1001.0, last_token_iteration=1020.0
        )
    report["benchmarks"][1]["start_time"] = "yesterday"
    said = spdbench("import", write(tmp_path / "g.json", report), "--results", tmp_path / "r")
    assert said.code == 0, said.err
    assert "NOTE" in said.err
    assert "several loads had as many requests at once (c1)" in said.err
    names = ("c1-2", "c1", "c9")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        f"g__guidellm__m__{name}.json" for name in names
    ]


def test_imports_compare_and_are_gated(tmp_path: Path) -> None:
    for label, token_s in (("before", 0.01), ("after", 0.02)):
        source = write(tmp_path / f"{label}.json", guidellm(1, token_s=token_s))
        where = ("--results", tmp_path / label, "--suite", "s", "--machine", "box")
        assert spdbench("import", source, *where, "--label", label).code == 0
        assert spdbench("import", source, *where, "--label", "same", "--name", "again").code == 0
    said = spdbench("compare", tmp_path / "before", tmp_path / "after", "--baseline", "before", "--format", "json")
    assert said.code == 0, said.err
    rows = {row["label"]: row for table in json.loads(said.out)["tables"] for row in table["rows"]}
    assert rows["after"]["metrics"]["speedup"] == pytest.approx(0.5)
    assert "apart" in {flag["name"] for flag in rows["after"]["flags"]}
    words = ("--baseline", tmp_path / "before" / "s__same__m__again.json", "--max-slowdown", "10%")
    said = spdbench("check", tmp_path / "after" / "s__same__m__again.json", *words)
    assert said.code == 3, said.out + said.err
    assert "slower" in said.out
    said = spdbench("check", tmp_path / "before" / "s__same__m__again.json", *words)
    assert said.code == 0, said.out + said.err


def _without(*path: str | int) -> Change:
    def change(report: dict[str, Any]) -> None:
        holder: Any = report
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["metadata"].update(version=7), "metadata.version: 7 is not known; guidellm's reports"),
        (_without("metadata"), "metadata.version: null is not known"),
        (lambda report: report.update(benchmarks=[]), "holds no benchmark; let `guidellm run` finish"),
        (
            lambda report: report["benchmarks"][0]["requests"].update(successful=[]),
            "holds benchmarks, but no request that came to an end",
        ),
        (_without("benchmarks", 0, "requests"), "benchmarks.0.requests: is missing"),
        (_without("benchmarks", 0, "config", "strategy"), "benchmarks.0.strategy: is missing"),
        (
            _without("benchmarks", 0, "requests", "successful", 3, "output_metrics"),
            "benchmarks.0.requests.3: cannot be read: lacks 'output_metrics'",
        ),
        (
            lambda report: report["benchmarks"][0]["requests"]["successful"][0]["info"]["timings"].update(
                request_start=5000.0
            ),
            "benchmarks.0.requests.0: cannot be read: times or tokens that cannot be",
        ),
        (
            lambda report: report["benchmarks"][0]["requests"]["successful"][0]["output_metrics"].update(
                text_tokens=11.5
            ),
            "benchmarks.0.requests.0: cannot be read: 11.5 is no count",
        ),
        (
            lambda report: [
                request["info"]["timings"].update(
                    last_token_iteration=1000.2 + number, first_token_iteration=1000.2 + number
                )
                for number, request in enumerate(report["benchmarks"][0]["requests"]["successful"])
            ],
            "benchmarks.0: every answer came at once; let guidellm stream",
        ),
    ],
)
def test_a_report_that_cannot_be_read_is_one_line(tmp_path: Path, change: Change, message: str) -> None:
    report = guidellm(1)
    change(report)
    said = spdbench("import", write(tmp_path / "g.json", report), "--results", tmp_path / "r")
    assert said.code == 2
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no export; expected the report of `guidellm run"),
        ("", "is no export"),
        ("{}", "is no export"),
        ("{", "not JSON"),
        (
            '{"backend": "vllm", "request_throughput": 2.5, "mean_ttft_ms": 30.1, "ttfts": [0.03]}',
            "is the result of `vllm bench serve` or of SGLang's bench_serving, which is not read",
        ),
        (
            '{"request_throughput": 2.5, "mean_ttft_ms": 30}\n{"request_throughput": 2.4, "mean_ttft_ms": 31}\n',
            "SGLang",
        ),
        ('{"service_kind": "openai", "experiments": []}', "the profile of genai-perf, which is not read"),
        ('{"input_config": {}}', "aiperf's summary, which holds no single requests; import profile_export.jsonl"),
        ('{"metadata": {}, "metrics": {}}', "line 1: cannot be read: lacks "),
        ('{"metadata": {"benchmark_phase": "warmup"}, "metrics": {}}', "no request of a profiling phase"),
        ('{"metadata": {"benchmark_phase": "warmup"}, "metrics": {}}\n{"metadata": 1}', "line 2: cannot be read"),
        (
            json.dumps(aiperf_record(0, output_sequence_length={"value": 11.7})),
            "line 1: cannot be read: 11.7 is no count",
        ),
        (json.dumps(aiperf_record(0)).replace('"session_num": 0', '"session_num": null'), "line 1: cannot be read"),
        (json.dumps(aiperf_record(0, request_latency={"value": 1, "unit": "h"})), "unit 'h' is not known. Known: ns"),
    ],
)
def test_what_is_no_export_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    said = spdbench("import", path, "--results", tmp_path / "r")
    assert said.code == 2
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_result_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    words = ("import", write(tmp_path / "g.json", guidellm(1)), "--results", tmp_path / "r")
    assert spdbench(*words).code == 0
    said = spdbench(*words)
    assert said.code == 2
    assert "exists already" in said.err
    assert spdbench(*words, "--force").code == 0
    assert spdbench(*words, "--label", "a/b").code == 2
