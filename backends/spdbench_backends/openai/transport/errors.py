"""What may go wrong with a server, and its own words for it in one line."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable, Mapping
from typing import Any

MAX_MESSAGE_CHARS = 300
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What may be raised when a server's JSON does not have the expected form."""
TITLE = re.compile(r"<title>\s*([^<]*\S)\s*</title>", re.IGNORECASE)
"""What a page in HTML says in short."""
OWN_CERTIFICATE = (
    "if it is the server's own, set the environment variable SSL_CERT_FILE to the file (PEM) with that certificate or "
    "with the one that signed it"
)
OTHER_NAME = "give the address by a name that the certificate holds"
CERTIFICATE_REMEDIES = {
    9: "check this machine's clock",  # not valid yet
    10: "renew the certificate, or check this machine's clock",  # expired
    62: OTHER_NAME,
    64: OTHER_NAME,  # of an IP address
}
"""What to do about a certificate by OpenSSL's code, X509_V_ERR_*; `OWN_CERTIFICATE` for all others."""


class UnreachableError(Exception):
    """The server did not take the request: unknown host, closed port, connection dropped before any answer. `remedy` is
    what to do about it."""

    remedy = "start it, or correct the address"

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error) or type(error).__name__)
        if isinstance(error, ssl.SSLCertVerificationError):
            self.args = (f"its certificate is not trusted: {error.verify_message}",)
            self.remedy = CERTIFICATE_REMEDIES.get(error.verify_code, OWN_CERTIFICATE)
        elif isinstance(error, ssl.SSLError):
            self.remedy = "if it does not use TLS, the address begins with http://"


class BrokenError(Exception):
    """An answer ended in the wrong way: silence, a lost connection, something that is not HTTP."""


class LostError(BrokenError):
    """The connection ended before the answer did, which another try may not meet."""


class SilentError(LostError):
    """The server sent nothing useful within its time limit."""


class RefusedError(Exception):
    """The server refused the request with this status, which is 200 if the refusal came in a stream and named none;
    `message` is its explanation, in one line, or where it redirects to."""

    def __init__(self, status: int, message: str, retry_after_s: float | None) -> None:
        super().__init__(f"{status}: {message}" if message else str(status))
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def error_message(text: str, without_key: Callable[[str], str]) -> str:
    """The message of an error's body in one line: that in its JSON if it has the usual form, else all of it."""
    try:
        found: Any = only(json.loads(text))
        for key in ("errors", "error", "message", "detail"):
            if isinstance(found, Mapping) and key in found:
                found = only(found[key])
        shown = found if isinstance(found, str) else "" if found is None else json.dumps(found)
    except MALFORMED:
        title = TITLE.search(text)
        shown = text if title is None else title[1]
    return one_line(without_key(shown))  # shortened last, so that no part of a key is left


def only(event: Any) -> Any:
    """The object in a list of one, as which Google's servers send their errors; anything else as it is."""
    is_list_of_one = isinstance(event, list) and len(event) == 1 and isinstance(event[0], Mapping)
    return event[0] if is_list_of_one else event


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 3] + "..."
