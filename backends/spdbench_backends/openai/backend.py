"""`openai`: any server that speaks OpenAI's protocol, measured from outside: vLLM, SGLang, llama.cpp, TGI, ...

Times are those that a user of the server sees: from the request, over a connection that is already open, to each chunk
of the answer. Requests that fail are failed prompts, and a request that has to be repeated is timed anew. The result
does not contain the server's address, not even as a hash: there are so few addresses that all could be tried.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import ClassVar, cast

from pydantic import Field

from spdbench.backend import Answer, Backend, BackendContext, BackendInfo, BackendOptions
from spdbench.console import say
from spdbench.errors import BackendLostError, InputError, PromptFailedError
from spdbench.types import UNKNOWN_ID, BackendKind, EngineReport, FirstDivergence, GenerationRequest, Span, Step
from spdbench_backends.openai.chunks import FINISHES, Chunk
from spdbench_backends.openai.counters import Counters, drafts_between, parse_counters
from spdbench_backends.openai.counting import (
    LISTING,
    WAY_TITLES,
    Api,
    Counter,
    CountOption,
    choose_way,
    has_whole_tokens,
    missing_measurements,
)
from spdbench_backends.openai.endpoint import BUSY, Endpoint, NotStreamedError, describe_refusal
from spdbench_backends.openai.exchange import MAX_WAIT_S, Exchange
from spdbench_backends.openai.response_drafts import REQUEST, DraftReport, count_drafts
from spdbench_backends.openai.streams import ReportedError
from spdbench_backends.openai.token_scores import TokenScores, explain_divergence
from spdbench_backends.openai.transport.address import parse_address
from spdbench_backends.openai.transport.client import Server
from spdbench_backends.openai.transport.errors import BrokenError, LostError, RefusedError, UnreachableError, one_line

KEY_VARIABLE = "OPENAI_API_KEY"
PERMANENT = frozenset({401, 403, 404})
"""Statuses of refusals that every other prompt would get as well."""
FAILED = 500
"""A server's bug, or the wrong status of a refusal."""
COUNTERS_TIMEOUT_S = 1.0
COUNTERS_PAUSE_S = 0.05
WITHOUT_CACHE = (
    "To measure without, start vLLM with --no-enable-prefix-caching, SGLang with --disable-radix-cache, "
    "llama.cpp with --no-cache-prompt."
)


