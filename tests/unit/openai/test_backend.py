"""The openai backend against a server that behaves, and against one that does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spdbench.backend import Backend, parse_options
from spdbench.errors import BackendLostError, InputError, PromptFailedError, TryAgainError
from spdbench.measure.clock import Measurement, measure
from spdbench.types import UNKNOWN_ID, GenerationRequest, Sampling
from spdbench_backends.openai import exchange as exchanges
from spdbench_backends.openai.backend import OpenAI
from spdbench_backends.openai.chunks import Chunk
from spdbench_backends.openai.counting import Counter
from tests.stub_server import Fault, Offer, Refusal, StubServer
from tests.unit.openai.conftest import Make, context

KEY = "sk-very-secret-0123456789"
PAGE = "<!doctype html><html><head><title>\n524: A timeout occurred </title></head><body>...</body></html>"
MESSAGES = ({"role": "user", "content": "Count."},)


def ask(max_new_tokens: int = 20, sampling: Sampling | None = None) -> GenerationRequest:
    return GenerationRequest((1, 2, 3), MESSAGES, max_new_tokens, sampling or Sampling(), 2**40 + 7, frozenset())


def run(backend: OpenAI, request: GenerationRequest | None = None) -> Measurement:
    request = request or ask()
    backend.prepare(request)
    return clocked(backend, request)


def clocked(backend: OpenAI, request: GenerationRequest) -> Measurement:
    return measure(cast(Backend, backend), request)


def loaded(backend: OpenAI) -> OpenAI:
    backend.load()
    return backend


@pytest.mark.parametrize(
    ("offers", "emitted", "words", "unknown"),
    [
        ({"ids", "usage"}, [1, 2, 1, 3, 1], "token ids", {"drafts", "forwards", "devices"}),
        ({"running_usage", "usage"}, [1, 2, 1, 3, 1], "with each chunk", {"drafts", "forwards", "devices", "ids"}),
        ({"usage"}, [1, 7], "at the end", {"drafts", "forwards", "devices", "ids", "times"}),
        ({"logprobs"}, [1, 2, 1, 3, 1], "log-probabilities", {"drafts", "forwards", "devices", "ids"}),
        ({"logprobs", "usage"}, [1, 2, 1, 3, 1], "log-probabilities", {"drafts", "forwards", "devices", "ids"}),
    ],
)
def test_tokens_are_counted_by_the_best_that_the_server_reports(
    server: StubServer, backend: Make, offers: set[Offer], emitted: list[int], words: str, unknown: set[str]
) -> None:
    server.offers = offers
    made = loaded(backend())
    measured = run(made)
    assert measured.steps.emitted == emitted
    assert (len(measured.output_ids), measured.finish_reason) == (8, "eos")
    assert measured.report.text == "One two, three four five six."
    info = made.describe()
    assert words in info.chosen["tokens"]
    assert set(info.missing_measurements) == unknown
    assert (UNKNOWN_ID in measured.output_ids) == ("ids" in unknown)


def test_chunks_are_counted_only_where_the_servers_usage_agrees(server: StubServer, backend: Make) -> None:
    server.offers, server.refuses = set(), {"return_token_ids", "logprobs", "stream_options"}
    server.answer = [("One",), (" two",), (" three",)]
    made = loaded(backend())
    assert "one token a chunk" in made.describe().chosen["tokens"]
    assert run(made).steps.emitted == [1, 1, 1]
    server.answer = [("One", " two"), (" three",)]
    with pytest.raises(InputError, match="its tokens cannot be counted"):
        backend().load()


def test_a_way_of_counting_that_was_asked_for_is_used_or_refused(server: StubServer, backend: Make) -> None:
    server.offers = {"ids", "usage", "logprobs"}
    assert "log-probabilities" in loaded(backend(count="logprobs")).describe().chosen["tokens"]
    server.offers = {"usage"}
    with pytest.raises(
        InputError, match=r"-o openai\.count=ids: the server does not report that\. Others: auto, usage"
    ):
        backend(count="ids").load()


def test_a_server_that_refuses_ids_still_reports_usage_with_each_chunk(server: StubServer, backend: Make) -> None:
    """As SGLang does in a chat."""
    server.offers, server.refuses = {"running_usage", "usage", "logprobs"}, {"return_token_ids"}
    made = loaded(backend())
    assert "usage, reported with each chunk" in made.describe().chosen["tokens"]
    assert run(made).steps.emitted == [1, 2, 1, 3, 1]
    assert "return_token_ids" not in server.asked[-1]
    assert "logprobs" not in server.asked[-1]


def test_log_probabilities_do_not_cost_the_prompts_length(server: StubServer, backend: Make) -> None:
    server.offers = {"logprobs", "usage"}
    assert run(loaded(backend())).report.num_prompt_tokens == 11
    server.refuses = {"stream_options"}
    assert "log-probabilities" in loaded(backend()).describe().chosen["tokens"]


def test_usage_that_is_the_whole_answers_from_the_first_chunk_on_gives_no_times(
    server: StubServer, backend: Make
) -> None:
    server.offers, server.stated = {"running_usage", "usage"}, 8
    assert "reported at the end" in loaded(backend()).describe().chosen["tokens"]


def test_an_end_of_sequence_counts_where_the_server_counts_it(server: StubServer, backend: Make) -> None:
    server.offers, server.counts_end = {"ids", "usage"}, True
    measured = run(loaded(backend()))
    assert measured.output_ids == (*range(100, 108), 2)
    assert measured.finish_reason == "eos"


@pytest.mark.parametrize("offers", [{"logprobs", "usage"}, {"timings", "usage"}, {"usage"}, {"running_usage", "usage"}])
def test_an_end_that_only_the_usage_includes_counts_whichever_way_tokens_are_counted(
    server: StubServer, backend: Make, offers: set[Offer]
) -> None:
    server.offers, server.stated = offers, 9
    assert len(run(loaded(backend())).output_ids) == 9


def test_timings_of_llamacpp_report_each_token_and_cost_the_server_nothing(server: StubServer, backend: Make) -> None:
    server.offers = {"timings", "usage", "logprobs"}
    made = loaded(backend())
    assert "llama.cpp's timings, reported with each chunk" in made.describe().chosen["tokens"]
    assert run(made).steps.emitted == [1, 2, 1, 3, 1]
    assert "times" not in made.describe().missing_measurements
    assert server.asked[-1]["timings_per_token"]
    assert "logprobs" not in server.asked[-1]


def test_log_probabilities_with_ids_give_the_ids(server: StubServer, backend: Make) -> None:
    server.offers, server.lists_ids = {"logprobs", "usage"}, True
    made = loaded(backend(count="logprobs"))
    assert made.describe().knows_ids
    assert run(made).output_ids == tuple(range(100, 108))


def test_the_limit_ends_an_answer_and_the_rest_is_still_heard(server: StubServer, backend: Make) -> None:
    server.offers = {"ids", "usage"}
    measured = run(loaded(backend()), ask(4))
    assert (len(measured.output_ids), measured.finish_reason) == (4, "length")
    assert measured.report.num_prompt_tokens == 11


def test_what_is_asked_is_what_was_meant(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    run(made)
    greedy = server.asked[-1]
    assert (greedy["temperature"], greedy["max_tokens"], greedy["stream"]) == (0.0, 20, True)
    assert "top_p" not in greedy
    assert greedy["messages"] == [{"role": "user", "content": "Count."}]
    run(made, ask(20, Sampling(0.7, top_p=0.9, top_k=5)))
    warm = server.asked[-1]
    assert (warm["temperature"], warm["top_p"], warm["top_k"], warm["seed"]) == (0.7, 0.9, 5, 7 + 2**40 % 2**31)


class Words:
    """A tokenizer that knows one word."""

    bos_token_id = 1

    def encode(self, _text: str) -> list[int]:
        return [1, 5]

    def decode(self, ids: tuple[int, ...]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize(("takes_ids", "prompt"), [(True, [1, 2, 3]), (False, "2 3")])
def test_completions_get_ids_where_the_server_takes_them_and_text_without_its_bos_elsewhere(
    server: StubServer, takes_ids: bool, prompt: object
) -> None:
    server.takes_ids = takes_ids
    options = parse_options("o", OpenAI.Options, {"base_url": server.url, "model": "stub", "api": "completions"})
    made = OpenAI(options, context(Words()))
    made.load()
    assert made.describe().chosen["prompt"] == ("ids" if takes_ids else "text")
    assert run(made).finish_reason == "eos"
    assert server.asked[-1]["prompt"] == prompt


def test_the_only_model_need_not_be_named_where_m_names_it(server: StubServer, backend: Make) -> None:
    made = OpenAI(parse_options("openai", OpenAI.Options, {"base_url": server.url}), context(Words()))
    assert run(loaded(made)).finish_reason == "eos"
    with pytest.raises(InputError, match=r"-o openai\.model=NAME; the server has stub$"):
        backend(model="").load()
    server.models = ("stub", "other")
    with pytest.raises(InputError, match=r"-o openai\.model=NAME; the server has stub, other"):
        backend(model="").load()


# What goes wrong before the run.


def test_no_server_there_is_one_message(backend: Make) -> None:
    with pytest.raises(InputError, match=r"base_url: no server answers at 127\.0\.0\.1:1 .*start it"):
        backend(base_url="http://127.0.0.1:1/v1").load()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://me:hunter2@x/v1",
        "http://x/v1?key=hunter2",
        "http://my host/v1",
        "http://a\x01b/v1",
        "http://host..example/v1",
        f"http://{'h' * 64}/v1",
        f"http://x:{'9' * 5000}/v1",
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(backend: Make, url: str) -> None:
    with pytest.raises(InputError, match="base_url") as caught:
        backend(base_url=url).load()
    assert "hunter2" not in str(caught.value)


def test_a_server_is_needed() -> None:
    options = parse_options("openai", OpenAI.Options, {})
    with pytest.raises(InputError, match=r"-o openai\.base_url=http://HOST:PORT/v1"):
        OpenAI(options, context()).load()


def test_a_wrong_key_is_one_message_that_does_not_show_it(
    server: StubServer, backend: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sk-right"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InputError, match=r"refuses the key \(401\).*OPENAI_API_KEY") as caught:
        backend().load()
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right\n")
    assert run(loaded(backend())).finish_reason == "eos"


def test_a_key_that_no_header_can_hold_is_refused(backend: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nx")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        backend().load()
    assert "sk-" not in str(caught.value)


def test_neither_key_nor_address_is_among_the_options_of_a_result(
    backend: Make, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = loaded(backend())
    kept = str(made._options.model_dump(mode="json")) + str(made.describe())
    assert KEY not in kept
    assert server.url not in kept
    assert sha256(server.url.encode()).hexdigest()[:8] not in kept
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stub: setattr(stub, "model", "else"), r"model=stub: the server has no such model.*does not exist"),
        (lambda stub: setattr(stub, "fault", "no_stream"), "answers at once instead of streaming"),
        (lambda stub: setattr(stub, "context", 10), r"context is too small \(400\).*larger one"),
        (lambda stub: setattr(stub, "refusals", [Refusal(302, "", {"Location": "/"})]), "the server redirects"),
        (
            lambda stub: setattr(stub, "refusals", [Refusal(429, "You exceeded your quota", {"Retry-After": "0"})] * 9),
            r"takes no more requests for now \(429\).*It says: You exceeded",
        ),
        (lambda stub: setattr(stub, "refusals", [Refusal(501)] * 9), r"the server failed \(501\); its log says why\.$"),
        (
            lambda stub: setattr(stub, "refusals", [Refusal(529, "", {"Retry-After": "0"})] * 9),
            r"the server is overloaded, or not ready yet \(529\); wait,",
        ),
        (
            lambda stub: setattr(stub, "refusals", [Refusal(524, PAGE, {"Retry-After": "0"})] * 9),
            r"in front of the server gets no answer from it in time \(524\).* It says: 524: A timeout occurred$",
        ),
        (lambda stub: setattr(stub, "refusals", [Refusal(418)]), r"refuses the request \(418\); it gives no reason"),
        (lambda stub: setattr(stub, "refusals", [Refusal(407)]), r"a proxy before the server .*\(407\).*base_url\.$"),
        (lambda stub: setattr(stub, "fault", "malformed"), "not a part of an answer"),
        (lambda stub: setattr(stub, "answer", []), "answer to a short question has no text, .* cannot be counted"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_message(
    server: StubServer, backend: Make, change: Callable[[StubServer], None], message: str
) -> None:
    change(server)
    with pytest.raises(InputError, match=message) as caught:
        backend().load()
    assert "\n" not in str(caught.value)


# What goes wrong in the middle of a run.


@pytest.mark.parametrize(
    ("fault", "message", "may_pass"),
    [
        ("die", "in the middle of", True),
        ("stall", "said nothing for 1 s in the middle", True),
        ("silent", "said nothing for 1 s", True),
        ("malformed", "not a part of an answer", False),
        ("error", "failed in the middle of its answer: out of memory", False),
        ("no_end", "ended in the middle", True),
        ("cut", "ended in the middle", True),
        ("endless_line", "a line without end", False),
        ("dribble", "only kept the connection alive for 1 s in the middle.*raise timeout_s", True),
        ("nothing_said", "only kept the connection alive for 1 s in the middle.*raise timeout_s", True),
    ],
)
def test_an_answer_that_breaks_off_is_a_failed_prompt_and_the_next_one_is_fine(
    server: StubServer, backend: Make, fault: Fault, message: str, may_pass: bool
) -> None:
    made = loaded(backend(timeout_s="1"))
    server.fault = fault
    started = time.monotonic()
    with pytest.raises(PromptFailedError, match=message) as caught:
        run(made)
    assert caught.value.is_transient == may_pass
    assert time.monotonic() - started < 5
    server.fault = None
    assert run(made).finish_reason == "eos"


def test_usage_that_fails_to_come_is_a_failed_prompt(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.offers = set()
    with pytest.raises(PromptFailedError, match="reported no usage"):
        run(made)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (30_000_000, "reports 30000000 tokens, and was asked for 20 at most"),
        (22, "reports 22 tokens"),
        (1, "usage is 1 tokens, and its answer came in 5 chunks"),
        (0, "usage is 0 tokens"),
    ],
)
@pytest.mark.parametrize("offers", [{"usage"}, {"running_usage", "usage"}])
def test_usage_that_cannot_be_true_is_a_failed_prompt(
    server: StubServer, backend: Make, offers: set[Offer], stated: int, message: str
) -> None:
    server.offers = offers
    made = loaded(backend())
    server.stated = stated
    with pytest.raises(PromptFailedError, match=message):
        run(made)


def test_usage_is_believed_of_a_server_whose_chunks_are_parts_of_tokens(server: StubServer, backend: Make) -> None:
    server.stated = 2
    assert len(run(loaded(backend())).output_ids) == 2


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b"[" * 100_000, "not a part of an answer"),
        (b"[]", "not a part of an answer"),
        (b'{"choices": [{"delta": {}, "finish_reason": "Content_Filter"}]}', "broke the answer off: content_filter"),
        (b'{"choices": [{"delta": {}, "error": {"message": "no\\nroom"}}]}', "in the middle of its answer: no room"),
        (b'{"object": "error", "message": "no room", "code": 500}', "in the middle of its answer: no room"),
        (b'{"type": "error", "error": "no room"}', "in the middle of its answer: no room"),
        (b'{"detail": "no room"}', "in the middle of its answer: no room"),
        (b"\n\nevent: error\ndata: no room", "in the middle of its answer: no room"),
    ],
)
def test_an_event_that_means_nothing_is_a_failed_prompt(
    server: StubServer, backend: Make, event: bytes, message: str
) -> None:
    made = loaded(backend())
    server.inserted = [event]
    with pytest.raises(PromptFailedError, match=message) as caught:
        run(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": [{"delta": {"content": ""}, "finish_reason": ""}]}',
        b'{"choices": [{"delta": {"content": ""}}], "error": null}',
        b'{"choices": null, "usage": null}',
    ],
)
def test_what_is_empty_is_as_good_as_absent(server: StubServer, backend: Make, event: bytes) -> None:
    made = loaded(backend())
    server.inserted = [event]
    assert run(made).report.text == "One two, three four five six."


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (b'{"choices": [], "usage": {"completion_tokens": 1e999}}', "completion_tokens"),
        (b'{"choices": [], "usage": {"completion_tokens": -5}}', "completion_tokens"),
        (b'{"choices": [], "usage": {"completion_tokens": true, "prompt_tokens": 11}}', "completion_tokens"),
        (b'{"choices": [], "usage": {"prompt_tokens": -1}}', "prompt_tokens"),
        (b'{"choices": [], "usage": {"prompt_tokens": [7]}}', "prompt_tokens"),
        (b'{"choices": [], "usage": {"completion_tokens_details": 7}}', "completion_tokens_details"),
        (b'{"choices": [], "usage": "many"}', "usage"),
        (b'{"choices": [null]}', "choices"),
        (b'{"choices": {"delta": {}}}', "choices"),
        (b'{"choices": 7}', "choices"),
        (b'{"choices": [{"delta": "x"}]}', "delta"),
        (b'{"choices": [{"index": 1, "delta": {"content": "Two"}}]}', "choice with an index of 1 or more"),
        (b'{"choices": [{"delta": {}, "token_ids": [1e999]}]}', "token_ids"),
        (b'{"choices": [{"delta": {}, "logprobs": "x"}]}', "logprobs"),
        (b'{"choices": [], "timings": [1]}', "timings"),
        (b'{"choices": [], "timings": {"predicted_n": "x"}}', "predicted_n"),
        (b'{"choices": [], "timings": {"predicted_ms": "x"}}', "predicted_ms"),
    ],
)
def test_a_field_that_cannot_be_read_is_done_without_and_said_once(
    server: StubServer, backend: Make, event: bytes, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.inserted = [event]
    made = loaded(backend())
    measured = run(made)
    assert (measured.report.text, len(measured.output_ids)) == ("One two, three four five six.", 8)
    assert measured.report.num_prompt_tokens == 11
    said = capsys.readouterr().err
    assert said.count("NOTE") == said.count(f" a {field} that ") == 1


def test_half_a_character_does_not_get_into_a_result(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.answer = [("One",), ("\ud83d",)]
    assert run(made).report.text == "One?"


def test_a_server_that_does_not_stop_is_a_failed_prompt(server: StubServer, backend: Make) -> None:
    """Whether its tokens are counted as they come, so that the last one is known, or at the end, which never comes."""
    server.offers = {"ids", "usage"}
    by_ids, by_usage = loaded(backend(timeout_s="60")), loaded(backend(timeout_s="60", count="usage"))
    server.fault = "without_end"
    with pytest.raises(PromptFailedError, match="does not stop after the last token"):
        run(by_ids, ask(2))
    with pytest.raises(PromptFailedError, match="does not stop: it was asked for 2 tokens at most"):
        run(by_usage, ask(2))
    server.fault = None
    assert run(by_ids).finish_reason == "eos"


def test_what_comes_behind_the_last_token_gets_no_more_time_for_coming() -> None:
    exchange = exchanges.Exchange(ask(2), timeout_s=-1)
    chunks = iter([Chunk("a", ids=(1, 2)), Chunk("b"), Chunk("c")])
    steps = exchange.steps(chunks, Counter("ids", 2, whole=True))
    next(steps)
    with pytest.raises(PromptFailedError, match="does not stop after the last token"):
        steps.close()  # type: ignore[attr-defined]
    assert next(chunks).text == "c"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_refuses_has_failed_and_the_next_one_is_fine(
    server: StubServer, backend: Make, status: int
) -> None:
    made = loaded(backend())
    server.refusals = [Refusal(status, json.dumps({"error": {"message": "maximum context length is 10 tokens"}}))]
    with pytest.raises(PromptFailedError, match=rf"context is too small \({status}\)"):
        run(made)
    assert run(made).finish_reason == "eos"


def test_an_answer_that_comes_at_once_in_the_middle_of_a_run_is_a_failed_prompt(
    server: StubServer, backend: Make
) -> None:
    made = loaded(backend())
    server.fault = "no_stream"
    with pytest.raises(PromptFailedError, match="at once instead of streaming"):
        run(made)


@pytest.mark.parametrize(("status", "message"), [(401, "refuses the key"), (403, "the key"), (404, "no such model")])
def test_what_would_be_refused_of_every_prompt_ends_the_run(
    server: StubServer, backend: Make, status: int, message: str
) -> None:
    made = loaded(backend())
    server.refusals = [Refusal(status)]
    with pytest.raises(BackendLostError, match=message):
        run(made)


@pytest.mark.parametrize("form", [KEY, r"sk\/very\/secret-0123456789", r"\u0073k/very/secret-0123456789"])
def test_a_key_that_the_server_repeats_is_not_in_what_we_say(
    server: StubServer, backend: Make, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", json.loads(f'"{form}"'))
    made = loaded(backend(retries="0"))
    server.inserted = [b'{"error": {"message": "refused %b"}}' % form.encode()]
    with pytest.raises(PromptFailedError, match=r"answer: refused \*\*\*$"):
        run(made)
    server.inserted = [b'{"choices": [{"delta": {"content": "%b"}}]}' % form.encode()]
    assert "two,*** three" in str(run(made).report.text)
    server.refusals = [Refusal(503, '{"message": "' + "x" * 285 + form + '"}')]
    with pytest.raises(PromptFailedError, match=r"x\*\*\*$"):
        run(made)


def test_a_key_that_json_writes_otherwise_is_not_in_what_we_say(
    server: StubServer, backend: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", 'sk-"very"/secret')
    made = loaded(backend(retries="0"))
    for text in (r'{"detail": [{"input": "sk-\"very\"/secret"}]}', r'No: "sk-\"very\"\/secret"'):
        server.refusals = [Refusal(422, text)]
        with pytest.raises(PromptFailedError) as caught:
            run(made)
        assert "very" not in str(caught.value)
        assert "***" in str(caught.value)


@pytest.mark.parametrize("wait", ["\u00b2", "-5", "soon", "Fri, 99 Foo 99999999 00:00:00 GMT", "9" * 400])
def test_a_wait_that_is_none_is_ours(server: StubServer, backend: Make, wait: str) -> None:
    made = loaded(backend())
    server.refusals = [Refusal(503, "busy", {"Retry-After": wait})]
    made.prepare(ask())
    with pytest.raises(TryAgainError) as later:
        clocked(made, ask())
    assert later.value.wait_s == (exchanges.MAX_REQUESTED_WAIT_S if wait[0] == "9" else exchanges.FIRST_WAIT_S)


def test_an_answer_cut_by_a_small_context_is_a_failed_prompt(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.answer = [("One",)]

    def cut(handler: Any, body: Any) -> Any:
        return StubServer.events(server, handler, {**body, "max_tokens": 1})

    server.events = cut  # type: ignore[method-assign]
    with pytest.raises(PromptFailedError, match="after 1 of 20 tokens: its context is too small"):
        run(made)


def test_a_busy_server_is_asked_again_after_as_long_as_it_says(server: StubServer, backend: Make) -> None:
    made = loaded(backend())
    server.refusals = [Refusal(429, "slow down", {"Retry-After": "3"}), Refusal(503, "busy")]
    request = ask()
    waits = []
    for _ in range(2):
        made.prepare(request)
        with pytest.raises(TryAgainError) as later:
            clocked(made, request)
        waits.append(later.value.wait_s)
    assert waits == [3.0, 1.0]
    assert run(made, request).finish_reason == "eos"
    for status in (408, 425, 502, 520, 522, 524, 529):
        server.refusals = [Refusal(status)]
        with pytest.raises(TryAgainError, match=str(status)):
            run(made)
        assert run(made).finish_reason == "eos"


def test_a_server_that_stays_busy_fails_the_prompt(server: StubServer, backend: Make) -> None:
    made = loaded(backend(retries="1"))
    server.refusals = [Refusal(503, "busy", {"Retry-After": "0"})] * 2
    request = ask()
    made.prepare(request)
    with pytest.raises(TryAgainError):
        clocked(made, request)
    with pytest.raises(PromptFailedError, match="refused it 2 times, the last time with 503: busy"):
        run(made, request)
    assert run(made, request).finish_reason == "eos"  # its tries are counted anew


def test_waits_between_tries_grow_and_have_an_end() -> None:
    waits = [exchanges.retry_wait_s(tries, None) for tries in range(10)]
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert all(a <= b for a, b in pairwise(waits))
    assert max(waits) == exchanges.MAX_WAIT_S
    assert exchanges.retry_wait_s(0, 90) == 90
    assert exchanges.retry_wait_s(0, 1e9) == exchanges.MAX_REQUESTED_WAIT_S


def test_a_server_that_is_gone_ends_the_run(server: StubServer, backend: Make) -> None:
    made = loaded(backend(retries="1"))
    server.close()
    request = ask()
    made.prepare(request)
    with pytest.raises(TryAgainError):
        clocked(made, request)
    with pytest.raises(BackendLostError, match=r"cannot be reached any more.*--resume"):
        run(made, request)


def test_closing_early_leaves_the_backend_usable_and_twice_is_fine(server: StubServer, backend: Make) -> None:
    server.offers = {"ids", "usage"}
    made = backend()
    made.close()
    made.load()
    request = ask()
    for num_steps in (0, 1, 3):
        made.prepare(request)
        steps = made.generate(request)
        for _ in range(num_steps):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    assert len(run(made).output_ids) == 8
    made.close()
    made.close()


# Acceptance, from the server's counters.


class Vllm:
    """vLLM's counters as requests move them; `running` requests of other clients also move them at each reading."""

    def __init__(self, server: StubServer, requests: int = 1, running: int = 0) -> None:
        self.server, self.per_request, self.running, self.readings = server, requests, running, 0

    def __call__(self) -> str:
        self.readings += self.running
        done, other = len(self.server.asked) * self.per_request, 50 * self.readings
        rows = {
            'vllm:num_requests_running{engine="0"}': self.running,
            'vllm:num_requests_waiting{engine="0"}': 0,
            'vllm:request_success_total{engine="0",finished_reason="stop"}': done,
            'vllm:generation_tokens_total{engine="0"}': 8 * done,
            'vllm:spec_decode_num_drafts_total{engine="0"}': 4 * done + other,
            'vllm:spec_decode_num_draft_tokens_total{engine="0"}': 12 * done + 3 * other,
            'vllm:spec_decode_num_accepted_tokens_total{engine="0"}': 6 * done + 2 * other,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"}': 3 * done + other,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"}': 2 * done + other,
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="2"}': 1 * done,
        }
        return "# HELP nothing\n" + "".join(f"{name} {value}.0\n" for name, value in rows.items())


