"""Where spdbench keeps what it fetched or converted, and paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from spdbench.errors import InputError

SOURCE_NOTE = "spdbench.json"
"""In a converted model's folder: what it was made from."""


def cache_folder() -> Path:
    """`$SPDBENCH_CACHE`, else `$XDG_CACHE_HOME/spdbench`, else `~/.cache/spdbench`. May not exist yet.

    Raises:
        InputError: none of these is set, and the user has no home.
    """
    if own := os.environ.get("SPDBENCH_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home("SPDBENCH_CACHE") / ".cache") / "spdbench"


def optional_cache_folder() -> Path | None:
    """`cache_folder()` for what may do without: None where the user has none."""
    try:
        return cache_folder()
    except InputError:
        return None


def data_folder() -> Path:
    """The user's own data: `$XDG_DATA_HOME/spdbench`, else `~/.local/share/spdbench`. May not exist yet."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else _home("XDG_DATA_HOME") / ".local" / "share") / "spdbench"


def _home(variable: str) -> Path:
    """The user's home; an `InputError` that names the `variable` to set where nothing says where that is."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user who is in no list, as in some containers
        raise InputError(
            f"this user has no home folder (HOME is not set); set {variable} to a folder that can be written"
        ) from None


def typed_path(text: str) -> Path:
    """The path that a user typed; the `~name` of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(text))


def typed_model(name: str) -> Path | None:
    """The model folder or GGUF file that a user typed, other than the embedded model; None for a name on the hub.

    Raises:
        InputError: there is none at this path, and a hub id (OWNER/NAME) looks otherwise.
    """
    path = typed_path(name)
    if os.path.isfile(path):  # Path.is_file raises for names too long to be one
        if path.suffix != ".gguf":
            raise InputError(f"-m {name}: is a file but not a .gguf; give a model folder, a GGUF file, or a hub id")
        return path
    if os.path.isdir(path):
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"-m {name}: no such folder or file, and not a hub id (OWNER/NAME). The embedded model is `smollm2`."
        )
    return None


def drafter_folders() -> list[Path]:
    """The folders that are searched for drafters, first to last; they need not exist."""
    own = os.environ.get("SPDBENCH_DRAFTERS")
    shipped = Path(__file__).parents[2] / "drafters"
    try:
        trained = [data_folder() / "drafters"]
    except InputError:  # nothing can have been put there
        trained = []
    return [*([Path(own)] if own else []), *trained, shipped]
