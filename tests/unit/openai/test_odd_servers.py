"""Servers that have words and habits of their own: what came whole is measured, and what is odd is said once."""

from __future__ import annotations

import datetime
import json
import ssl
from collections.abc import Iterator
from email.utils import format_datetime
from typing import Any

import pytest

from spdbench.errors import InputError, PromptFailedError, TryAgainError
from spdbench_backends.openai.streams import read_chunks
from spdbench_backends.openai.transport.address import parse_address
from spdbench_backends.openai.transport.errors import UnreachableError
from tests.stub_server import Refusal, StubServer, event
from tests.unit.openai.conftest import Make
from tests.unit.openai.test_backend import ask, clocked, loaded, run

WHOLE = "One two, three four five six."


def rewrite(server: StubServer, old: bytes, new: bytes) -> None:
    """Has the server send `new` for `old`."""
    original = server.events
    server.events = lambda *ask: (each.replace(old, new) for each in original(*ask))  # type: ignore[method-assign]


@pytest.mark.parametrize("word", ["eos_token", "stop_sequence", "EOS", "STOP", "End_Turn", "COMPLETE", "['done']"])
def test_an_end_by_any_name_is_an_end_and_a_strange_one_is_said_once(
    server: StubServer, backend: Make, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(server, b'"stop"', b'"%b"' % word.encode())
    made = loaded(backend())
    for _ in range(2):
        measured = run(made)
        assert (measured.finish_reason, measured.report.text) == ("eos", WHOLE)
    strange = word in ("COMPLETE", "['done']")
    assert capsys.readouterr().err.count(f"finish_reason {word.lower()!r}") == strange


@pytest.mark.parametrize("word", [b'"null"', b'"None"', b'"not_finished"', b'"generating"', b'""'])
def test_a_finish_reason_from_the_first_chunk_on_is_none(server: StubServer, backend: Make, word: bytes) -> None:
    rewrite(server, b'"choices": [{"delta"', b'"choices": [{"finish_reason": %b, "delta"' % word)
    assert run(loaded(backend())).finish_reason == "eos"
    server.fault = "no_end"
    with pytest.raises(PromptFailedError, match="ended in the middle of its answer"):
        run(loaded_again(server, backend))


def loaded_again(server: StubServer, backend: Make) -> Any:
    """The backend, loaded while the server has no fault."""
    fault, server.fault = server.fault, None
    made = loaded(backend())
    server.fault = fault
    return made


def test_done_without_a_finish_reason_ends_an_answer(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(server, b'"finish_reason"', b'"was"')
    made = loaded(backend())
    assert run(made).report.text == run(made).report.text == WHOLE
    assert run(made, ask(3)).finish_reason == "length"
    assert capsys.readouterr().err.count("without a finish_reason") == 1


@pytest.mark.parametrize(
    "lines",
    [b"", b": still at it", b'\n\nevent: ping\ndata: {"type": "ping"}', b"\n\n: a comment\n\nid: 7\nretry: 100"],
    ids=["empty", "comment as data", "ping", "fields"],
)
def test_signs_of_life_are_no_part_of_an_answer(server: StubServer, backend: Make, lines: bytes) -> None:
    server.inserted = [lines]
    assert run(loaded(backend())).report.text == WHOLE


def test_an_empty_answer_fails_for_the_reason_that_it_is_empty(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.answer = []
    with pytest.raises(PromptFailedError, match="answer is empty; its finish_reason is stop"):
        run(made)


@pytest.mark.parametrize(
    "place", ["with the finish", "in the choice", "before the text", "and zero behind it"], ids=lambda place: place
)
def test_usage_is_read_wherever_it_is(server: StubServer, backend: Make, place: str) -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 8}
    zero = {"completion_tokens": 0}

    def events(*_: Any) -> Iterator[bytes]:
        text, end = {"delta": {"content": WHOLE}}, {"delta": {}, "finish_reason": "stop"}
        yield event({"choices": [text], **({"usage": usage} if place == "before the text" else {})})
        if place == "in the choice":
            yield event({"choices": [{**end, "usage": usage}]})
        else:
            yield event({"choices": [end], **({} if place == "before the text" else {"usage": usage})})
        if place == "and zero behind it":
            yield event({"choices": [], "usage": zero})
        yield b"[DONE]"

    server.events = events  # type: ignore[method-assign,assignment]
    measured = run(loaded(backend(count="usage")))
    assert (len(measured.output_ids), measured.report.num_prompt_tokens) == (8, 11)


@pytest.mark.parametrize(
    ("delta", "thought"),
    [
        ({"reasoning_content": "Hm"}, True),
        ({"reasoning": "Hm", "content": None}, True),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]}, True),
        ({"content": [{"type": "text", "text": "<think>Hm"}]}, False),
        ({"content": "<think>Hm"}, False),
        ({"content": "\n<think>Hm"}, False),
        ({"content": "Hm</think>"}, False),
    ],
)
def test_thoughts_count_as_tokens_and_only_those_set_apart_are_no_answer(
    server: StubServer, backend: Make, delta: dict[str, Any], thought: bool
) -> None:
    def events(*_: Any) -> Iterator[bytes]:
        yield event({"choices": [{"delta": delta}]})
        yield event({"choices": [{"delta": {"content": " Yes."}, "finish_reason": "stop"}]})
        details = {"reasoning_tokens": 1}
        yield event({"usage": {"completion_tokens": 3, "completion_tokens_details": details}, "choices": []})
        yield b"[DONE]"

    server.events = events  # type: ignore[method-assign,assignment]
    measured = run(loaded(backend(count="usage")))
    assert len(measured.output_ids) == 3
    assert measured.report.text is not None
    assert ("Hm" in measured.report.text) != thought