@pytest.mark.parametrize(("base", "root"), [("/v1", ""), ("/a/v1", "/a"), ("/a/v1", "")])
def test_acceptance_comes_from_the_difference_of_vllms_counters(
    server: StubServer, backend: Make, base: str, root: str
) -> None:
    server.counters, server.root = Vllm(server), root
    made = loaded(backend(base_url=server.url.removesuffix("/v1") + base))
    assert made.describe().chosen["acceptance"].startswith("vLLM's counters")
    drafts = run(made).report.drafts
    assert drafts is not None
    assert (drafts.rounds, drafts.judged, drafts.accepted) == (4, 4 + 3 + 2, 6)


def test_counters_give_no_acceptance_where_others_use_the_server(server: StubServer, backend: Make) -> None:
    server.counters = Vllm(server, requests=2)
    assert run(loaded(backend())).report.drafts is None
    server.counters = Vllm(server, running=1)
    made = loaded(backend())
    assert run(made).report.drafts is None
    assert "null where others used the server" in made.describe().chosen["acceptance"]
    server.counters = Vllm(server)
    assert loaded(backend(metrics="false")).describe().chosen["acceptance"] == "not reported"
    assert loaded(backend(concurrency="2")).describe().chosen["acceptance"] == "not reported"


def test_a_server_without_counters_has_no_acceptance(backend: Make) -> None:
    made = loaded(backend())
    assert made.describe().chosen["acceptance"] == "not reported"
    assert run(made).report.drafts is None


