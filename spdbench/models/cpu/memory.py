"""Memory that was freed, given back to the system. Knows nothing of what it held."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """What converting weights needed for a while would else stay with the process (glibc: malloc_trim(3))."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
