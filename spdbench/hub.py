"""How to reach a model hub: endpoint, cache, offline mode, time limit.

Settings are read when they are needed, since huggingface_hub reads its own once, when it is imported.
"""

from __future__ import annotations

import os

TIMEOUT_S = 10.0


def endpoint() -> str | None:
    """`$HF_ENDPOINT`, or None for the client's default."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def cache_folder() -> str | None:
    """`$HF_HUB_CACHE`, or None for the client's default."""
    return os.environ.get("HF_HUB_CACHE") or None


def offline() -> bool:
    """True if the user has forbidden network access to the hub."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return said or bool(constants.HF_HUB_OFFLINE)