def test_ids_that_are_sent_again_and_again_are_not_counted_by(server: StubServer, backend: Make) -> None:
    server.offers = {"ids", "running_usage", "usage"}
    report = server.report
    server.report = lambda body, tokens, first: report(body, ["x"] * first + list(tokens), 0)  # type: ignore[method-assign]
    made = loaded(backend())
    assert "usage, reported with each chunk" in made.describe().chosen["tokens"]
    assert run(made).steps.emitted == [1, 2, 1, 3, 1]


def test_template_arguments_go_to_the_server_which_applies_the_template(server: StubServer) -> None:
    given = {"base_url": server.url, "model": "stub", "timeout_s": "5"}
    backend = OpenAI(parse_options("openai", OpenAI.Options, given), context(enable_thinking=False))
    backend.load()
    run(backend)
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.asked)
    raw = OpenAI(
        parse_options("openai", OpenAI.Options, given | {"api": "completions"}), context(enable_thinking=False)
    )
    with pytest.raises(InputError, match=r"--template-arg: no template is applied to what openai sends"):
        raw.load()


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ({"token_id:7": -0.5, "token_id:9": -1.25}, {7: -0.5, 9: -1.25}),
        ({"token_id:7": -0.5, " two": -1.25}, None),
        (None, None),
    ],
    ids=["by id", "by text", "none"],
)
def test_log_probabilities_of_the_next_token_are_asked_by_id(
    server: StubServer, listed: dict[str, float] | None, found: dict[int, float] | None
) -> None:
    server.takes_ids, server.next_logprobs = True, listed
    tokenizer = SimpleNamespace(encode=lambda _: [1, 2])
    options = parse_options("openai", OpenAI.Options, {"base_url": server.url, "model": "stub", "api": "completions"})
    backend = loaded(OpenAI(options, context(tokenizer)))
    assert backend.next_logits((1, 2, 3), (4, 5)) == found
    asked = server.asked[-1]
    assert (asked["prompt"], asked["max_tokens"], asked["logprobs"]) == ([1, 2, 3, 4, 5], 1, 20)
    server.refusals = [Refusal(400), Refusal(400)]
    assert backend.next_logits((1, 2, 3), (4, 5)) is None


