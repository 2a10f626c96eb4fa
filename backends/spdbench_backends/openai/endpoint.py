"""The completions endpoint of one server: request bodies, streamed answers, and the questions before a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeVar

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.openai.chunks import Chunk
from spdbench_backends.openai.counting import Api, Extras
from spdbench_backends.openai.exchange import MAX_WAIT_S, retry_wait_s
from spdbench_backends.openai.streams import ENDS_WITH_USAGE, OK, Notice, read_chunks, read_refusal
from spdbench_backends.openai.transport.address import Address, unused_proxy
from spdbench_backends.openai.transport.client import ZIPPED, Connection, Server, encoding_of
from spdbench_backends.openai.transport.errors import (
    MALFORMED,
    BrokenError,
    LostError,
    RefusedError,
    SilentError,
    UnreachableError,
    error_message,
    one_line,
)
from spdbench_backends.openai.transport.events import FIELD, is_event, split_lines, without_padding

Answer = TypeVar("Answer")

QUESTION = "Count from one to twenty in words."
QUESTION_TOKENS = 16
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525), 529})
"""Statuses that may pass: 52x are Cloudflare's for a server behind it that does not answer, 529 says overloaded."""
OVERLOADED, NO_ANSWER = frozenset({503, 529}), frozenset({502, 504, *range(520, 525)})
NOT_UNDERSTOOD = frozenset({OK, 400, 415, 422, 500, 501})
CHUNKS_PER_TOKEN, SPARE_CHUNKS = 16, 64
"""Limit on the chunks of one answer: far more than a correct server sends, so that an endless stream ends."""
MAX_SEED = 2**31
MAX_BODY_LINES = 100
USAGE_WAIT_S, CLOSE_WAIT_S = 5.0, 1.0
"""How long a server is waited for once its answer is whole, before and after its usage: not all close their streams."""
STREAM = "text/event-stream"
JSON_LINES = ("ndjson", "jsonl", "stream+json")
"""Parts of the content types of streams of JSON, one object a line."""
LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
"""The key of a request for its limit of tokens, and the one that OpenAI's models since 2024 want in its place."""
TOO_LONG = ("context", "max_model_len", "too long", "maximum length", "exceed")


class NotStreamedError(Exception):
    """A server sent an answer at once although it was asked to stream."""

    def __init__(self) -> None:
        super().__init__(
            "the server answers at once instead of streaming, so single tokens cannot be timed; switch streaming on, "
            "or use a server that has it"
        )


