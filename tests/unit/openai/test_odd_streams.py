"""Streams that are framed, ended or counted in another way than usual: what came whole is measured, and said once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from spdbench.errors import BackendLostError, InputError, PromptFailedError, TryAgainError
from spdbench_backends.openai import endpoint
from spdbench_backends.openai.chunks import Chunk
from spdbench_backends.openai.counting import Counter
from spdbench_backends.openai.exchange import Exchange
from spdbench_backends.openai.transport.events import split_lines
from tests.stub_server import LAST, StubServer, event
from tests.unit.openai.conftest import Make
from tests.unit.openai.test_backend import ask, loaded, run
from tests.unit.openai.test_odd_servers import WHOLE

Events = Iterator[bytes]
ALONE = {1: 1, 3: 2, 4: 1, 7: 3, 8: 1}
"""The tokens of the stub's chunks, by those up to their end."""


def change(server: StubServer, how: Callable[[Any, Mapping[str, Any], Events], Events]) -> None:
    """Has the server send what `how` makes of the events of an answer."""
    original = server.events
    server.events = lambda handler, body: how(handler, body, original(handler, body))  # type: ignore[method-assign]


# Usage of each chunk alone.


def test_usage_of_each_chunk_alone_is_summed_where_the_whole_answer_confirms_it(
    server: StubServer, backend: Make
) -> None:
    server.offers = {"running_usage"}
    server.usage = lambda num_tokens: {"completion_tokens": ALONE[num_tokens]}  # type: ignore[method-assign]
    made = loaded(backend())
    measured = run(made)
    assert (measured.steps.emitted, len(measured.output_ids)) == ([1, 2, 1, 3, 1], 8)
    assert "of each chunk alone" in made.describe().chosen["tokens"]
    assert "times" not in made.describe().missing_measurements
    server.tokens = lambda body: []  # type: ignore[method-assign]  # noqa: ARG005
    for count in ("auto", "usage"):
        with pytest.raises(InputError, match=r"cannot be counted|does not report that"):
            backend(count=count).load()


def test_usage_of_one_token_in_each_chunk_is_not_that_of_the_answer(server: StubServer, backend: Make) -> None:
    server.offers, server.stated, server.answer = {"running_usage", "usage"}, 1, [(word,) for word in WHOLE.split()]
    measured = run(loaded(backend()))
    assert measured.steps.emitted == [1] * 6
    server.offers = {"running_usage"}
    assert run(loaded(backend(count="usage"))).steps.emitted == [1] * 6


# Bytes before the lines.


