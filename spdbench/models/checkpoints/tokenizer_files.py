"""A model's tokenizer without its weights, for callers that only show answers: loads neither torch nor transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from spdbench import hub
from spdbench.input_files import read_json
from spdbench.models.checkpoints.folders import SOURCE_NOTE, optional_cache_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
Decode = Callable[[Sequence[int]], str]


def tokenizer_sha256(directory: Path) -> str | None:
    """The hash of the files that turn text into ids, without chat template and settings; None if there are none."""
    files = [file for name in TOKENIZER_FILES if (file := directory / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


def find_decoder(model_id: str, sha256: str | None, weights_sha256: str = "") -> Decode | None:
    """What turns a model's ids into text, without special tokens: from the caches of converted and of hub models.

    None where no cache holds the tokenizer whose hash is `sha256`, such as for a model from a folder. A
    folder that was converted from the file with the hash `weights_sha256` does too: versions differ in how they cut
    texts, never in what an id is.
    """
    from tokenizers import Tokenizer

    for file in _cached(model_id) if sha256 else ():
        try:
            if sha256 == tokenizer_sha256(file.parent) or weights_sha256 == _source(file.parent):
                tokenizer = Tokenizer.from_file(str(file))
                return lambda ids: str(tokenizer.decode(list(ids)))
        except Exception:  # a tokenizer that cannot be loaded is none; the library has no exception of its own
            continue
    return None


def _source(folder: Path) -> str | None:
    """The hash of the file that a folder was converted from; None for other folders."""
    note = folder / SOURCE_NOTE
    return str(read_json(note)["sha256"]) if note.exists() else None


def _cached(model_id: str) -> Iterator[Path]:
    """The tokenizer files that may be the model's."""
    if (cache := optional_cache_folder()) is not None:
        yield from sorted((cache / "models").glob("*/tokenizer.json"))
    if model_id.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model_id, "tokenizer.json", cache_dir=hub.cache_folder())
        except HFValidationError:
            return
        if isinstance(found, str):
            yield Path(found)