def test_a_usage_that_counts_thoughts_apart_is_of_both(server: StubServer, backend: Make) -> None:
    """As xAI's. Without them, the rate would have been that of the answer's few tokens in the time of all."""

    def events(*_: Any) -> Iterator[bytes]:
        for word in ("Hm", ",", " so", " be", " it"):
            yield event({"choices": [{"delta": {"reasoning_content": word}}]})
        yield event({"choices": [{"delta": {"content": "Yes."}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 18}
        yield event({"usage": {**usage, "completion_tokens_details": {"reasoning_tokens": 5}}, "choices": []})
        yield b"[DONE]"

    server.events = events  # type: ignore[method-assign,assignment]
    measured = run(loaded(backend()))
    assert (len(measured.output_ids), measured.report.contradiction) == (7, None)


def test_thoughts_that_are_kept_back_cannot_be_timed(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    rewrite(
        server, b'"completion_tokens":', b'"completion_tokens_details": {"reasoning_tokens": 5}, "completion_tokens":'
    )
    for request in (ask(), ask(8)):
        with pytest.raises(PromptFailedError, match="5 tokens are thoughts that the server keeps to itself"):
            run(made, request)


def test_a_character_in_two_chunks_is_one(server: StubServer, backend: Make) -> None:
    server.answer = [("\ud83d",), ("\ude00 fine",)]
    assert run(loaded(backend())).report.text == "\N{GRINNING FACE} fine"


def test_half_a_byte_sequence_does_not_fail_the_answer(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    rewrite(server, b" three", b" thr\xc3")
    assert run(made).report.text == "One two, thr\ufffd four five six."


def test_a_long_prefill_names_the_option(server: StubServer, backend: Make) -> None:
    server.fault = "nothing_said"
    with pytest.raises(InputError, match=r"only kept the connection alive for 0\.3 s.*raise timeout_s$"):
        backend(timeout_s="0.3").load()
    server.fault = "silent"
    with pytest.raises(InputError, match=r"said nothing for 0\.3 s; .*raise timeout_s$"):
        backend(timeout_s="0.3").load()


def test_a_wait_may_be_a_fraction_or_more_than_a_minute(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = loaded(backend())
    soon = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=80), usegmt=True)
    for text, low, high in (("7.5", 7.5, 7.5), ("60", 60, 60), (soon, 70, 80)):
        server.refusals = [Refusal(429, "slow down", {"Retry-After": text})]
        made.prepare(ask())
        with pytest.raises(TryAgainError) as later:
            clocked(made, ask())
        assert low <= later.value.wait_s <= high
    assert "asks to wait, for 60 s" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"f" * 18 + b"\r\nx", b"-5\r\nx", b"9" * 5000 + b"\r\n"])
def test_sizes_that_cannot_be_are_a_lost_connection(server: StubServer, backend: Make, answer: bytes) -> None:
    made = loaded(backend())
    server.write = lambda handler, _: handler.wfile.write(answer) and None  # type: ignore[method-assign,assignment]
    with pytest.raises(PromptFailedError, match="the connection was lost in the middle of the answer"):
        run(made)


def test_addresses_have_names_and_paths_of_any_script() -> None:
    assert parse_address(" http://b\u00fccher.example:8000/v1/\u00e9 x/ ").path == "/v1/%C3%A9%20x"
    assert parse_address("https://[::1]/v1").host == "::1"


def test_a_certificate_that_is_not_trusted_names_what_to_set() -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    for code, remedy in ((18, "SSL_CERT_FILE"), (10, "renew"), (62, "by a name that the certificate holds")):
        error.verify_code, error.verify_message = code, "of its own"
        unreachable = UnreachableError(error)
        assert remedy in unreachable.remedy
        assert "certificate is not trusted: of its own" in str(unreachable)
    assert "begins with http://" in UnreachableError(ssl.SSLError(1, "wrong version number")).remedy


def test_a_proxy_that_is_not_used_is_named_where_the_server_is_not_reached(
    backend: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://user:planted@proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(InputError, match="proxy of the environment is not used") as caught:
        backend(base_url="http://127.0.0.1:1/v1").load()
    assert "planted" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"correct the address\.$"):
        backend(base_url="http://127.0.0.1:1/v1").load()


def text_of(*events: dict[str, Any]) -> tuple[str, str]:
    lines = [b"data: " + json.dumps(each).encode() for each in events]
    chunks = list(read_chunks([*lines, b"data: [DONE]"], str, lambda *_: None, set()))
    return "".join(chunk.text for chunk in chunks), "".join(chunk.thought for chunk in chunks)


def test_text_is_read_wherever_servers_put_it() -> None:
    plain = {"choices": [{"index": 0, "delta": {"content": "One"}}]}
    assert text_of({"choices": [{"message": {"content": "One"}}]}) == ("One", "")
    assert text_of(plain, {"choices": [{"delta": {}, "message": {"content": "One"}}]}) == ("One", "")
    assert text_of({"choices": [{"delta": {"refusal": "No"}}]}) == ("No", "")
    assert text_of({"choices": [{"index": 1, "delta": {"content": "Two"}}]}, plain) == ("One", "")
    assert text_of({"choices": [{"index": "0", "delta": {"content": "One"}}]}) == ("One", "")
    assert text_of({"choices": [{"delta": {"content": "", "thinking": "Hm"}}]}, plain) == ("One", "Hm")


@pytest.mark.parametrize("word", ["tool_calls", "SAFETY", "content_filter"])
def test_an_end_that_is_none_of_the_answer_fails_it(server: StubServer, backend: Make, word: str) -> None:
    rewrite(server, b'"stop"', b'"%b"' % word.encode())
    made = backend()
    with pytest.raises((PromptFailedError, InputError), match=word.lower()):
        run(loaded(made))


@pytest.mark.parametrize("call", [{"tool_calls": [{"index": 0}]}, {"function_call": {"name": "f"}}])
@pytest.mark.parametrize("word", [b"stop", b"tool_calls"])
def test_a_call_of_a_tool_is_no_answer_whatever_it_ends_with(
    server: StubServer, backend: Make, call: dict[str, Any], word: bytes
) -> None:
    """Of its tokens no text comes, so they would have been counted as if they came with the answer's last text."""
    made = loaded(backend())
    rewrite(server, b'"stop"', b'"%b"' % word)
    server.inserted = [event({"choices": [{"delta": call}]})]
    with pytest.raises(PromptFailedError, match=next(iter(call))):
        run(made)


def test_calls_with_nothing_in_them_are_none(server: StubServer, backend: Make) -> None:
    nothing = b'"tool_calls": [], "function_call": {"name": "", "arguments": ""}, "content"'
    rewrite(server, b'"content"', nothing)
    assert run(loaded(backend())).report.text == WHOLE


@pytest.mark.parametrize(
    "fault",
    [
        {"choices": [{"delta": {}, "finish_reason": {"type": "abort", "message": "no room"}}]},
        {"errors": [{"message": "no room"}]},
        {"choices": [], "errors": [{"message": "no room"}]},
        {"detail": [{"loc": ["body"], "msg": "no room"}]},
    ],
)
def test_the_reason_of_a_break_is_reported_in_whatever_form_it_comes(
    server: StubServer, backend: Make, fault: dict[str, Any]
) -> None:
    """An error that went unnoticed would leave a part of an answer that `[DONE]` ends."""
    made = loaded(backend())
    rewrite(server, b'"finish_reason"', b'"was"')
    server.inserted = [event(fault)]
    with pytest.raises(PromptFailedError, match=r"in the middle of its answer: .*no room"):
        run(made)


def test_an_abort_that_names_the_status_of_a_busy_server_may_pass(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    end = {"type": "abort", "message": "overloaded", "status_code": 503}
    server.inserted = [event({"choices": [{"delta": {}, "finish_reason": end}]})]
    with pytest.raises(PromptFailedError) as failed:
        run(made)
    assert failed.value.is_transient


@pytest.mark.parametrize("data", [b"{}", b'""', b"null", b"true"])
def test_events_that_say_nothing_are_no_part_of_an_answer(server: StubServer, backend: Make, data: bytes) -> None:
    server.inserted = [data]
    assert run(loaded(backend())).report.text == WHOLE


def test_a_redirect_says_where_to(server: StubServer, backend: Make) -> None:
    server.refusals = [Refusal(308, "", {"Location": "https://example.test/v1/chat/completions"})]
    with pytest.raises(InputError, match=r"redirects \(308\) to https://example\.test/v1/chat/completions; give"):
        backend(retries="0").load()


def test_an_address_that_takes_no_requests_is_named_as_such(server: StubServer, backend: Make) -> None:
    server.refusals = [Refusal(405, '{"detail": "Method Not Allowed"}')] * 9
    with pytest.raises(InputError, match=r"nothing at this address \(405\)"):
        backend().load()


def test_a_limit_is_asked_for_by_the_name_that_the_server_takes(server: StubServer, backend: Make) -> None:
    """As OpenAI's models since 2024."""
    objection = server.objection

    def refuse(handler: Any, body: Any) -> Refusal | None:
        if "max_tokens" in body:
            return Refusal(400, '{"error": {"message": "Use \'max_completion_tokens\' instead."}}')
        body["max_tokens"] = body["max_completion_tokens"]
        return objection(handler, body)

    server.objection = refuse  # type: ignore[method-assign]
    made = loaded(backend())
    measured = run(made, ask(4))
    assert (len(measured.output_ids), measured.finish_reason) == (4, "length")


@pytest.mark.parametrize(
    "own",
    [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "One"}},
        {"type": "response.output_text.delta", "delta": "One"},
        {"content": "One", "stop": False},
        {"token": {"id": 1, "text": "One"}, "generated_text": None},
    ],
)
def test_a_stream_of_another_protocol_is_shown(server: StubServer, backend: Make, own: dict[str, Any]) -> None:
    server.events = lambda *_: iter([event(own), event(own)])  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"no event of OpenAI's protocol; it begins with \{.*One.*; is it a server of"):
        backend().load()


@pytest.mark.parametrize("place", ["prompt_cache_hit_tokens", "cached_tokens"])
def test_a_prompt_cache_is_read_where_other_servers_report_it(server: StubServer, backend: Make, place: str) -> None:
    rewrite(server, b'"prompt_tokens": 11', b'"prompt_tokens": 11, "%b": 7' % place.encode())
    assert run(loaded(backend())).report.num_cached_tokens == 7