class Endpoint:
    """Where and how one model of a server completes conversations.

    Without a `model` the server's only one is taken. `prompt_form` is how a request holds its prompt: `messages`, `ids`
    or `text`. `template` are the arguments of the chat template as a request has them. What is odd of its streams goes
    to `notice`.
    """

    def __init__(
        self,
        server: Server,
        label: str,
        *,
        api: Api,
        model: str | None,
        retries: int,
        tokenizer: Any,
        template_args: Mapping[str, Any],
        notice: Notice,
    ) -> None:
        """Asks the server for what is not given.

        Raises:
            InputError: the server cannot be used, or the model has to be named.
        """
        self._server = server
        self._label = label
        self._notice = notice
        self._habits: set[str] = set()
        self._limit = LIMIT
        self._takes_top_p_of_1 = True
        self._retries = retries
        self._tokenizer = tokenizer
        self.template = {"chat_template_kwargs": dict(template_args)} if template_args else {}
        self.model = model or self._only_model()
        self._path = "/chat/completions" if api == "chat" else self.completions_path
        self.prompt_form = "messages"
        if api != "chat":
            self.prompt_form = "text" if tokenizer is None else "ids"
            if self.prompt_form == "ids" and self.probe({}) is None:
                self.prompt_form = "text"

    def body(self, request: GenerationRequest, extras: Extras) -> dict[str, Any]:
        """The JSON that asks for `request`, with `extras` added."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            self._limit: request.max_new_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            **({"stop": list(request.stop)} if request.stop else {}),
            **extras,
        }
        if not sampling.greedy:
            body |= {"top_p": sampling.top_p} if sampling.top_p < 1 or self._takes_top_p_of_1 else {}
            body |= {"seed": request.seed % MAX_SEED}
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        if self.prompt_form == "messages":
            return body | self.template | {"messages": [dict(message) for message in request.messages]}
        return body | {"prompt": self.prompt(request)}

    def learns_from(self, refusal: RefusedError, request: GenerationRequest) -> bool:
        """True if the request is worth another try: without a `top_p` of 1, which TGI refuses. To others it is sent, as
        vLLM would take the one of the model's config in its place."""
        sampling = request.sampling
        if sampling.greedy or sampling.top_p < 1 or "top_p" not in refusal.message:
            return False
        self._takes_top_p_of_1 = False
        return True

    def stream(self, connection: Connection, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The chunks of the answer. A chunk with content restarts the server's time limit.

        Raises:
            NotStreamedError: the answer does not come in chunks.
        """
        response = connection.ask("POST", self._server.address.path + self._path, body)
        lines = without_padding(split_lines(connection.pieces(response)), self._notice)
        if (encoding := encoding_of(response)) in ZIPPED:
            self._notice("its streams are compressed, which can hold chunks back; switch that off for them", encoding)
        lines = self._stream_lines(lines, (response.getheader("Content-Type") or "none").lower())
        limit = body[self._limit]
        left = SPARE_CHUNKS + CHUNKS_PER_TOKEN * limit
        has_usage = False
        for chunk in read_chunks(lines, self._server.without_key, self._notice, self._habits):
            has_usage = has_usage or bool(chunk.completion_tokens)
            if chunk.has_content or chunk.ends_answer:
                left -= 1
                connection.renew((CLOSE_WAIT_S if has_usage else USAGE_WAIT_S) if chunk.ends_answer else math.inf)
            if left < 0:
                raise BrokenError(f"the server does not stop: it was asked for {limit} tokens at most")
            yield chunk

    def _stream_lines(self, lines: Iterator[bytes], kind: str) -> Iterator[bytes]:
        """The lines of an answer of this content type, once its first line shows that it is a stream.

        Raises:
            RefusedError: it is an error, although its status is one of success.
            NotStreamedError: it is a whole answer.
            BrokenError: it is none of these.
        """
        first = next(filter(None, lines), b"")
        if not first:
            raise LostError("the server's answer has no content")
        if first.lstrip().startswith((b"{", b"[")):
            if not is_event(first, in_lines=any(name in kind for name in JSON_LINES)):
                body = b"\n".join([first, *islice(lines, MAX_BODY_LINES)])
                raise read_refusal(body, self._server.without_key) or NotStreamedError
            self._notice("its streams are lines of JSON without `data:`", kind)
        elif STREAM not in kind:
            if not FIELD.match(first):
                text = b"\n".join([first, *islice(lines, MAX_BODY_LINES)]).decode(errors="replace")
                words = error_message(text, self._server.without_key)
                raise BrokenError(f"the server's answer is neither a stream nor JSON, but {one_line(kind)}: {words}")
            self._notice(f"its streams have another content type than {STREAM}", kind)
        return chain([first], lines)

    def probe(self, extras: Extras) -> list[Chunk] | None:
        """The answer to a short question; None if the server does not understand the extras.

        Raises:
            InputError: the server cannot be used at all.
        """
        if ENDS_WITH_USAGE in self._habits and "stream_options" not in extras:
            return None
        body = self.body(self._question(), extras)
        try:
            return self._ask_until_ready(lambda connection: list(self.stream(connection, body)))
        except RefusedError as refusal:
            if self._limit == LIMIT and NEW_LIMIT in refusal.message:
                self._limit = NEW_LIMIT
                return self.probe(extras)
            if refusal.status in NOT_UNDERSTOOD and (extras or self.prompt_form == "ids"):
                return None
            raise describe_refusal(self._label, self.model, refusal) from None

    def ask_json(self, path: str, body: Mapping[str, Any], *, base: str | None = None) -> Any:
        """The JSON that answers a request which is not streamed, at a path below `base`, or else below the address.
        Raises `RefusedError`, or `InputError` if the server cannot be used at all."""
        whole = (self._server.address.path if base is None else base) + path
        return self._ask_until_ready(lambda line: json.loads(line.body(line.ask("POST", whole, body))))

    @property
    def roots(self) -> tuple[str, ...]:
        """Paths below which the server may have what is not OpenAI's."""
        return self._server.address.roots

    @cached_property
    def completions_path(self) -> str:
        """Where plain completions are, below the address. llama.cpp also answers where the address lacks `/v1`, and has
        a protocol of its own at `/completions` there."""
        if not self._server.address.has_version:
            body = {"model": self.model, "prompt": QUESTION, "max_tokens": 1, "temperature": 0.0}
            with suppress(RefusedError, *MALFORMED):
                if "choices" in self.ask_json("/v1/completions", body):
                    return "/v1/completions"
        return "/completions"

    def unstreamed_usage(self) -> int | None:
        """How many tokens the answer to the same question has when it is not streamed; None if unknown."""
        body = self.body(self._question(), {}) | {"stream": False}
        try:
            answer = self.ask_json(self._path, body)
            found = (answer.get("usage") or {}).get("completion_tokens")
            return None if found is None else int(found)
        except (RefusedError, *MALFORMED):
            return None

    def prompt(self, request: GenerationRequest) -> str | list[int]:
        """What a request holds that has no messages: ids if the server takes them, else their text without the BOS,
        which the server adds."""
        tokenizer, ids = self._tokenizer, request.prompt_ids
        if tokenizer is None:
            return "\n".join(message["content"] for message in request.messages)
        if self.prompt_form == "ids":
            return list(ids)
        return str(tokenizer.decode(ids[1:] if ids[:1] == (tokenizer.bos_token_id,) else ids))

    def _question(self) -> GenerationRequest:
        ids = () if self._tokenizer is None else tuple(map(int, self._tokenizer.encode(QUESTION)))
        messages = ({"role": "user", "content": QUESTION},)
        return GenerationRequest(ids, messages, QUESTION_TOKENS, Sampling(), 0, frozenset())

    def _ask_until_ready(self, ask: Callable[[Connection], Answer]) -> Answer:
        """The result of `ask` on a new connection. A busy server is asked again after a while."""
        tries = 0
        while True:
            try:
                with closing(self._server.connect()) as connection:
                    return ask(connection)
            except UnreachableError as error:
                raise describe_unreachable(self._label, self._server.address, error) from None
            except SilentError as error:
                raise InputError(f"-b {self._label}: {error}") from None
            except BrokenError as error:
                raise InputError(f"-b {self._label}: {error}; is it a server of OpenAI's protocol?") from None
            except NotStreamedError as error:
                raise InputError(f"-b {self._label}: {error}") from None
            except RefusedError as refusal:
                busy = refusal.status in (BUSY - NOT_UNDERSTOOD)
                if not busy or tries == self._retries:
                    raise
                wait_s = retry_wait_s(tries, refusal.retry_after_s)
                if wait_s > MAX_WAIT_S:
                    say(f"NOTE: {self._label}: the server asks to wait {wait_s:.0f} s.")
                time.sleep(wait_s)
                tries += 1

    def _only_model(self) -> str:
        """The name of the server's only model."""
        try:
            listed = json.loads(self._server.get(f"{self._server.address.path}/models"))["data"]
            names = [self._server.without_key(str(entry["id"])) for entry in listed]
        except UnreachableError as error:
            raise describe_unreachable(self._label, self._server.address, error) from None
        except RefusedError as refusal:
            raise describe_refusal(self._label, "", refusal) from None
        except (BrokenError, *MALFORMED):
            names = []
        if len(names) != 1 or self._tokenizer is None:  # without -m, results are distinguished by this name
            present = f"; the server has {one_line(', '.join(names))}" if names else ""
            raise InputError(f"-b {self._label}: which model? Give -o {self._label}.model=NAME{present}")
        return names[0]


def describe_unreachable(label: str, address: Address, error: UnreachableError) -> InputError:
    """The error for a user whose server does not answer."""
    return InputError(
        f"-o {label}.base_url: no server answers at {address.host}:{address.port} ({error}); {error.remedy}."
        f"{unused_proxy(address)}"
    )


def describe_refusal(label: str, model: str, refusal: RefusedError) -> InputError:
    """The error for a user whose server refuses a request, and would refuse it again."""
    status, quote = refusal.status, f" It says: {refusal.message}" if refusal.message else ""
    if status == OK:
        return InputError(f"-b {label}: the server fails instead of answering.{quote}")
    if status in (401, 403):
        return InputError(
            f"-b {label}: the server refuses the key ({status}); put the right one into the environment variable "
            f"OPENAI_API_KEY.{quote}"
        )
    if status in (404, 405):
        return InputError(
            f"-o {label}.model={model}: the server has no such model, or nothing at this address ({status}); its "
            f"list is at /models below -o {label}.base_url, which ends in /v1 with most servers.{quote}"
        )
    if status == 407:
        return InputError(
            f"-b {label}: a proxy before the server asks for a key of its own (407); forward a local port to the "
            f"server (ssh -L), and give that as -o {label}.base_url.{quote}"
        )
    if 300 <= status < 400:
        where = f" to {refusal.message}" if refusal.message else ""
        return InputError(
            f"-o {label}.base_url: the server redirects ({status}){where}; give the address it redirects to"
        )
    if status == 429:  # asked before the words: quotas are exceeded as well
        return InputError(
            f"-b {label}: the server takes no more requests for now (429); wait, or raise the limit of its account or "
            f"its queue.{quote}"
        )
    if any(word in refusal.message.lower() for word in TOO_LONG):
        return InputError(
            f"-b {label}: the server's context is too small ({status}); start it with a larger one, or lower "
            f"--max-new-tokens.{quote}"
        )
    if status in OVERLOADED:
        return InputError(
            f"-b {label}: the server is overloaded, or not ready yet ({status}); wait, or ask it for fewer answers at "
            f"once.{quote}"
        )
    if status in NO_ANSWER:
        return InputError(
            f"-b {label}: what is in front of the server gets no answer from it in time ({status}); see whether it "
            f"runs, and give its own address.{quote}"
        )
    if status >= 500:
        return InputError(f"-b {label}: the server failed ({status}); its log says why.{quote}")
    advice = "change what it names" if quote else "it gives no reason; its log may"
    return InputError(f"-b {label}: the server refuses the request ({status}); {advice}.{quote}")
