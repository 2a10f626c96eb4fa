"""spdbench: measures speculative decoding methods against a baseline that can be believed."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spdbench.api import Comparison, Result, compare, load, run
    from spdbench.errors import BackendLostError, InputError, NotComparableError, SpdbenchError

__version__ = "0.1.0"

PLACES = {
    **dict.fromkeys(("Comparison", "Result", "compare", "load", "run"), "spdbench.api"),
    **dict.fromkeys(("BackendLostError", "InputError", "NotComparableError", "SpdbenchError"), "spdbench.errors"),
}
"""What `import spdbench` offers, and where it is: imported when first asked for, so that importing stays light."""

__all__ = [
    "BackendLostError",
    "Comparison",
    "InputError",
    "NotComparableError",
    "Result",
    "SpdbenchError",
    "__version__",
    "compare",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    raise AttributeError(f"module 'spdbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# After an operator that they shared, OpenMP's threads look for more work for milliseconds, and take cores from the
# threads that share the target's matrix multiplications (models/cpu/worker_pool.py): EAGLE's rounds took half as long
# again. With this count it is some 30 microseconds. libgomp reads it when torch is loaded; a user's own choice is not
# overruled.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
