"""HTTP to one server: connections, a key, JSON in, bytes out.

The key goes into one header and nowhere else: text from the server passes through `Server.without_key` before it is
kept or shown. This module does not know the content of requests and answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from typing import Any

from spdbench_backends.openai.transport.address import Address
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

CONNECT_TIMEOUT_S = 10.0
MAX_REASON_BYTES = 2**20
RECEIVED_BYTES = 2**16
MAX_CHUNK_BYTES = 2**40
MAX_BODY_BYTES = 2**24
SWITCHING, OK = 101, 200
"""Statuses between these are interim: another answer follows."""
MIN_KEY_LENGTH, LONGEST_WORD = 8, 16
"""A shorter key, or one of letters alone, is taken for a word that stands for none (`none`, `placeholder`)."""
HIDDEN = "***"
ZIPPED = frozenset({"gzip", "x-gzip", "deflate"})
"""Encodings of bodies that are read although they are not asked for."""
ANY_ZIPPED = 32 + zlib.MAX_WBITS
"""Has zlib read the headers of gzip and of deflate."""
MIDDLE = " in the middle of its answer"


class Server:
    """One server. Thread-safe: every thread opens its own connections; `close` ends all of them."""

    def __init__(self, address: Address, key: str, timeout_s: float) -> None:
        self.address = address
        self._key = key
        quoted = json.dumps(key)[1:-1]
        is_word = len(key) < MIN_KEY_LENGTH or (key.isalpha() and len(key) < LONGEST_WORD)
        forms = set[str]() if is_word else {key, quoted, quoted.replace("/", r"\/")}
        self._forms_of_key = sorted(forms, key=len, reverse=True)
        self.timeout_s = timeout_s
        self._sockets: set[socket.socket] = set()
        self._lock = Lock()

    def connect(self) -> Connection:
        """A new connection.

        Raises:
            UnreachableError: the server does not accept it.
        """
        address = self.address
        kind = HTTPSConnection if address.secure else HTTPConnection
        connection = kind(address.host, address.port, timeout=min(CONNECT_TIMEOUT_S, self.timeout_s))
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise UnreachableError(error) from None
        connection.sock.settimeout(self.timeout_s)
        with self._lock:
            self._sockets.add(connection.sock)
        return Connection(self, connection)

    def get(self, path: str) -> bytes:
        """The body at `path`, all of it.

        Raises:
            UnreachableError, BrokenError, RefusedError: the request failed.
        """
        with contextlib.closing(self.connect()) as connection:
            return connection.body(connection.ask("GET", path, None))

    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", "Accept": "text/event-stream, application/json", **key}

    def without_key(self, text: str) -> str:
        """Text from the server with `***` for the key, plain or as JSON escapes it, but for a word that
        people give servers without keys (`none`), which answers may hold. Halves of surrogate pairs, which
        cannot be written to a file, are joined where both are there; `?` stands for others."""
        for form in self._forms_of_key:
            text = text.replace(form, HIDDEN)
        if text.isascii():
            return text
        joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return joined.encode(errors="replace").decode()

    def forget(self, used: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(used)

    def close(self) -> None:
        """Ends every connection, so that threads that wait on one stop waiting."""
        with self._lock:
            for used in self._sockets:
                with contextlib.suppress(OSError):
                    used.shutdown(socket.SHUT_RDWR)


class Incoming(io.RawIOBase):
    """Reads from a socket until a deadline. Data that comes in does not extend the deadline; only `renew` does.
    `is_alive` is true if any came in since then.

    Replaces the socket inside `HTTPConnection`.
    """

    def __init__(self, used: socket.socket, timeout_s: float) -> None:
        self._socket = used
        self._timeout_s = timeout_s
        self.sendall = used.sendall
        self.renew()

    def renew(self, limit_s: float = math.inf) -> None:
        self._deadline = time.monotonic() + min(self._timeout_s, limit_s)
        self.is_alive = False

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        count = self._socket.recv_into(buffer)
        self.is_alive = self.is_alive or count > 0
        return count

    def close(self) -> None:
        """Does nothing, since `HTTPConnection` closes its socket before the answer has been read from it."""


class Connection:
    """One connection, for one request."""

    def __init__(self, server: Server, connection: HTTPConnection) -> None:
        self._server = server
        self._connection = connection
        self._socket: socket.socket = connection.sock
        self._incoming = Incoming(self._socket, server.timeout_s)
        connection.sock = self._incoming

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        """Sends a request; the answer with its body still to be read.

        Raises:
            UnreachableError: the server closed the connection before it answered.
            BrokenError: it was silent for too long, or does not speak HTTP.
            RefusedError: its status is not 2xx.
        """
        self.renew()
        try:
            text = None if body is None else json.dumps(body).encode()
            self._connection.request(method, path, text, self._server.headers())
            response = self._connection.getresponse()
            while SWITCHING < response.status < OK:  # http.client itself skips 100 alone
                response.headers = None  # type: ignore[assignment]
                response.begin()
        except TimeoutError:
            raise self._silence() from None
        except OSError as error:  # includes a dropped connection
            raise UnreachableError(error) from None
        except (HTTPException, *MALFORMED) as error:
            raise BrokenError(f"the server does not speak HTTP ({type(error).__name__})") from None
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        self.renew()
        return response

    def renew(self, limit_s: float = math.inf) -> None:
        """Restarts the server's time limit, or a shorter one, after it has sent something useful."""
        self._incoming.renew(limit_s)

    def _silence(self, where: str = "") -> SilentError:
        """The error for a server whose time is over; `where` it was, with a space in front."""
        what = "only kept the connection alive" if self._incoming.is_alive else "said nothing"
        limit = f"{self._server.timeout_s:g} s"
        return SilentError(f"the server {what} for {limit}{where}; if it needs longer to begin, raise timeout_s")

    def body(self, response: HTTPResponse) -> bytes:
        """The whole body of an answer."""
        unzip = _unzipper(response)
        try:
            return unzip(response.read(MAX_BODY_BYTES))
        except TimeoutError:
            raise self._silence(MIDDLE) from None
        except (OSError, HTTPException, *MALFORMED) as error:
            raise LostError(f"the answer broke off ({type(error).__name__})") from None

    def pieces(self, response: HTTPResponse) -> Iterator[bytes]:
        """The answer's bytes as they come. The caller has to `renew` after useful ones.

        Raises:
            BrokenError: the server's time is over, the connection was lost, or it sends what cannot be read.
        """
        unzip = _unzipper(response)
        left = math.inf if response.length is None else response.length  # Python 3.11.6 does not count it down
        while left > 0:
            try:
                piece = response.read1(RECEIVED_BYTES)
                if isinstance(response.chunk_left, int) and not 0 <= response.chunk_left < MAX_CHUNK_BYTES:
                    raise ValueError("the size of a chunk that cannot be")
            except TimeoutError:
                raise self._silence(MIDDLE) from None
            except (OSError, HTTPException, *MALFORMED) as error:
                raise LostError(f"the connection was lost in the middle of the answer ({_error_name(error)})") from None
            if not piece:
                return
            left -= len(piece)
            if text := unzip(piece):
                yield text

    def close(self) -> None:
        self._server.forget(self._socket)
        self._connection.close()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a response that is still open would keep the connection alive
        self._socket.close()

    def _refusal(self, response: HTTPResponse) -> RefusedError:
        try:
            data = _unzipper(response)(response.read(MAX_REASON_BYTES))
        except (OSError, HTTPException, BrokenError, *MALFORMED):
            data = b""
        text = data.decode(errors="replace") if len(data) < MAX_REASON_BYTES else ""
        message = error_message(text, self._server.without_key)
        if 300 <= response.status < 400:
            message = one_line(self._server.without_key(response.getheader("Location") or ""))
        return RefusedError(response.status, message, _retry_after_s(response.getheader("Retry-After")))


