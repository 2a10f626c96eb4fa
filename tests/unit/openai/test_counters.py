"""What counters of vLLM and SGLang say of one request, and when they say nothing."""

from __future__ import annotations

from spdbench.types import DraftCounts
from spdbench_backends.openai.counters import drafts_between, parse_counters

SGLANG = """
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{model_name="m",tp_rank="0"} %d.0
sglang:num_requests_total{model_name="m"} %d.0
sglang:spec_accept_length{model_name="m"} 3.4
"""
VLLM = """
vllm:request_success_total{engine="0",finished_reason="stop"} %d
vllm:request_success_total{engine="0",finished_reason="length"} 5
vllm:spec_decode_num_drafts_total{engine="0"} %d
vllm:spec_decode_num_draft_tokens_total{engine="0"} %d
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 1.7e+01
"""


def test_sglangs_rounds_and_the_tokens_make_its_acceptance() -> None:
    before, after = (parse_counters(SGLANG % counts) for counts in ((10, 2), (16, 3)))
    assert after.engine == "SGLang"
    assert drafts_between(before, after, 21) == DraftCounts(rounds=6, judged=None, accepted=14)


def test_requests_of_all_kinds_are_counted_together() -> None:
    assert parse_counters(VLLM % (3, 1, 1)).requests == 8


def test_drafts_of_several_lengths_have_no_number_of_verdicts() -> None:
    before, after = (parse_counters(VLLM % counts) for counts in ((3, 10, 30), (4, 14, 39)))
    assert drafts_between(before, after, 9) == DraftCounts(rounds=4, judged=None, accepted=0)


def test_nothing_is_told_when_the_server_answered_none_or_two() -> None:
    for done in (10, 12):
        before, after = parse_counters(VLLM % (10, 0, 0)), parse_counters(VLLM % (done, 4, 12))
        assert drafts_between(before, after, 9) is None


def test_counters_that_began_anew_tell_nothing() -> None:
    before, after = parse_counters(VLLM % (10, 50, 150)), parse_counters(VLLM % (11, 4, 12))
    assert drafts_between(before, after, 9) is None


def test_text_of_another_kind_has_no_counters() -> None:
    for text in ("", "<html>", 'python_info{a="b"} 1', "vllm:spec_decode_num_drafts_total nonsense"):
        assert parse_counters(text).engine is None
