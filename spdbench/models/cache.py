"""Where spdbench keeps what it fetched or converted. Knows folders, nothing of what is in them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SPDBENCH_CACHE`, else `$XDG_CACHE_HOME/spdbench`, else `~/.cache/spdbench`. May not exist yet."""
    if own := os.environ.get("SPDBENCH_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spdbench"


def data_folder() -> Path:
    """The user's own data: `$XDG_DATA_HOME/spdbench`, else `~/.local/share/spdbench`. May not exist yet."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "spdbench"
