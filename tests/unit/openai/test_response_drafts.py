"""Acceptance of each request from its own response: vLLM, SGLang, llama.cpp, and contradictory responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from spdbench.types import DraftCounts
from spdbench_backends.openai.response_drafts import count_drafts, find_report
from tests.stub_server import StubServer
from tests.unit.openai.conftest import Make
from tests.unit.openai.test_backend import Vllm, ask, loaded, run

# An answer of 8 tokens: prefill's, then rounds that commit 3, 1 and 3 tokens.
SUMMARY = {
    "mean_acceptance_length": 7 / 3,
    "draft_acceptance_rate": 4 / 9,
    "acceptance_histogram": [1, 0, 2, 0],
    "num_spec_steps": 3,
    "num_accepted_draft_tokens": 4,
    "num_draft_tokens": 9,
    "num_spec_tokens": 3,
}
DETAILED = {**SUMMARY, "num_draft_tokens": 7, "per_step_accepted": [2, 0, 2], "per_step_drafted": [3, 2, 2]}
SGLANG = {
    "spec_verify_ct": 3,
    "spec_num_correct_drafts": 4,
    "spec_num_proposed_drafts": 6,
    "spec_correct_drafts_histogram": [1, 0, 2],
    "spec_accept_length": 7 / 3,
}
TIMINGS = {"cache_n": 0, "prompt_n": 11, "predicted_n": 8, "predicted_ms": 80.5, "draft_n": 9, "draft_n_accepted": 4}
VLLM_SAYS, SGLANG_SAYS, LLAMACPP_SAYS = (f"each response of {name}" for name in ("vLLM", "SGLang", "llama.cpp"))


def of_vllm(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"metrics": {"speculative_decoding": values}}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (of_vllm(SUMMARY), DraftCounts(3, 7, 4, 9, (1, 0, 2, 0), (3, 2, 2), VLLM_SAYS)),
        (of_vllm(DETAILED), DraftCounts(3, 6, 4, 7, (1, 0, 2, 0), (3, 2, 1), VLLM_SAYS)),
        (of_vllm({**SUMMARY, "num_draft_tokens": 7}), DraftCounts(3, None, 4, 7, (1, 0, 2, 0), None, VLLM_SAYS)),
        (
            of_vllm({**SUMMARY, "acceptance_histogram": {"0": 1, "2": 2}}),
            DraftCounts(3, 7, 4, 9, (1, 0, 2), (3, 2, 2), VLLM_SAYS),
        ),
        (
            {"sglext": {"spec_tokens_details": SGLANG}},
            DraftCounts(3, 5, 4, 6, (1, 0, 2), (3, 2), SGLANG_SAYS),
        ),
        ({"meta_info": {"spec_verify_ct": 3}}, DraftCounts(3, None, 4, source=SGLANG_SAYS)),
        ({"timings": TIMINGS}, DraftCounts(3, None, 4, 9, source=LLAMACPP_SAYS)),
        ({"timings": {"cache_n": 0, "predicted_n": 8}}, DraftCounts(7, 0, 0, 0, source=LLAMACPP_SAYS)),
    ],
)
def test_each_engine_reports_in_its_own_words(event: dict[str, Any], expected: DraftCounts) -> None:
    report = find_report(event, {})
    assert report is not None
    assert count_drafts(report, 8) == expected


def test_details_may_be_those_of_the_choice() -> None:
    for choice in ({"sglext": {"spec_tokens_details": SGLANG}}, {"meta_info": SGLANG}):
        report = find_report({}, choice)
        assert report is not None
        assert report.values == SGLANG


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"metrics": None},
        {"metrics": {"speculative_decoding": None}},
        {"metrics": [1]},
        {"sglext": {"spec_tokens_details": None}},
        {"meta_info": {"id": "x"}},
        {"timings": {"predicted_n": 8, "predicted_ms": 3.0}},
        {"timings": "fast"},
    ],
)
def test_other_shapes_are_no_report(event: dict[str, Any]) -> None:
    assert find_report(event, {}) is None


@pytest.mark.parametrize(
    "event",
    [
        of_vllm({**SUMMARY, "num_spec_steps": 4}),
        of_vllm({**SUMMARY, "num_accepted_draft_tokens": 5}),
        of_vllm({**SUMMARY, "num_spec_steps": -3}),
        of_vllm({**SUMMARY, "num_spec_steps": "3"}),
        of_vllm({**SUMMARY, "num_draft_tokens": 3, "num_spec_tokens": 1}),
        of_vllm({**SUMMARY, "acceptance_histogram": None}),
        of_vllm({**SUMMARY, "acceptance_histogram": {"-1": 1}}),
        of_vllm({**SUMMARY, "acceptance_histogram": {"99999999999": 1}}),
        of_vllm({**DETAILED, "per_step_drafted": [3, 2]}),
        of_vllm({**DETAILED, "per_step_drafted": [1, 3, 3]}),
        of_vllm({"mean_acceptance_length": 2.0}),
        {"meta_info": {**SGLANG, "spec_num_correct_drafts": 7}},
        {"meta_info": {"spec_verify_ct": 30}},
        {"timings": {**TIMINGS, "draft_n": 3}},
        {"timings": {**TIMINGS, "draft_n_accepted": 9}},
        {"timings": {**TIMINGS, "draft_n": float("nan")}},
    ],
)
def test_contradictions_are_no_acceptance(event: dict[str, Any]) -> None:
    report = find_report(event, {})
    assert report is not None
    assert count_drafts(report, 8) is None


@pytest.mark.parametrize("at_once", ["1", "4"])
@pytest.mark.parametrize(
    ("words", "source"),
    [(of_vllm(DETAILED), VLLM_SAYS), ({"timings": TIMINGS}, LLAMACPP_SAYS)],
)
def test_acceptance_comes_from_responses_at_any_concurrency_and_before_counters(
    server: StubServer, backend: Make, words: dict[str, Any], source: str, at_once: str
) -> None:
    server.last_words, server.counters = lambda _: words, Vllm(server)
    made = loaded(backend(concurrency=at_once))
    assert made.describe().chosen["acceptance"] == source
    drafts = run(made).report.drafts
    assert drafts is not None
    assert (drafts.rounds, drafts.accepted, drafts.source) == (3, 4, source)
    assert all("return_spec_tokens_details" not in body for body in server.asked)


def test_sglang_is_asked_for_its_drafts(server: StubServer, backend: Make) -> None:
    server.last_words = lambda body: (
        {"sglext": {"spec_tokens_details": SGLANG}} if body.get("return_spec_tokens_details") else {}
    )
    drafts = run(loaded(backend(concurrency="2"))).report.drafts
    assert drafts is not None
    assert (drafts.rounds_accepting, drafts.source) == ((1, 0, 2), SGLANG_SAYS)


@pytest.mark.parametrize("refuses", [set(), {"return_spec_tokens_details"}])
def test_a_server_without_such_details_is_not_asked_for_them(
    server: StubServer, backend: Make, refuses: set[str]
) -> None:
    server.refuses = refuses
    made = loaded(backend())
    assert run(made).report.drafts is None
    assert "return_spec_tokens_details" not in server.asked[-1]


def test_acceptance_may_be_left_unread(server: StubServer, backend: Make) -> None:
    server.last_words = lambda _: of_vllm(SUMMARY)
    made = loaded(backend(metrics="false"))
    assert made.describe().chosen["acceptance"] == "not reported"
    assert run(made).report.drafts is None


def test_a_report_that_contradicts_itself_is_said_once_and_the_answer_counts(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    server.last_words = lambda _: of_vllm({**SUMMARY, "num_spec_steps": 4})
    made = loaded(backend())
    for _ in range(2):
        measured = run(made)
        assert (len(measured.output_ids), measured.report.drafts) == (8, None)
    assert capsys.readouterr().err.count("contradicts itself") == 1


def test_the_servers_own_decode_time_is_kept(server: StubServer, backend: Make) -> None:
    server.last_words = lambda _: {"timings": TIMINGS}
    assert run(loaded(backend())).report.decode_s == 0.0805
    server.last_words = lambda _: {"timings": {**TIMINGS, "predicted_ms": "fast"}}
    assert run(loaded(backend())).report.decode_s is None


@pytest.mark.parametrize("place", ["usage", "timings"])
def test_a_prompt_cache_is_noted_once_with_what_to_do(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    if place == "usage":
        cached = {"prompt_tokens_details": {"cached_tokens": 9}}
        server.last_words = lambda _: {"usage": {**server.usage(8), **cached}}
    else:
        server.last_words = lambda _: {"timings": {**TIMINGS, "cache_n": 9}}
    made = loaded(backend())
    assert [run(made, ask()).report.num_cached_tokens for _ in range(2)] == [9, 9]
    said = capsys.readouterr().err
    assert said.count("prompt cache answered 9 of 11 tokens") == 1
    assert "--no-enable-prefix-caching" in said


@pytest.mark.parametrize("details", [None, [], {"cached_tokens": None}, {"cached_tokens": "9"}, {"cached_tokens": -1}])
def test_no_cache_is_noted_where_none_is_told(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str], details: Any
) -> None:
    server.last_words = lambda _: {"usage": {**server.usage(8), "prompt_tokens_details": details}}
    assert run(loaded(backend())).report.num_cached_tokens is None
    assert "prompt cache" not in capsys.readouterr().err
