"""Finds a model by what the user calls it: `smollm2`, a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.input_files import read_json
from spdbench.models.checkpoints import embedded
from spdbench.models.checkpoints.folders import SOURCE_NOTE, cache_folder, typed_model
from spdbench.models.checkpoints.tokenizer_files import tokenizer_sha256
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.hf import library
from spdbench.models.hf.download import download
from spdbench.output_files import write_failure

ADAPTER = "adapter_config.json"
CONVERSION = 5
"""Changes with what a conversion makes of a file, so that no folder of an earlier version is used: raise it whenever
`library.convert_gguf` writes other files than before. A test fails when the code behind it changes, so that it is
not forgotten."""


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
        return tokenizer_sha256(self.directory)


def find_model(name: str) -> ModelFiles:
    """The folder of the model called `name`; fetches or converts it once if needed, with a message on stderr.

    Raises:
        InputError: there is nothing by that name, or it is not a model.
    """
    if name == embedded.NAME:
        return _from_gguf(name, embedded.embedded_gguf())
    path = typed_model(name)
    if path is None:
        return _from_folder(name, download(name))
    return _from_folder(path.resolve().name, path) if os.path.isdir(path) else _from_gguf(path.stem, path)


def _from_folder(identity: str, directory: Path) -> ModelFiles:
    if os.path.exists(directory / ADAPTER):
        raise InputError(
            f"{directory}: holds an adapter ({ADAPTER}), such as LoRA makes, which is not applied. Merge it into its "
            "model and give that folder (peft: `merge_and_unload`, then `save_pretrained`), or remove the adapter's "
            "files."
        )
    if sha256 := _read_source_note(directory):
        return ModelFiles(identity, directory, sha256)
    return ModelFiles(identity, directory, sha256_of_files(Checkpoint(directory).files))


def _from_gguf(identity: str, file: Path) -> ModelFiles:
    sha256 = sha256_of_files([file])
    # The version keeps folders apart that earlier conversions made; names from outside may be too long for a folder.
    directory = cache_folder() / "models" / f"{file.stem[:60]}-{sha256[:12]}-v{CONVERSION}"
    if not directory.exists():
        say(f"Converting {file.name} once, {file.stat().st_size / 1e6:.0f} MB (about 20 s for each 100 MB) ...")
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            scratch = directory.with_name(f".converting-{os.urandom(8).hex()}")
            scratch.mkdir()
        except OSError as error:
            raise embedded.cache_error(directory.parent, error) from None
        try:
            _write_source_note(scratch, file.name, sha256, library.convert_gguf(file, scratch))
            _give_usual_mode(scratch)
            _rename_unless_there(scratch, directory)
        except Exception as error:  # safetensors has an error of its own for a full disk
            if (reason := write_failure(error)) is None:
                raise
            raise InputError(
                f"{directory.parent}: the converted model cannot be written ({reason}; as float32 it is several "
                "times as large as the file). Make room there, or set SPDBENCH_CACHE to a folder that has it."
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _read_source_note(directory)
    return ModelFiles(identity, directory, sha256, file)


def _give_usual_mode(scratch: Path) -> None:
    """Gives all files the mode that the umask gives to new ones, as the note has it. safetensors' own are for their
    owner alone, and a cache may be shared."""
    mode = (scratch / SOURCE_NOTE).stat().st_mode
    for file in scratch.iterdir():
        file.chmod(mode)


def _rename_unless_there(scratch: Path, directory: Path) -> None:
    try:
        scratch.rename(directory)
    except OSError:
        if not directory.exists():  # else another process converted the same file meanwhile, to the same bytes
            raise


def _write_source_note(directory: Path, source: str, sha256: str, warning: str) -> None:
    """Notes in a converted folder what it was made from: the hash of a model is that of its published file."""
    note = {"source": source, "sha256": sha256} | ({"warning": warning} if warning else {})
    (directory / SOURCE_NOTE).write_text(json.dumps(note), encoding="utf-8")


def _read_source_note(directory: Path) -> str | None:
    """The hash of the file that a converted folder was made from; None for other folders. Says its warning."""
    path = directory / SOURCE_NOTE
    if not os.path.exists(path):
        return None
    note = read_json(path)
    sha256 = note.get("sha256") if isinstance(note, dict) else None
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(
            f"{path}: sha256 is {reprlib.repr(sha256)}, expected 64 hexadecimal digits; convert the model again"
        )
    if isinstance(warning := note.get("warning"), str):
        say(warning)
    return sha256
