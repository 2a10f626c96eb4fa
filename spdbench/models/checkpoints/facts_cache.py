"""What transformers makes of a model folder's small files, kept as plain data in the cache.

Importing transformers takes longer than anything else at the start of a run, and what it is asked for (a config with
all its defaults, a tokenizer) depends only on the small files of the folder and on the versions of a few libraries.
An entry is used only where all of these are the same; a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from spdbench.models.checkpoints.folders import optional_cache_folder
from spdbench.output_files import cached_file

Facts = TypeVar("Facts")

FORMAT = 2
"""Changes with what an entry holds or is checked for, so that no entry of an earlier version is used."""
LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "mistral-common", "tiktoken", "protobuf")
"""Decide what becomes of the files, some of them by being installed."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
SMALL_BYTES = 1 << 26
"""Of files above this size and of weights, size and time of change stand for the content."""
UNUSED_S = 60 * 86400
"""An entry that was not used for so long is removed when another one is written."""


def cached_facts(directory: Path, kind: str, facts_type: Any, make: Callable[[], Facts | None]) -> Facts | None:
    """The facts called `kind` about the model in `directory`: from the cache, else from `make`, and then kept.

    `facts_type` is what pydantic can read back from JSON. Facts that are None are not kept.
    """
    from pydantic import TypeAdapter, ValidationError

    if (cache := optional_cache_folder()) is None:
        return make()
    adapter: TypeAdapter[Facts] = TypeAdapter(facts_type)
    folder = cache / "facts"
    path = folder / f"{directory.name[:40]}-{_key(directory)}.{kind}.json"
    with suppress(OSError, ValueError, ValidationError):
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == digest:
            facts = adapter.validate_json(content)
            with suppress(OSError):
                os.utime(path)
            return facts
    made = make()
    if made is not None:
        content = adapter.dump_json(made)
        with suppress(OSError):  # a cache that cannot be written costs time, not correctness
            remove_unused(folder, UNUSED_S)
            with cached_file(path) as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return made


def remove_unused(folder: Path, seconds: float) -> None:
    """Removes the files of `folder` that were not used for so long."""
    for file in folder.glob("*"):
        with suppress(OSError):
            if file.stat().st_mtime < time.time() - seconds:
                file.unlink()


def _key(directory: Path) -> str:
    """16 hex digits over everything that facts depend on."""
    digest = hashlib.sha256(repr((FORMAT, str(directory.resolve()), *_versions())).encode())
    for path in sorted([*directory.glob("*"), *directory.glob("*/*.jinja")]):
        if not path.is_file():
            continue
        found, name = path.stat(), str(path.relative_to(directory))
        if found.st_size > SMALL_BYTES or path.suffix in WEIGHTS:
            digest.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
        else:
            content = path.read_bytes()
            digest.update(repr((name, len(content))).encode() + content)
    return digest.hexdigest()[:16]


def _versions() -> Iterator[str]:
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"
