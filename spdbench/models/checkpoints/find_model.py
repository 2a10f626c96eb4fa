"""Finds a model by what the user calls it: `smollm2`, a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from spdbench.errors import InputError
from spdbench.models.checkpoints import embedded
from spdbench.models.checkpoints.folders import cache_folder, typed_path
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.hf import library

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `id` is its name in results; `sha256` is that of its published weights. `gguf` is the file that
    the folder was converted from, if any."""

    id: str
    directory: Path
    sha256: str
    gguf: Path | None = None

    @property
    def tokenizer_sha256(self) -> str | None:
        """The hash of the files that turn text into ids, without chat template and settings; None if there are none."""
        files = [file for name in TOKENIZER_FILES if (file := self.directory / name).is_file()]
        return sha256_of_files(files) if files else None


def find_model(name: str) -> ModelFiles:
    """The folder of the model called `name`; fetches or converts it once if needed, with a message on stderr.

    Raises:
        InputError: there is nothing by that name, or it is not a model.
    """
    if name == embedded.NAME:
        return _from_gguf(name, embedded.embedded_gguf())
    path = typed_path(name)
    if os.path.isfile(path):  # Path.is_file raises for names too long to be one
        if path.suffix != ".gguf":
            raise InputError(f"-m {name}: is a file but not a .gguf; give a model folder, a GGUF file, or a hub id")
        return _from_gguf(path.stem, path)
    if os.path.isdir(path):
        return _from_folder(path.resolve().name, path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"-m {name}: no such folder or file, and not a hub id (OWNER/NAME). The embedded model is `smollm2`."
        )
    return _from_folder(name, library.download(name))


def _from_folder(identity: str, directory: Path) -> ModelFiles:
    if note := _read_source_note(directory):
        return ModelFiles(identity, directory, note["sha256"])
    return ModelFiles(identity, directory, sha256_of_files(Checkpoint(directory).files))


def _from_gguf(identity: str, file: Path) -> ModelFiles:
    sha256 = sha256_of_files([file])
    directory = cache_folder() / "models" / f"{file.stem}-{sha256[:12]}"
    if not directory.exists():
        print(f"Converting {file.name} once (about 20 s for 135M parameters) ...", file=sys.stderr, flush=True)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".converting-"))
        except OSError as error:
            raise InputError(
                f"{directory.parent}: the cache cannot be written ({error.strerror}); set SPDBENCH_CACHE"
            ) from None
        try:
            library.convert_gguf(file, scratch)
            _write_source_note(scratch, file.name, sha256)
            _rename_unless_there(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return ModelFiles(identity, directory, sha256, file)


def _rename_unless_there(scratch: Path, directory: Path) -> None:
    try:
        scratch.rename(directory)
    except OSError:
        if not directory.exists():  # else another process converted the same file meanwhile, to the same bytes
            raise


def _write_source_note(directory: Path, source: str, sha256: str) -> None:
    """Notes in a converted folder what it was made from: the hash of a model is that of its published file."""
    note = {"source": source, "sha256": sha256}
    (directory / "spdbench.json").write_text(json.dumps(note), encoding="utf-8")


def _read_source_note(directory: Path) -> dict[str, str] | None:
    try:
        note: dict[str, str] = json.loads((directory / "spdbench.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note
