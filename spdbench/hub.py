"""How to reach a model hub: endpoint, cache, offline mode, time limit.

Settings are read when they are needed, since huggingface_hub reads its own once, when it is imported.
"""

from __future__ import annotations

import os

TIMEOUT_S = 10.0
MAX_CAUSES = 10
REMEDIES = {
    "CERTIFICATE_VERIFY_FAILED": (
        "set SSL_CERT_FILE, or REQUESTS_CA_BUNDLE for older clients, to the file (PEM) with the certificate that "
        "signs for this network"
    ),
    "ProxyError": "set HTTPS_PROXY to the proxy of this network, or NO_PROXY for a hub within it",
}
"""What to do, by what the client's errors say."""


def endpoint() -> str | None:
    """`$HF_ENDPOINT`, or None for the client's default."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def cache_folder() -> str | None:
    """`$HF_HUB_CACHE`, or None for the client's default."""
    return os.environ.get("HF_HUB_CACHE") or None


def advice(error: BaseException) -> str:
    """`; ` and what to do where a certificate or a proxy kept the hub out of reach; empty for other causes."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < MAX_CAUSES:  # the HTTP library's own error is behind the client's
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    return next((f"; {remedy}" for sign, remedy in REMEDIES.items() if any(sign in text for text in texts)), "")


def offline() -> bool:
    """True if the user has forbidden network access to the hub."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return said or bool(constants.HF_HUB_OFFLINE)


def full_cache(reason: str) -> str:
    """What to say where a download cannot be written for `reason`."""
    from huggingface_hub import constants

    folder = cache_folder() or constants.HF_HUB_CACHE
    return f"the download cannot be written to {folder} ({reason}); make room there, or set HF_HUB_CACHE"
