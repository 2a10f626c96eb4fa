"""The address of a server, from its URL."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

VERSION = re.compile(r"/v[0-9]+$")
NO_ADDRESS = "is not an address; expected http://HOST:PORT/v1"


@dataclass(frozen=True)
class Address:
    """The parts of a base URL; `path` is the part before `/chat/completions`."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def has_version(self) -> bool:
        return VERSION.search(self.path) is not None

    @property
    def roots(self) -> tuple[str, ...]:
        """Where a server may have what is not below `/v1`: next to that, or, behind a proxy, at the root."""
        return tuple(dict.fromkeys((VERSION.sub("", self.path), "")))


def parse_address(url: str) -> Address:
    """The parts of `url`.

    Raises:
        ValueError: it cannot be used. The message does not repeat it, since it may hold a password.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as the resolver does; a UnicodeError is a ValueError
    except ValueError:
        raise ValueError(NO_ADDRESS) from None
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[^\s\x00-\x20\x7f]+", host):
        raise ValueError(NO_ADDRESS)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("holds more than an address; a key goes into the environment variable OPENAI_API_KEY")
    secure = parts.scheme == "https"
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~", errors="replace")
    return Address(secure, host, port or (443 if secure else 80), path)


def unused_proxy(address: Address) -> str:
    """A sentence on the proxy that the environment has for `address`; empty if there is none."""
    names = getproxies()
    found = names.get("https" if address.secure else "http") or names.get("all")
    if not found or proxy_bypass(f"{address.host}:{address.port}"):
        return ""
    return " The proxy of the environment is not used, as it would be timed too: forward a local port to the server."