class OpenAI:
    """A server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, TGI, ...), measured from outside."""

    class Options(BackendOptions):
        base_url: str | None = Field(
            None, exclude=True, description="where the server is, such as http://127.0.0.1:8000/v1; must be given"
        )
        model: str | None = Field(
            None, description="its name for the model; needed unless -m is given and it has one only"
        )
        api: Api = Field(
            "chat", description="chat: the server's own template; completions: the prompt as spdbench has it"
        )
        count: CountOption = Field(
            "auto", description="how tokens are counted; auto takes the best that the server offers"
        )
        concurrency: int = Field(1, ge=1, le=1024, description="requests at once; --concurrency says the same")
        timeout_s: float = Field(120.0, gt=0, le=86400, description="a server that is silent for longer has failed")
        retries: int = Field(4, ge=0, le=20, description="how often a busy or unreachable server is asked again")
        metrics: bool = Field(
            True, description="read acceptance from responses, or else from the counters of vLLM and SGLang"
        )

    kind: ClassVar[BackendKind] = "draft_verify"
    text_only: ClassVar[bool] = True
    lossless = True

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = cast(OpenAI.Options, options)
        self._context = context
        self._server: Server | None = None
        self._local = threading.local()
        self._closed = False
        self._said: set[str] = set()

    @property
    def concurrency(self) -> int:
        return self._options.concurrency

    def load(self) -> None:
        options, label = self._options, self._context.label
        if options.base_url is None:
            raise InputError(f"-b {label}: needs a server; give -o {label}.base_url=http://HOST:PORT/v1")
        if self._context.template_args and options.api != "chat" and self._context.tokenizer is None:
            raise InputError(f"--template-arg: no template is applied to what {label} sends; use -o {label}.api=chat")
        if self._context.chat_template is not None and options.api == "chat":
            raise InputError(
                f"--chat-template: {label} sends messages, and its server applies a template of its own; start the "
                f"server with it (vLLM, SGLang: --chat-template; llama.cpp: --chat-template-file), or give -m and "
                f"-o {label}.api=completions"
            )
        try:
            address = parse_address(options.base_url)
        except ValueError as error:
            raise InputError(f"-o {label}.base_url: {error}") from None
        self._server = Server(address, _key(), options.timeout_s)
        self._closed = False
        self._endpoint = Endpoint(
            self._server,
            label,
            api=options.api,
            model=options.model,
            retries=options.retries,
            tokenizer=self._context.tokenizer,
            template_args=self._context.template_args,
            notice=self._say_once,
        )
        ask = (self._endpoint.probe, self._endpoint.unstreamed_usage)
        self._way, self._extras, answer = choose_way(options.count, options.api, *ask, label, self._say_once)
        self._whole = has_whole_tokens(answer)
        self._ids = self._way == "ids" or (
            self._way == "logprobs"
            and all(UNKNOWN_ID not in (chunk.listed or ()) for chunk in answer if chunk.has_text)
        )
        self._scores = TokenScores(self._endpoint)
        self._report = self._find_report(answer) if options.metrics else None
        reads_counters = options.metrics and options.concurrency == 1 and self._report is None
        counters = self._counters() if reads_counters else None
        self._engine = None if counters is None else counters.engine

    def describe(self) -> BackendInfo:
        acceptance = "not reported" if self._report is None else self._report.source
        if self._engine is not None:
            acceptance = (
                f"{self._engine.name}'s counters, before and after each request; null where others used the server"
            )
        return BackendInfo(
            devices=("server",),
            lane_bytes=(0,),
            chosen={"tokens": WAY_TITLES[self._way], "prompt": self._endpoint.prompt_form, "acceptance": acceptance},
            missing_measurements=missing_measurements(self._way, self._ids),
            other_model=f"{self._endpoint.model} in its server",
        )

    def prepare(self, request: GenerationRequest) -> None:
        """Connects, and reads the counters. Untimed."""
        last: Exchange | None = getattr(self._local, "exchange", None)
        exchange = self._local.exchange = Exchange(request, self._options.timeout_s)
        if last is not None and last.is_to_be_repeated:
            exchange.tries = last.tries
        if last is not None and last.connection is not None:
            last.connection.close()  # prepared for a request that was not made
        if self._engine is not None:
            exchange.before = self._counters()
        with suppress(UnreachableError):  # `generate` meets it again, and reports it
            exchange.connection = self._loaded_server().connect()

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        exchange: Exchange = self._local.exchange
        exchange.tries += 1
        try:
            with closing(exchange.connection or self._loaded_server().connect()) as connection:
                chunks = self._endpoint.stream(connection, self._endpoint.body(request, self._extras))
                counter = Counter(self._way, request.max_new_tokens, whole=self._whole, end=self._end_of(request))
                yield from exchange.steps(chunks, counter)
        except RefusedError as refusal:
            if exchange.tries <= max(1, self._options.retries) and self._endpoint.learns_from(refusal, request):
                raise exchange.repeat_later(str(refusal), None) from None
            raise self._error_of_refusal(refusal, exchange) from None
        except UnreachableError as error:
            raise self._error_of_unreachable(error, exchange) from None
        except (BrokenError, NotStreamedError) as error:
            is_busy = isinstance(error, ReportedError) and error.status in BUSY - {FAILED}
            raise PromptFailedError(str(error), is_transient=is_busy or isinstance(error, LostError)) from None
        word = exchange.finish_word
        if exchange.num_tokens == 0:
            raise PromptFailedError(f"the server's answer is empty; its finish_reason is {word or 'missing'}")
        if word not in FINISHES:
            how = f"with finish_reason {word!r}" if word else "without a finish_reason"
            self._say_once(f"answers end {how}, which is taken for an end by themselves")
        is_short = exchange.num_tokens < request.max_new_tokens and self._way != "chunks"
        if exchange.finish == "length" and is_short and exchange.doubt:
            raise PromptFailedError(
                f"the server lists {exchange.num_tokens} tokens of an answer that ended at the limit of "
                f"{request.max_new_tokens} ({exchange.doubt}), so its tokens cannot be counted"
            )
        if exchange.finish == "length" and is_short:
            raise PromptFailedError(
                f"the server cut the answer after {exchange.num_tokens} of {request.max_new_tokens} tokens: its "
                "context is too small; start it with a larger one, or lower --max-new-tokens"
            )

    def account(self) -> EngineReport:
        exchange: Exchange = self._local.exchange
        drafts = None
        if exchange.drafts is not None and self._options.metrics:
            drafts = count_drafts(exchange.drafts, exchange.num_tokens)
            if drafts is None:
                self._say_once(f"what {exchange.drafts.engine} reports of drafts contradicts itself, and is ignored")
        elif exchange.before is not None and (after := self._counters_after(exchange.before)) is not None:
            drafts = drafts_between(exchange.before, after, exchange.num_tokens)
        num_prompt_tokens = exchange.num_prompt_tokens
        if num_prompt_tokens is None and self._context.tokenizer is None:
            num_prompt_tokens = 0  # unknown: only the server has tokenized the prompt, and it does not report the count
        text = self._loaded_server().without_key("".join(exchange.parts))
        if exchange.doubt:
            what = "the tokens that it lists" if exchange.contradiction else "itself"
            then = "the tokens that it lists count" if self._way in LISTING else "it may be wrong"
            self._say_once(f"its usage contradicts {what}, and {then}", exchange.doubt)
        self._note_cache(exchange)
        return EngineReport(
            text,
            exchange.finish,
            num_prompt_tokens,
            drafts,
            exchange.num_cached_tokens,
            exchange.decode_s,
            exchange.doubt or None,
        )

    def next_logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Mapping[int, float] | None:
        """The server's log-probabilities of the likeliest tokens, see `spdbench.backend.engine_logits`."""
        known = self._endpoint.prompt_form == "ids"
        return self._scores.next_of((*prompt_ids, *answer_ids)) if known else None

    def explain_divergence(
        self, request: GenerationRequest, expected: Answer, found: Answer, other: Backend
    ) -> FirstDivergence | None:
        """Why the server `other` answered differently, see `spdbench.backend.divergence_explainer`."""
        return explain_divergence(request, expected, found, self._scores, cast(OpenAI, other)._scores)

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()

    def _end_of(self, request: GenerationRequest) -> int | None:
        """The id of the end of sequence that only the server's usage includes; None if it is not known which."""
        if not self._ids:
            return UNKNOWN_ID
        return next(iter(request.eos_ids)) if len(request.eos_ids) == 1 else None

    def _loaded_server(self) -> Server:
        if self._server is None:
            raise RuntimeError("openai is not loaded")
        return self._server

    def _find_report(self, answer: Sequence[Chunk]) -> DraftReport | None:
        """The draft report of an answer, if need be of another one that asks for it; later requests then do, too."""
        report = _last_report(answer)
        if report is None:
            asked = {**self._extras, **REQUEST}
            report = _last_report(self._endpoint.probe(asked) or ())
            if report is not None:
                self._extras = asked
        return report

    def _note_cache(self, exchange: Exchange) -> None:
        """Says that a prompt cache made the time to the first token shorter than it is without one."""
        if exchange.num_cached_tokens and "cache" not in self._said:
            self._said.add("cache")
            of = f" of {exchange.num_prompt_tokens}" if exchange.num_prompt_tokens else ""
            say(
                f"NOTE: {self._context.label}: the server's prompt cache answered {exchange.num_cached_tokens}{of} "
                f"tokens of a prompt, so its TTFT is that of a shorter prompt. {WITHOUT_CACHE}"
            )

    def _counters(self) -> Counters | None:
        server = self._loaded_server()
        for root in server.address.roots:
            with suppress(UnreachableError, BrokenError, RefusedError):
                counters = parse_counters(server.get(f"{root}/metrics").decode(errors="replace"))
                if counters.engine is not None:
                    return counters
        return None

    def _counters_after(self, before: Counters) -> Counters | None:
        """The counters once they include this request, or after a timeout without it."""
        until = time.monotonic() + COUNTERS_TIMEOUT_S
        while (after := self._counters()) is not None and after.requests <= before.requests:
            if time.monotonic() > until:
                break
            time.sleep(COUNTERS_PAUSE_S)
        return after

    def _say_once(self, oddity: str, example: str = "") -> None:
        """Says what is odd about a server that is measured all the same."""
        if oddity not in self._said:
            self._said.add(oddity)
            say(f"NOTE: {self._context.label}: {one_line(': '.join(filter(None, [oddity, example])))}.")

    def _error_of_refusal(self, refusal: RefusedError, exchange: Exchange) -> Exception:
        if refusal.status not in BUSY:
            error = str(describe_refusal(self._context.label, self._endpoint.model, refusal))
            is_permanent = refusal.status in PERMANENT
            return BackendLostError(error, is_transient=True) if is_permanent else PromptFailedError(error)
        if exchange.tries > self._options.retries or self._closed:
            # A server that fails on each try fails on this prompt; one that is busy does so on any.
            return PromptFailedError(
                f"the server refused it {exchange.tries} times, the last time with {refusal}",
                is_transient=refusal.status != FAILED,
            )
        later = exchange.repeat_later(str(refusal), refusal.retry_after_s)
        if later.wait_s > MAX_WAIT_S:
            self._say_once(f"the server asks to wait, for {later.wait_s:.0f} s at first; no wait is timed")
        return later

    def _error_of_unreachable(self, error: UnreachableError, exchange: Exchange) -> Exception:
        if exchange.tries > self._options.retries or self._closed:
            return BackendLostError(
                f"{self._context.label}: the server cannot be reached any more ({error}); start it again, and go on "
                "with --resume",
                is_transient=True,
            )
        return exchange.repeat_later(str(error), None)


def _last_report(answer: Sequence[Chunk]) -> DraftReport | None:
    return next((chunk.drafts for chunk in reversed(answer) if chunk.drafts is not None), None)


def _key() -> str:
    """The key in the environment, or an empty string."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY_VARIABLE}: holds characters that no key has")
    return key
