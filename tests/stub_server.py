"""A server of OpenAI's protocol on loopback that answers from a list, and has any fault that a test selects."""

from __future__ import annotations

import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple

Offer = Literal["ids", "running_usage", "usage", "logprobs", "timings"]
Fault = Literal[
    "die",
    "stall",
    "malformed",
    "error",
    "no_end",
    "cut",
    "no_stream",
    "endless_line",
    "silent",
    "dribble",
    "nothing_said",
    "without_end",
]
ENDLESS: Mapping[str, bytes] = {
    "dribble": b" ",
    "nothing_said": b'data: {"choices": [{"delta": {"content": ""}}]}\n\n',
    "without_end": b'data: {"choices": [{"delta": {"content": " x"}, "token_ids": [5]}], "usage": null}\n\n',
}
ANSWER = (("One",), (" two", ","), (" three",), (" four", " five", " six"), (".",))
"""Chunks of an answer, and the tokens in each."""


class Refusal(NamedTuple):
    status: int
    body: str = ""
    headers: Mapping[str, str] = {}


LAST = b"[DONE]"


class StubServer:
    """Answers `answer`, up to the requested limit; reports what it `offers` of its tokens.

    The first requests get `refusals`, one each; `refuses` are fields that it does not accept. `fault` happens after
    two chunks, where it also sends the events in `inserted`. `stated` replaces the number of tokens in its usage.
    It accepts only `key` and `model`. Chunks come `pause_s` apart. `counts_end` if it counts the end of sequence as
    a token; `lists_ids` if its log-probabilities have ids, as llama.cpp's; `last_words` makes further keys of the event
    with usage from the request. `next_logprobs` are those of the next token, in answers that are not streamed.
    `counters` makes its text for Prometheus. Answers have this `status` and `content_type`, each event in a `frame`,
    all of them in this `encoding`, of which it can do gzip. Counters are below `root`.
    `asked` collects the bodies of all requests, `headers` their headers.
    """

    def __init__(self, port: int = 0) -> None:
        self.answer: Sequence[Sequence[str]] = ANSWER
        self.offers: set[Offer] = {"usage"}
        self.refusals: list[Refusal] = []
        self.fault: Fault | None = None
        self.key: str | None = None
        self.model = "stub"
        self.models: Sequence[str] = ("stub",)
        self.context = 10**6
        self.takes_ids = False
        self.next_logprobs: Mapping[str, float] | None = None
        self.refuses: set[str] = set()
        self.inserted: Sequence[bytes] = ()
        self.stated: int | None = None
        self.counts_end = False
        self.lists_ids = False
        self.counters: Callable[[], str] | None = None
        self.root = ""
        self.last_words: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self.pause_s = 0.0
        self.status = 200
        self.content_type: str | None = "Text/Event-Stream; charset=utf-8"
        self.encoding: str | None = None
        self.frame: Callable[[bytes], bytes] = lambda data: b"data: " + data + b"\n\n"
        self._lock = threading.Lock()
        self._here = threading.local()
        self._released = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stub.get(self)

            def do_POST(self) -> None:
                stub.enter()
                try:
                    stub.post(self)
                finally:
                    stub.leave()

            def log_message(self, *_: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Quiet(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def stop_listening(self) -> None:
        """Takes no connections any more, from now on. A socket that is only closed stays open while another thread
        polls it, and who connects in that time is reset later."""
        with suppress(OSError):  # some systems do not shut a listening socket down
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.socket.close()

    def enter(self) -> None:
        """Counts one more request at once."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        self._here.is_counted = True

    def leave(self) -> None:
        """Ends what `enter` began in this thread, once."""
        if getattr(self._here, "is_counted", False):
            self._here.is_counted = False
            with self._lock:
                self._at_once -= 1

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            return self.send(handler, 200, json.dumps({"data": [{"id": name} for name in self.models]}))
        if handler.path == f"{self.root}/metrics" and self.counters is not None:
            return self.send(handler, 200, self.counters(), {"Content-Type": "text/plain"})
        return self.send(handler, 404, "")

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.asked.append(body)
            self.headers.append(dict(handler.headers))
            refusal = self.refusals.pop(0) if self.refusals else self.objection(handler, body)
        if refusal is not None:
            return self.send(handler, refusal.status, refusal.body, refusal.headers)
        if self.fault == "silent":
            self._released.wait(60)
            return None
        if not body.get("stream") or self.fault == "no_stream":
            usage = {"completion_tokens": len(self.tokens(body))}
            listed = {"logprobs": {"top_logprobs": [self.next_logprobs]}} if body.get("logprobs") else {}
            return self.send(handler, 200, json.dumps({"choices": [listed], "usage": usage}))
        handler.send_response(self.status)
        if self.content_type is not None:
            handler.send_header("Content-Type", self.content_type)
        handler.send_header("Transfer-Encoding", "chunked")
        frame = self.frame
        if self.encoding is not None:
            handler.send_header("Content-Encoding", self.encoding)
            frame = partial(compressed, zlib.compressobj(wbits=16 + zlib.MAX_WBITS), self.frame)
        handler.end_headers()
        for number, event in enumerate(self.events(handler, body)):
            if number >= 3 and self.fault is not None:
                return self.fail(handler)
            if event == LAST:  # once it is sent, the client may ask again before this thread goes on
                self.leave()
            for one in (*(self.inserted if number == 3 else ()), event):
                self.write(handler, frame(one))
        self.write(handler, b"")
        return None

    def objection(self, handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> Refusal | None:
        """The refusal of this request, if it is not acceptable."""
        sent = handler.headers.get("Authorization", "")
        if self.key is not None and sent != f"Bearer {self.key}":
            return Refusal(401, json.dumps({"error": {"message": f"Incorrect API key provided: {sent}"}}))
        if body["model"] != self.model:
            return Refusal(404, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}}))
        if isinstance(body.get("prompt"), list) and not self.takes_ids:
            return Refusal(422, json.dumps({"detail": "prompt: str type expected"}))
        if refused := self.refuses & body.keys():
            words = f"{', '.join(sorted(refused))} is not supported with streaming"
            return Refusal(400, json.dumps({"error": {"message": words}}))
        length = len(json.dumps(body.get("messages") or body.get("prompt")))
        if length > self.context:
            words = f"This model's maximum context length is {self.context} tokens."
            return Refusal(400, json.dumps({"error": {"message": words}}))
        return None

    def tokens(self, body: Mapping[str, Any]) -> list[str]:
        return [token for chunk in self.answer for token in chunk][: body["max_tokens"]]

    def events(self, handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> Iterator[bytes]:
        chat = handler.path.endswith("/chat/completions")
        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        room, sent = body["max_tokens"], 0
        for chunk in self.answer:
            kept = list(chunk)[: room - sent]
            self._released.wait(self.pause_s)
            if not kept:
                break
            choice = {"delta": {"content": "".join(kept)}} if chat else {"text": "".join(kept)}
            report = self.report(body, kept, sent)
            sent += len(kept)
            more = {"usage": self.usage(sent)} if self.shows("running_usage", body) else {}
            if "timings" in self.offers and body.get("timings_per_token"):
                more = {"timings": {"predicted_n": sent}}
            yield event({"choices": [choice | report], **more})
        finish = "length" if sent == room else "stop"
        ended = self.counts_end and finish == "stop"
        report = self.report(body, ["</s>"], sent) if ended else {}
        yield event({"choices": [{"delta": {}, "text": "", "finish_reason": finish} | report]})
        if self.shows("usage", body):
            yield event({"choices": [], "usage": self.usage(sent + ended), **self.last_words(body)})
        yield LAST

    def report(self, body: Mapping[str, Any], tokens: Sequence[str], first: int) -> dict[str, Any]:
        """What a chunk reports of its tokens besides their text."""
        found: dict[str, Any] = {}
        if "ids" in self.offers and body.get("return_token_ids"):
            found["token_ids"] = [2 if token == "</s>" else 100 + first + i for i, token in enumerate(tokens)]
        if "logprobs" in self.offers and body.get("logprobs"):
            ids = [
                {"id": 100 + first + i} if self.lists_ids and token != "</s>" else {} for i, token in enumerate(tokens)
            ]
            found["logprobs"] = {
                "content": [{"token": token, "logprob": -0.5, **own} for token, own in zip(tokens, ids, strict=True)]
            }
        return found

    def usage(self, num_tokens: int) -> dict[str, int]:
        return {"prompt_tokens": 11, "completion_tokens": num_tokens if self.stated is None else self.stated}

    def shows(self, offer: Offer, body: Mapping[str, Any]) -> bool:
        asked = body.get("stream_options") or {}
        wanted = asked.get("include_usage") if offer == "usage" else asked.get("continuous_usage_stats")
        return bool(offer in self.offers and wanted)

    def fail(self, handler: BaseHTTPRequestHandler) -> None:
        """Ends the answer as `fault` says."""
        if self.fault == "stall":
            self._released.wait(60)
        elif self.fault == "malformed":
            self.write(handler, b"data: {not json\n\n")
        elif self.fault == "error":
            self.write(handler, b'data: {"error": {"message": "out of memory"}}\n\n')
        elif self.fault in ("no_end", "cut"):
            if self.fault == "cut":
                self.write(handler, b'data: {"choices": [{"del')
            self.write(handler, b"")
        elif self.fault == "endless_line":
            self.write(handler, b"data: " + b"x" * (17 * 2**20))
        elif self.fault is not None and self.fault in ENDLESS:
            while not self._released.wait(0.02):
                self.write(handler, ENDLESS[self.fault])
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def write(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        handler.wfile.flush()

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        data = text.encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(data)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(data)


def compressed(packer: Any, frame: Callable[[bytes], bytes], data: bytes) -> bytes:
    return bytes(packer.compress(frame(data)) + packer.flush(zlib.Z_SYNC_FLUSH))


def event(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()