@pytest.mark.parametrize("content_type", ["text/event-stream", "text/plain"])
@pytest.mark.parametrize(
    "junk", [b"\0\0\0", b"\xef\xbb\xbf", b"\0\xef\xbb\xbf\0", b"\xef\xbb\xbf\xef\xbb\xbf\n\n", b"\0\n"]
)
def test_nul_bytes_and_byte_order_marks_before_lines_are_said_once(
    server: StubServer, backend: Make, junk: bytes, content_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content_type, server.frame = content_type, lambda data: junk + b"data: " + data + b"\n\n"
    made = loaded(backend())
    for _ in range(2):
        measured = run(made)
        assert (measured.report.text, len(measured.output_ids)) == (WHOLE, 8)
    assert capsys.readouterr().err.count("NUL bytes or byte order marks") == 1
    server.frame = lambda data: b"data: " + data + b"\n\n\0"
    assert run(made).report.text == WHOLE


# Usage that contradicts the tokens that are listed.


@pytest.mark.parametrize("offers", [{"ids", "usage"}, {"logprobs", "usage"}])
@pytest.mark.parametrize("stated", [5, 7, 10, 20])
def test_tokens_that_are_listed_count_where_usage_contradicts_them_and_it_is_said_once(
    server: StubServer, backend: Make, offers: set[Any], stated: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.offers = offers
    made, cut = loaded(backend()), loaded(backend())
    server.stated = stated
    for _ in range(2):
        measured = run(made)
        assert measured.steps.emitted == [1, 2, 1, 3, 1]
        assert measured.report.contradiction == f"8 listed, a usage of {stated}"
    said = capsys.readouterr().err
    assert said.count("NOTE") == said.count(f"the tokens that it lists count: 8 listed, a usage of {stated}") == 1
    change(server, lambda _handler, _body, events: (each.replace(b'"stop"', b'"length"') for each in events))
    with pytest.raises(PromptFailedError, match=rf"lists 8 tokens .* limit of 20 \(8 listed, a usage of {stated}\)"):
        run(made)
    server.stated = 2  # which comes behind the last token, where an answer is cut at the limit
    assert len(run(cut, ask(4)).output_ids) == 4
    assert "4 listed, a usage of 2" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["ids", "logprobs"])
def test_what_usage_contradicts_before_the_run_is_not_counted_by(
    server: StubServer, backend: Make, count: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.offers, server.stated = {count, "usage"}, 5
    words = "token ids" if count == "ids" else "log-probabilities, one a token,"
    assert "usage, reported at the end" in loaded(backend()).describe().chosen["tokens"]
    assert capsys.readouterr().err.count(r"contradict its usage (8 listed, a usage of 5)") == 1
    with pytest.raises(InputError, match=rf"the server's {words.rstrip(',')} contradict its usage"):
        backend(count=count).load()


@pytest.mark.parametrize(
    ("offers", "count"), [({"ids", "usage"}, 8), ({"logprobs", "running_usage", "usage"}, 8), ({"usage"}, 19)]
)
def test_a_usage_that_counts_the_prompt_as_answer_is_not_believed_against_what_is_listed(
    server: StubServer, backend: Make, offers: set[Any], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def usage(num_tokens: int) -> dict[str, int]:
        return {"prompt_tokens": 11, "completion_tokens": 11 + num_tokens, "total_tokens": 11 + num_tokens}

    server.offers, server.usage = offers, usage  # type: ignore[method-assign]
    made = loaded(backend())
    for _ in range(2):
        measured = run(made)
        assert len(measured.output_ids) == count
        assert measured.report.contradiction == "11 tokens of the prompt and 19 of the answer, 19 in all"
    words = f"contradicts itself, and {'the tokens that it lists count' if count == 8 else 'it may be wrong'}"
    said = capsys.readouterr().err
    assert said.count("NOTE") == said.count(words) == 1


# Events that are none of an answer's, and other words for its end.


@pytest.mark.parametrize(
    "data",
    [b"ping", b'"a string"', b"null", b"12", b"[ping]", b"2026-01-01 00:00:00", b'{"message": "queued", "code": 200}'],
)
def test_words_between_the_events_are_skipped_and_said_once(
    server: StubServer, backend: Make, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    server.inserted = [data]
    made = loaded(backend())
    assert run(made).report.text == run(made).report.text == WHOLE
    said = capsys.readouterr().err
    assert said.count("no part of an answer are skipped") == 1
    assert ("queued" if b"queued" in data else data.decode()) in said


@pytest.mark.parametrize(
    "data",
    [
        b"[ERROR] no room",
        b'{"message": "no room", "code": 503}',
        b"error: no room",
        b'[{"error": {"message": "no room", "code": 503}}]',
        b'\n\nerror: {"message": "no room", "code": 503}',  # a field of llama.cpp's own
    ],
)
def test_words_of_an_error_are_an_error(server: StubServer, backend: Make, data: bytes) -> None:
    made = loaded(backend())
    server.inserted = [data]
    with pytest.raises(PromptFailedError, match=r"failed in the middle of its answer: .*no room"):
        run(made)


def test_words_that_are_skipped_are_the_reason_if_nothing_else_comes(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.events = lambda *_: iter([b'{"message": "model is unloading"}'])  # type: ignore[method-assign]
    with pytest.raises(PromptFailedError, match="ended in the middle of its answer; it said: model is unloading"):
        run(made)


@pytest.mark.parametrize("last", [b"[done]", b"DONE", b"[DONE", b'"[DONE]"', b"\n\nevent: done\ndata:\n\n"])
def test_the_last_word_may_be_written_otherwise(server: StubServer, backend: Make, last: bytes) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        return (last if each == LAST else each.replace(b'"finish_reason"', b'"was"') for each in events)

    change(server, how)
    assert run(loaded(backend())).report.text == WHOLE


@pytest.mark.parametrize(
    ("word", "finish"),
    [("FINISH_REASON_STOP", "eos"), ("FinishReason.STOP", "eos"), ("FINISH_REASON_MAX_TOKENS", "length")],
)
def test_a_finish_reason_may_be_a_member_of_an_enumeration(
    server: StubServer, backend: Make, word: str, finish: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if finish == "length":
        server.answer = [*server.answer, *[(" more",)] * 12]
    named = b'"%b"' % word.encode()
    change(server, lambda _handler, _body, events: (each.replace(b'"length"', named) for each in events))
    assert run(loaded(backend())).finish_reason == finish
    assert "finish_reason" not in capsys.readouterr().err


@pytest.mark.parametrize("offers", [{"usage"}, {"ids", "usage"}, {"logprobs", "usage"}])
def test_the_only_usage_is_an_end_where_nothing_follows(
    server: StubServer, backend: Make, offers: set[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        return (each for each in events if each != LAST and b'"finish_reason"' not in each)

    server.offers = offers
    change(server, how)
    made = loaded(backend())
    assert (run(made).report.text, len(run(made).output_ids)) == (WHOLE, 8)
    assert capsys.readouterr().err.count("end without a finish_reason") == 1
    change(server, lambda _handler, _body, events: (each for each in events if b'"usage"' not in each))
    with pytest.raises(PromptFailedError, match="ended in the middle of its answer"):
        run(made)


@pytest.mark.parametrize("error", [{"code": 0, "message": ""}, {}, "", None, False])
def test_an_error_that_says_nothing_is_none(server: StubServer, backend: Make, error: Any) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        return (each if each == LAST else event({**json.loads(each), "error": error}) for each in events)

    change(server, how)
    assert run(loaded(backend())).report.text == WHOLE


def test_control_characters_in_a_text_are_a_part_of_it(server: StubServer, backend: Make) -> None:
    change(server, lambda _handler, _body, events: (each.replace(b" three", b" \x01\tthree") for each in events))
    assert run(loaded(backend())).report.text == WHOLE.replace(" three", " \x01\tthree")


@pytest.mark.parametrize("status", [100, 102, 103])
def test_interim_answers_are_none(server: StubServer, backend: Make, status: int) -> None:
    original = server.post

    def post(handler: Any) -> None:
        for _ in range(2):
            handler.wfile.write(b"HTTP/1.1 %d Wait\r\nLink: </x>\r\n\r\n" % status)
        original(handler)

    server.post = post  # type: ignore[method-assign]
    assert run(loaded(backend())).report.text == WHOLE


def test_a_finish_reason_may_be_an_object(server: StubServer, backend: Make) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        return (each.replace(b'"stop"', b'{"type": "abort"}') for each in events)

    made = loaded(backend())
    change(server, how)
    with pytest.raises(PromptFailedError, match="broke the answer off: abort"):
        run(made)


# What follows a whole answer.


@pytest.mark.parametrize("after", ["error", "nonsense", "lost", "open"])
@pytest.mark.parametrize("finish", [b'"stop"', b'"length"'])
def test_what_goes_wrong_after_a_whole_answer_changes_nothing_and_is_said_once(
    server: StubServer,
    backend: Make,
    after: str,
    finish: bytes,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "CLOSE_WAIT_S", 0.1)
    monkeypatch.setattr(endpoint, "USAGE_WAIT_S", 0.2)

    def how(handler: Any, _body: Any, events: Events) -> Events:
        for each in events:
            if each != LAST:
                yield each.replace(b'"stop"', finish)
        if after in ("error", "nonsense"):
            yield event({"error": {"message": "client gone"}}) if after == "error" else b"{"
        elif after == "open":
            server._released.wait(30)
        else:
            handler.connection.shutdown(2)

    if finish == b'"length"':
        server.answer = [*server.answer, *[(" more",)] * 12]
    change(server, how)
    made = loaded(backend(timeout_s="30"))
    for _ in range(2):
        measured = run(made)
        assert measured.finish_reason == ("eos" if finish == b'"stop"' else "length")
        assert str(measured.report.text).startswith(WHOLE)
    said = capsys.readouterr().err
    words = {"lost": "connections are lost", "open": "streams stay open"}.get(after, "follows its whole answers")
    assert said.count(words) == said.count("NOTE") == 1


def test_the_last_tokens_do_not_wait_for_the_end_of_the_stream() -> None:
    def chunks() -> Iterator[Chunk]:
        yield Chunk("a")
        yield Chunk("b", finish="stop", ends_answer=True)
        yield Chunk(completion_tokens=3, ends_answer=True)
        raise AssertionError("waited for")

    steps = Exchange(ask(20), timeout_s=1).steps(chunks(), Counter("usage", 20, whole=True))
    assert [len(next(steps).token_ids) for _ in range(2)] == [1, 2]


def test_a_finish_reason_in_each_chunk_is_no_end_to_rely_on(server: StubServer, backend: Make) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        first = b'[{"finish_reason": "length", "delta"'
        return (each.replace(b'"stop"', b'"length"').replace(b'[{"delta"', first) for each in events)

    made = loaded(backend())
    change(server, how)
    assert run(made).finish_reason == "eos"
    server.inserted = [b'{"error": "no room"}']
    with pytest.raises(PromptFailedError, match="no room"):
        run(made)


# Text that comes twice.

REPEATS = ["message", "delta and message", "delta", "delta, stripped", "behind the end", "so far", "message so far"]


@pytest.mark.parametrize("offers", [{"usage"}, {"ids", "usage"}, {"logprobs", "usage"}, {"timings", "usage"}])
@pytest.mark.parametrize("how", REPEATS)
def test_text_that_comes_twice_counts_once_and_is_said_once(
    server: StubServer, backend: Make, how: str, offers: set[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def again(_handler: Any, _body: Any, events: Events) -> Events:
        so_far = ""
        for each in events:
            content = {} if each == LAST else json.loads(each)
            for choice in content.get("choices", []):
                text, is_end = choice["delta"].get("content") or "", "finish_reason" in choice
                so_far += text
                if text and how.endswith("so far"):
                    choice["delta"]["content"] = so_far
                if how == "message so far":
                    choice["message"], choice["delta"] = choice["delta"], {"role": "assistant"}
                elif is_end and how == "delta, stripped":
                    choice["delta"] = {"content": f" {so_far}\n"}
                elif is_end and how in ("message", "delta"):
                    choice.pop("delta")
                    choice[how] = {"role": "assistant", "content": so_far}
                elif is_end and how == "delta and message":
                    choice["message"] = {"content": so_far, "reasoning_content": "Hm"}
            yield event(content) if content else each
            if how == "behind the end" and b"finish_reason" in each:
                yield event({"choices": [{"message": {"content": so_far}}]})

    server.offers = offers
    change(server, again)
    made = loaded(backend())
    for _ in range(2):
        measured = run(made)
        assert (measured.report.text, len(measured.output_ids), measured.finish_reason) == (WHOLE, 8, "eos")
    said = capsys.readouterr().err
    assert said.count("NOTE") == said.count("so far" if how.endswith("so far") else "as a whole at their end") == 1
    server.answer = [("No",), (", no",)]
    assert run(made).report.text == "No, no"


def test_text_that_only_looks_repeated_is_kept(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    for answer in (["no", "no", "nonono"], ["ha", "ha", "ha"], ["a", "ab", "c"], [" ", "  ", "   ", "return"]):
        server.answer = [(word,) for word in answer]
        assert run(made).report.text == "".join(answer)


# Refusals inside a stream.


@pytest.mark.parametrize("code", [{}, {"code": 400}, {"code": "invalid_parameter"}])
def test_a_refusal_inside_a_stream_has_another_way_of_counting_tried(
    server: StubServer, backend: Make, code: dict[str, Any]
) -> None:
    def how(_handler: Any, body: Mapping[str, Any], events: Events) -> Events:
        refused = {"return_token_ids", "logprobs", "timings_per_token"} & body.keys()
        if refused or "continuous_usage_stats" in body.get("stream_options", {}):
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            yield event({"error": {"message": f"{refused} not supported", **code}})
            yield LAST
        else:
            yield from events

    change(server, how)
    made = loaded(backend())
    assert "reported at the end" in made.describe().chosen["tokens"]
    assert run(made).report.text == WHOLE


def first_error(server: StubServer, **error: Any) -> None:
    server.events = lambda *_: iter([event({"error": {"message": "no", **error}})])  # type: ignore[method-assign]


def test_an_error_in_place_of_an_answer_is_what_its_status_says(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    for error, kind, words in (
        ({"code": 429}, TryAgainError, "429: no"),
        ({"code": "401"}, BackendLostError, "refuses the key"),
        ({"code": 400}, PromptFailedError, r"refuses the request \(400\)"),
        ({}, PromptFailedError, "fails instead of answering. It says: no"),
    ):
        first_error(server, **error)
        with pytest.raises(kind, match=words):
            run(made)
    with pytest.raises(InputError, match=r"the server fails instead of answering\. It says: no"):
        backend().load()


# Streams by other names and in other frames.


@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", None, "application/json"])
def test_a_stream_is_one_whatever_it_is_called(
    server: StubServer, backend: Make, content_type: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content_type = content_type
    made = loaded(backend())
    assert run(made).report.text == WHOLE
    assert capsys.readouterr().err.count("another content type") == 1


@pytest.mark.parametrize("content_type", ["application/x-ndjson", "text/event-stream", None])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_lines_of_json_are_a_stream_where_they_are_parts_of_an_answer(
    server: StubServer, backend: Make, content_type: str | None, api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content_type, server.frame = content_type, lambda data: data + b"\n"
    if api == "chat" or content_type == "application/x-ndjson":
        measured = run(loaded(backend(api=api)))
        assert (measured.report.text, len(measured.output_ids)) == (WHOLE, 8)
        assert capsys.readouterr().err.count("lines of JSON without `data:`") == 1
    else:
        with pytest.raises(InputError, match="at once instead of streaming"):
            backend(api=api).load()


def test_a_line_of_json_between_events_may_be_an_error(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.inserted = [b'\n\n{"error": {"message": "no room"}}']
    with pytest.raises(PromptFailedError, match="failed in the middle of its answer: no room"):
        run(made)


def test_streams_that_are_compressed_unasked_are_read_or_say_what_to_set(
    server: StubServer, backend: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    server.encoding = "gzip"
    measured = run(loaded(backend()))
    assert (measured.report.text, len(measured.output_ids)) == (WHOLE, 8)
    assert capsys.readouterr().err.count("its streams are compressed") == 1
    server.encoding = "br"
    with pytest.raises(InputError, match=r"compresses its answers \(br\).*switch that off in the server"):
        backend().load()


def pretty(data: bytes) -> bytes:
    lines = [data] if data == LAST else json.dumps(json.loads(data), indent=1).encode().split(b"\n")
    return b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


@pytest.mark.parametrize(
    "frame",
    [
        pretty,
        lambda data: b"data: " + data + b"\r\r",
        lambda data: b"data:" + data + b"\r\n\r\n",
        lambda data: b"data: " + data + b"\n",
        lambda data: b"data: data: " + data + b"\n\n",
        lambda data: b"id: 7\nevent: message\ndata: " + data + b"\nretry: 5\n\n",
    ],
    ids=["several lines of data", "CR", "CR LF", "no empty line", "data twice", "other fields"],
)
def test_events_are_read_in_any_frame(server: StubServer, backend: Make, frame: Callable[[bytes], bytes]) -> None:
    server.frame, server.offers = frame, {"ids", "usage"}
    measured = run(loaded(backend()))
    assert measured.steps.emitted == [1, 2, 1, 3, 1]
    assert measured.report.text == WHOLE


def test_a_line_ends_once_wherever_its_pieces_are_cut() -> None:
    text = b"one\r\n\r\ntwo\rthree\n\nfour"
    for size in range(1, len(text) + 1):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(split_lines(pieces)) == [b"one", b"", b"two", b"three", b"", b"four"]


def test_an_event_of_many_lines_has_an_end(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.inserted = [b"{" + b"\ndata: " + b"\ndata: ".join([b"x" * 2**23] * 3)]
    with pytest.raises(PromptFailedError, match="an event without end"):
        run(made)


@pytest.mark.parametrize("status", [201, 203])
def test_any_status_of_success_is_one(server: StubServer, backend: Make, status: int) -> None:
    server.status = status
    assert run(loaded(backend())).report.text == WHOLE


@pytest.mark.parametrize("place", ["x_groq", "delta", "0 before all", "behind the last word", "other names"])
def test_usage_is_read_in_places_of_its_own(server: StubServer, backend: Make, place: str) -> None:
    def how(_handler: Any, _body: Any, events: Events) -> Events:
        if place == "0 before all":
            yield b'{"choices": [], "usage": {"completion_tokens": 0}}'
        held = b""
        for each in events:
            if b'"usage"' not in each or place == "0 before all":
                yield each
            elif place == "behind the last word":
                held = each
            elif place == "other names":
                yield each.replace(b"completion_tokens", b"output_tokens").replace(b"prompt_tokens", b"input_tokens")
            elif place == "x_groq":
                yield b'{"choices": [], "x_groq": %b}' % each
            else:
                yield b'{"choices": [{"delta": %b}]}' % each
        if held:
            yield held
            yield b'{"error": "client gone"}'

    change(server, how)
    measured = run(loaded(backend(count="usage")))
    assert (len(measured.output_ids), measured.report.num_prompt_tokens) == (8, 11)


# Answers without text.


def test_tokens_without_any_text_cannot_be_timed(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.answer, server.stated = [("", "")], 12
    with pytest.raises(PromptFailedError, match="usage is 12 tokens, and its answer has no text"):
        run(made)


# Errors that are neither streamed nor a status.


def always(text: bytes) -> Callable[[bytes], bytes]:
    return lambda _: text


def test_an_error_with_a_status_of_success_gives_its_reason(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.content_type = "application/json"
    server.frame = lambda data: json.dumps(json.loads(data), indent=1).encode()
    for error, kind, words in (
        ({"code": 429}, TryAgainError, "429: no"),
        ({}, PromptFailedError, r"fails instead of answering\. It says: no"),
    ):
        first_error(server, **error)
        with pytest.raises(kind, match=words):
            run(made)
    server.events = lambda *_: iter([b'[{"error": {"message": "no", "code": 429}}]'])  # type: ignore[method-assign]
    with pytest.raises(TryAgainError, match="429: no"):
        run(made)
    server.events = lambda *_: iter([b'{"choices": [{"message": {"content": "One"}}]}'])  # type: ignore[method-assign]
    with pytest.raises(PromptFailedError, match="at once instead of streaming"):
        run(made)
    for content_type, text, words in (
        ("text/html", b"<!doctype html><title>Log in</title>", "neither a stream nor JSON, but text/html: Log in"),
        ("text/plain", b"Loading.", r"neither a stream nor JSON, but text/plain: Loading\."),
        ("text/event-stream", b"", "the server's answer has no content"),
    ):
        server.content_type, server.frame = content_type, always(text)
        server.events = lambda *_: iter([b""])  # type: ignore[method-assign]
        with pytest.raises(InputError, match=f"{words}; is it a server of OpenAI's protocol"):
            backend().load()
