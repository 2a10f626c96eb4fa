"""How to reach a model hub: endpoint, cache, offline mode, patience. Knows no repository and fetches nothing.

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
    """True if the user said that no network is to be asked."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return said or bool(constants.HF_HUB_OFFLINE)