def test_a_server_that_applies_its_own_template_reports_no_log_probabilities(backend: Make) -> None:
    assert loaded(backend()).next_logits((1, 2, 3), ()) is None


@pytest.mark.parametrize("key", ["x", "none", "EMPTY", "placeholder"])
def test_a_key_that_stands_for_none_is_not_cut_out_of_answers(
    server: StubServer, backend: Make, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    made = loaded(backend())
    server.inserted = [b'{"choices": [{"delta": {"content": " def f(x): none or EMPTY placeholder"}}]}']
    assert "def f(x): none or EMPTY placeholder" in str(run(made).report.text)


def test_a_server_that_refuses_a_top_p_of_one_is_asked_without_it(server: StubServer, backend: Make) -> None:
    """As TGI does, which takes numbers below 1."""
    made = loaded(backend())
    server.refuses = {"top_p"}
    request = ask(20, Sampling(0.7, top_p=1.0))
    made.prepare(request)
    with pytest.raises(TryAgainError):
        clocked(made, request)
    assert run(made, request).finish_reason == "eos"
    assert "top_p" not in server.asked[-1]
    with pytest.raises(PromptFailedError, match="top_p is not supported"):
        run(made, ask(20, Sampling(0.7, top_p=0.9)))


def test_a_server_that_asks_for_no_wait_is_not_pressed() -> None:
    assert [exchanges.retry_wait_s(tries, 0.0) for tries in range(3)] == [0.5, 1.0, 2.0]