def encoding_of(response: HTTPResponse) -> str:
    """How the body is compressed, in lower case; empty where it is not."""
    encoding = (response.getheader("Content-Encoding") or "").strip().lower()
    return "" if encoding == "identity" else encoding


def _unzipper(response: HTTPResponse) -> Callable[[bytes], bytes]:
    """Makes pieces of a body what they were before the server compressed them.

    Raises:
        BrokenError: they are compressed in a way that cannot be read, here or by the function that it returns.
    """
    encoding = encoding_of(response)
    if not encoding:
        return bytes
    if encoding not in ZIPPED:
        raise BrokenError(
            f"the server compresses its answers ({one_line(encoding)}), which was not asked for; switch that off in "
            "the server, or in the proxy before it"
        )
    inflater = zlib.decompressobj(ANY_ZIPPED)

    def unzip(piece: bytes) -> bytes:
        try:
            text = inflater.decompress(piece, MAX_BODY_BYTES)
        except zlib.error:
            raise BrokenError(f"the server's answer is not {encoding}, as it says") from None
        if inflater.unconsumed_tail:
            raise BrokenError("the server's answer is far larger than it comes over the line")
        return text

    return unzip


def _retry_after_s(retry_after: str | None) -> float | None:
    """The header `Retry-After` in seconds; it holds seconds or a date. None for anything else."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (*MALFORMED, OSError):
        return None


def _error_name(error: Exception) -> str:
    """The system's words for an error, without its number; else the error's type."""
    return getattr(error, "strerror", None) or type(error).__name__
