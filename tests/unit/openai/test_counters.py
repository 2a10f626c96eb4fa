"""What counters of vLLM and SGLang say of one request, and when they say nothing."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from spdbench.types import DraftCounts
from spdbench_backends.openai.counters import Counters, drafts_between, parse_counters

SGLANG = {
    "spec_verify_calls": 10,
    "num_requests": 2,
    "generation_tokens": 100,
    "num_running_reqs": 0,
    "num_queue_reqs": 0,
}
VLLM = {
    "request_success": 10,
    "generation_tokens": 100,
    "num_requests_running": 0,
    "num_requests_waiting": 0,
    "spec_decode_num_drafts": 10,
    "spec_decode_num_draft_tokens": 30,
    "spec_decode_num_accepted_tokens": 17,
}
GAUGES = ("num_running_reqs", "num_queue_reqs", "num_requests_running", "num_requests_waiting")
ONE_REQUEST = {
    "request_success": 1,
    "generation_tokens": 9,
    "spec_decode_num_drafts": 4,
    "spec_decode_num_draft_tokens": 9,
    "spec_decode_num_accepted_tokens": 5,
}


def counters(engine: str, values: Mapping[str, int], moved: Mapping[str, int] | None = None) -> Counters:
    """`values` and what was added to them, as the engine shows it."""
    rows = {name: value + (moved or {}).get(name, 0) for name, value in values.items()}
    ending = {name: "" if name in GAUGES else "_total" for name in rows}
    lines = [f'{engine}:{name}{ending[name]}{{model_name="m"}} {value}.0' for name, value in rows.items()]
    return parse_counters("\n".join(["# TYPE nothing counter", *lines, f'{engine}:spec_accept_length{{a="b"}} 3.4']))


def vllm(moved: Mapping[str, int], num_new_tokens: int = 9) -> DraftCounts | None:
    return drafts_between(counters("vllm", VLLM), counters("vllm", VLLM, {**ONE_REQUEST, **moved}), num_new_tokens)


def sglang(moved: Mapping[str, int], num_new_tokens: int = 21) -> DraftCounts | None:
    one = {"spec_verify_calls": 6, "num_requests": 1, "generation_tokens": num_new_tokens}
    return drafts_between(counters("sglang", SGLANG), counters("sglang", SGLANG, {**one, **moved}), num_new_tokens)


def test_sglangs_rounds_and_the_tokens_make_its_acceptance() -> None:
    assert sglang({}) == DraftCounts(rounds=6, judged=None, accepted=14, source="SGLang's counters")


def test_sglang_may_still_show_our_own_request_as_running() -> None:
    assert sglang({"num_running_reqs": 1}) == sglang({})


@pytest.mark.parametrize(
    "moved",
    [
        {"spec_verify_calls": 0},  # no drafts at all, and yet 20 tokens that no round has made
        {"spec_verify_calls": 21},
        {"generation_tokens": 40},
        {"num_requests": 2},
        {"num_running_reqs": 2},
        {"num_queue_reqs": 1},
    ],
)
def test_sglangs_counters_that_are_not_of_this_request_alone_give_no_acceptance(moved: Mapping[str, int]) -> None:
    assert sglang(moved) is None


def test_requests_of_all_kinds_are_counted_together() -> None:
    text = 'vllm:request_success_total{finished_reason="%s"} %d\n'
    assert parse_counters(text % ("stop", 3) + text % ("length", 5)).requests == 8


def test_drafts_of_several_lengths_have_no_number_of_verdicts() -> None:
    assert vllm({}) == DraftCounts(4, None, 5, 9, source="vLLM's counters")


def test_what_is_accepted_beyond_the_answers_end_is_no_contradiction() -> None:
    found = vllm({"spec_decode_num_accepted_tokens": 8})
    assert found is not None
    assert (found.rounds, found.judged, found.accepted) == (4, None, 8)


def test_an_end_of_sequence_that_one_side_does_not_count_is_no_contradiction() -> None:
    assert vllm({}, num_new_tokens=8) == vllm({}, num_new_tokens=10) == vllm({})


@pytest.mark.parametrize(
    "moved",
    [
        {"request_success": 0},
        {"request_success": 2},
        {"num_requests_running": 1},
        {"num_requests_waiting": 1},
        {"generation_tokens": 11},
        {"spec_decode_num_drafts": 54, "spec_decode_num_draft_tokens": 162, "spec_decode_num_accepted_tokens": 104},
        {"spec_decode_num_draft_tokens": 40, "spec_decode_num_accepted_tokens": 40},
        {"spec_decode_num_accepted_tokens": 10},  # more than was drafted
        {"spec_decode_num_drafts": -6, "spec_decode_num_draft_tokens": -18, "spec_decode_num_accepted_tokens": -10},
    ],
)
def test_vllms_counters_that_are_not_of_this_request_alone_give_no_acceptance(moved: Mapping[str, int]) -> None:
    assert vllm(moved) is None


def test_a_request_that_ran_before_is_noticed() -> None:
    before = counters("vllm", VLLM, {"num_requests_running": 1})
    assert drafts_between(before, counters("vllm", VLLM, ONE_REQUEST), 9) is None


@pytest.mark.parametrize("missing", ["num_requests_running", "generation_tokens", "spec_decode_num_drafts"])
def test_without_the_counters_of_other_requests_there_is_no_acceptance(missing: str) -> None:
    kept = {name: value for name, value in VLLM.items() if name != missing}
    assert counters("vllm", kept).engine is None


def test_text_of_another_kind_has_no_counters() -> None:
    nonsense = ("nonsense", "1e999", "nan")
    for text in ("", "<html>", 'python_info{a="b"} 1', *(f"vllm:spec_decode_num_drafts_total {it}" for it in nonsense)):
        found = parse_counters(text)
        assert found.engine is None
        assert not found.values
