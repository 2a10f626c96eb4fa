"""`openai`: any server that speaks OpenAI's protocol, measured from outside: vLLM, SGLang, llama.cpp, TGI, ...

What is timed is what a user of the server sees: from the request, over a connection that is open already, to each chunk
of the answer. Requests that fail are failed prompts, and what has to be asked again is timed anew. The result does not
say where the server is, not even by a hash: there are few enough addresses to try them all.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from http.client import HTTPResponse
from typing import Any, ClassVar, TypeVar, cast

from pydantic import Field

from spdbench.backend import BackendContext, BackendInfo, BackendOptions
from spdbench.errors import BackendLostError, InputError, PromptFailedError
from spdbench.types import UNKNOWN_ID, BackendKind, EngineReport, GenerationRequest, Sampling, Span, Step
from spdbench_backends.openai.chunks import Chunk, read_chunks
from spdbench_backends.openai.client import (
    MALFORMED,
    BrokenError,
    Connection,
    RefusedError,
    Server,
    UnreachableError,
    parse_address,
)
from spdbench_backends.openai.counters import Counters, drafts_between, parse_counters
from spdbench_backends.openai.counting import WORDS, Api, Asked, Counter, Extras, choose_way, have_whole_tokens, unknown
from spdbench_backends.openai.error_messages import describe_refusal, describe_unreachable
from spdbench_backends.openai.exchange import Exchange, wait_s

Answer = TypeVar("Answer")

KEY_VARIABLE = "OPENAI_API_KEY"
QUESTION = "Count from one to twenty in words."
QUESTION_TOKENS = 16
BUSY = frozenset({408, 429, 500, 502, 503, 504})
FOR_ALL = frozenset({401, 403, 404})
"""Refusals that would meet every other prompt as well."""
NOT_UNDERSTOOD = frozenset({400, 415, 422, 500, 501})
CHUNKS_A_TOKEN, SPARE_CHUNKS = 16, 64
"""Chunks that a server may send for the tokens it was asked for: far more than any has, and yet not without end."""
COUNTERS_PATIENCE_S = 1.0
COUNTERS_PAUSE_S = 0.05
MAX_SEED = 2**31


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
        count: Asked = Field("auto", description="how tokens are counted; auto takes the best that the server offers")
        concurrency: int = Field(1, ge=1, le=1024, description="requests at once; --concurrency says the same")
        timeout_s: float = Field(120.0, gt=0, le=86400, description="a server that is silent for longer has failed")
        retries: int = Field(4, ge=0, le=20, description="how often a busy or unreachable server is asked again")
        metrics: bool = Field(True, description="read acceptance from the counters of vLLM and SGLang")

    kind: ClassVar[BackendKind] = "draft_verify"
    text_only: ClassVar[bool] = True
    lossless = True

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = cast(OpenAI.Options, options)
        self._context = context
        self._server: Server | None = None
        self._local = threading.local()
        self._closed = False

    @property
    def concurrency(self) -> int:
        return self._options.concurrency

    def load(self) -> None:
        options, label = self._options, self._context.label
        if options.base_url is None:
            raise InputError(f"-b {label}: needs a server; give -o {label}.base_url=http://HOST:PORT/v1")
        try:
            address = parse_address(options.base_url)
        except ValueError as why:
            raise InputError(f"-o {label}.base_url: {why}") from None
        self._server = Server(address, _key(), options.timeout_s)
        self._closed = False
        self._model = options.model or self._only_model()
        self._prompt_form = "messages" if options.api == "chat" else self._form_of_prompts()
        self._way, self._extras, told = choose_way(options.count, options.api, self._probe, self._usage, label)
        speaking = [chunk for chunk in told if chunk.says]
        self._whole = have_whole_tokens(told)
        self._ids = self._way == "ids" or (
            self._way == "logprobs" and all(UNKNOWN_ID not in (chunk.listed or ()) for chunk in speaking)
        )
        counters = self._counters() if options.metrics and options.concurrency == 1 else None
        self._engine = None if counters is None else counters.engine

    def describe(self) -> BackendInfo:
        acceptance = "not told"
        if self._engine is not None:
            acceptance = (
                f"{self._engine.name}'s counters, before and after each request; null where others used the server"
            )
        return BackendInfo(
            devices=("server",),
            lane_bytes=(0,),
            chosen={"tokens": WORDS[self._way], "prompt": self._prompt_form, "acceptance": acceptance},
            unknown=unknown(self._way, self._ids),
            other_model=f"{self._model} in its server",
        )

    def prepare(self, request: GenerationRequest) -> None:
        """Untimed: connects, and reads the counters."""
        last: Exchange | None = getattr(self._local, "exchange", None)
        exchange = self._local.exchange = Exchange(request, self._options.timeout_s)
        if last is not None and last.to_be_asked_again:
            exchange.tries = last.tries
        if last is not None and last.connection is not None:
            last.connection.close()  # one that was prepared for and never made
        if self._engine is not None:
            exchange.before = self._counters()
        with suppress(UnreachableError):  # `generate` will meet it again, and say so
            exchange.connection = self._loaded().connect()

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        exchange: Exchange = self._local.exchange
        exchange.tries += 1
        try:
            with closing(exchange.connection or self._loaded().connect()) as connection:
                chunks = self._ask(connection, self._body(request, self._extras))
                yield from exchange.steps(chunks, Counter(self._way, request.max_new_tokens, whole=self._whole))
        except RefusedError as refusal:
            raise self._refusal(refusal, exchange) from None
        except UnreachableError as why:
            raise self._unreachable(why, exchange) from None
        except (BrokenError, NotStreamedError) as why:
            raise PromptFailedError(str(why)) from None
        if exchange.num_tokens == 0 or (exchange.finish is None and exchange.num_tokens < request.max_new_tokens):
            raise PromptFailedError(f"the server stopped after {exchange.num_tokens} tokens, and did not say why")
        if exchange.finish == "length" and exchange.num_tokens < request.max_new_tokens and self._way != "chunks":
            raise PromptFailedError(
                f"the server cut the answer after {exchange.num_tokens} of {request.max_new_tokens} tokens: its "
                "context is too small; start it with a larger one, or lower --max-new-tokens"
            )

    def account(self) -> EngineReport:
        exchange: Exchange = self._local.exchange
        drafts = None
        if exchange.before is not None and (after := self._counters_after(exchange.before)) is not None:
            drafts = drafts_between(exchange.before, after, exchange.num_tokens)
        fed = exchange.num_prompt_tokens
        if fed is None and self._context.target.tokenizer is None:
            fed = 0  # nobody has put the prompt into tokens but the server, which does not tell
        return EngineReport("".join(exchange.parts), exchange.finish, fed, drafts)

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()

    def _loaded(self) -> Server:
        if self._server is None:
            raise RuntimeError("openai is not loaded")
        return self._server

    @property
    def _path(self) -> str:
        ending = "/chat/completions" if self._options.api == "chat" else "/completions"
        return self._loaded().address.path + ending

    def _ask(self, connection: Connection, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The answer; what tells something gives the server its time anew, but only so often.

        Raises:
            NotStreamedError: it does not come in chunks.
        """
        response = connection.ask("POST", self._path, body)
        if "text/event-stream" not in (response.getheader("Content-Type") or ""):
            raise NotStreamedError(
                "the server answers at once instead of streaming, so single tokens cannot be timed; switch streaming "
                "on, or use a server that has it"
            )
        return self._chunks(connection, response, body["max_tokens"])

    def _chunks(self, connection: Connection, response: HTTPResponse, max_tokens: int) -> Iterator[Chunk]:
        left = SPARE_CHUNKS + CHUNKS_A_TOKEN * max_tokens
        for chunk in read_chunks(connection.lines(response), self._loaded().harmless):
            if chunk.tells:
                left -= 1
                connection.renew()
            if left < 0:
                raise BrokenError(f"the server does not stop: it was asked for {max_tokens} tokens at most")
            yield chunk

    def _body(self, request: GenerationRequest, extras: Extras) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            **({"stop": list(request.stop)} if request.stop else {}),
            **extras,
        }
        if not sampling.greedy:
            body |= {"top_p": sampling.top_p, "seed": request.seed % MAX_SEED}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        if self._options.api == "chat":
            return body | {"messages": [dict(message) for message in request.messages]}
        return body | {"prompt": self._prompt(request)}

    def _prompt(self, request: GenerationRequest) -> str | list[int]:
        """What is completed: ids where the server takes them, else their text, in front of which it puts a BOS."""
        tokenizer = self._context.target.tokenizer
        if tokenizer is None:
            return "\n".join(message["content"] for message in request.messages)
        if self._prompt_form == "ids":
            return list(request.prompt_ids)
        ids = request.prompt_ids
        return str(tokenizer.decode(ids[1:] if ids[:1] == (tokenizer.bos_token_id,) else ids))

    def _form_of_prompts(self) -> str:
        """`ids` if the server completes these, else `text`."""
        if self._context.target.tokenizer is None:
            return "text"
        self._prompt_form = "ids"
        return "text" if self._probe({}) is None else "ids"

    def _question(self) -> GenerationRequest:
        tokenizer = self._context.target.tokenizer
        ids = () if tokenizer is None else tuple(map(int, tokenizer.encode(QUESTION)))
        messages = ({"role": "user", "content": QUESTION},)
        return GenerationRequest(ids, messages, QUESTION_TOKENS, Sampling(), 0, frozenset())

    def _probe(self, extras: Extras) -> list[Chunk] | None:
        """The answer to a short question; None if the server does not understand the extras.

        Raises:
            InputError: it cannot be asked at all.
        """
        body = self._body(self._question(), extras)

        def ask(connection: Connection) -> list[Chunk]:
            return list(self._ask(connection, body))

        try:
            return self._patiently(ask)
        except RefusedError as refusal:
            if refusal.status in NOT_UNDERSTOOD and (extras or self._prompt_form == "ids"):
                return None
            raise describe_refusal(self._context.label, self._model, refusal) from None

    def _usage(self) -> int | None:
        """How many tokens the same answer has when it is not streamed."""
        body = self._body(self._question(), {}) | {"stream": False}

        def ask(connection: Connection) -> int | None:
            answer = json.loads(connection.body(connection.ask("POST", self._path, body)))
            found = (answer.get("usage") or {}).get("completion_tokens")
            return None if found is None else int(found)

        try:
            return self._patiently(ask)
        except (RefusedError, *MALFORMED):
            return None

    def _patiently(self, ask: Callable[[Connection], Answer]) -> Answer:
        """What `ask` makes of a new connection, before the run; a server that is busy gets time."""
        for tries in range(self._options.retries + 1):
            try:
                with closing(self._loaded().connect()) as connection:
                    return ask(connection)
            except UnreachableError as why:
                raise describe_unreachable(self._context.label, self._loaded().address, why) from None
            except BrokenError as why:
                raise InputError(f"-b {self._context.label}: {why}; is it a server of OpenAI's protocol?") from None
            except NotStreamedError as why:
                raise InputError(f"-b {self._context.label}: {why}") from None
            except RefusedError as refusal:
                busy = refusal.status in (BUSY - NOT_UNDERSTOOD)
                if not busy or tries == self._options.retries:
                    raise
                time.sleep(wait_s(tries, refusal.retry_after_s))
        raise AssertionError("the last try returns or raises")

    def _only_model(self) -> str:
        """The model's name where nobody gave it: the server's only one."""
        label = self._context.label
        try:
            listed = json.loads(self._loaded().get("/models"))["data"]
            names = [self._loaded().harmless(str(entry["id"])) for entry in listed]
        except UnreachableError as why:
            raise describe_unreachable(label, self._loaded().address, why) from None
        except RefusedError as refusal:
            raise describe_refusal(label, "", refusal) from None
        except (BrokenError, *MALFORMED):
            names = []
        if len(names) != 1 or self._context.target.tokenizer is None:  # then results are told apart by this name
            there = f"; the server has {', '.join(names)}" if names else ""
            raise InputError(f"-b {label}: which model? Give -o {label}.model=NAME{there}")
        return names[0]

    def _counters(self) -> Counters | None:
        try:
            text = self._loaded().get("/metrics", from_root=True)
        except (UnreachableError, BrokenError, RefusedError):
            return None
        return parse_counters(text.decode(errors="replace"))

    def _counters_after(self, before: Counters) -> Counters | None:
        """The counters once this request is among those that they count, or when it is clear that it will not be."""
        until = time.monotonic() + COUNTERS_PATIENCE_S
        while (after := self._counters()) is not None and after.requests <= before.requests:
            if time.monotonic() > until:
                break
            time.sleep(COUNTERS_PAUSE_S)
        return after

    def _refusal(self, refusal: RefusedError, exchange: Exchange) -> Exception:
        if refusal.status in FOR_ALL:
            return BackendLostError(str(describe_refusal(self._context.label, self._model, refusal)))
        if refusal.status not in BUSY:
            return PromptFailedError(str(describe_refusal(self._context.label, self._model, refusal)))
        if exchange.tries > self._options.retries or self._closed:
            return PromptFailedError(f"the server refused it {exchange.tries} times, the last time with {refusal}")
        return exchange.again(str(refusal), refusal.retry_after_s)

    def _unreachable(self, why: UnreachableError, exchange: Exchange) -> Exception:
        if exchange.tries > self._options.retries or self._closed:
            return BackendLostError(
                f"{self._context.label}: the server cannot be reached any more ({why}); start it again, and go on with "
                "--resume"
            )
        return exchange.again(str(why), None)


class NotStreamedError(Exception):
    """A server answered at once that was asked to stream."""


def _key() -> str:
    """The key that the environment holds, or nothing."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY_VARIABLE}: holds characters that no key has")
    return key
