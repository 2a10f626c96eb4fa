"""Weights on disk: finds the files of a model folder, reads tensors by name, hashes them.

Reads safetensors, whole or sharded, and PyTorch `.bin` files (`weights_only`).
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spdbench.errors import InputError
from spdbench.input_files import not_downloaded, read_json
from spdbench.models.checkpoints.folders import optional_cache_folder
from spdbench.output_files import cached_file

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MEMO = "hashes.json"
NARROW_FLOATS = ("torch.float8", "torch.float4", "F8_", "F6_", "F4")


class Checkpoint:
    """The tensors of a model folder by name. Files are opened when they are needed. Call `close` at the end, and now
    and then while reading, since pages that were read stay in memory until then."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _weight_files(directory)
        self._stack = ExitStack()
        self._bins: dict[Path, dict[str, torch.Tensor]] = {}

    @cached_property
    def _where(self) -> dict[str, tuple[Path, Any]]:
        """Tensor name -> (file, open handle)."""
        where: dict[str, tuple[Path, Any]] = {}
        for path in self.files:
            try:
                if path.suffix == ".safetensors":
                    handle: Any = self._stack.enter_context(safe_open(path, framework="pt"))
                    names = list(handle.keys())
                else:
                    handle = _dense_tensors(path, load_torch_file(path))
                    names = list(handle)
            except InputError:
                raise
            except Exception as error:  # the reader libraries raise types of their own for broken files
                why = not_downloaded(path)
                raise InputError(
                    f"{path}: cannot be read as weights" + (f": it is {why}" if why else f" ({error})")
                ) from None
            if twice := next((name for name in names if name in where), None):
                raise InputError(
                    f"{self.directory}: tensor {twice} is in {where[twice][0].name} and in {path.name}, and libraries "
                    "differ in which of the two they use; remove one"
                )
            where.update(dict.fromkeys(names, (path, handle)))
        return where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def stored(self, name: str) -> torch.Tensor:
        """The tensor called `name`, which must exist, in the shape and dtype in which it is stored."""
        _, handle = self._where[name]
        found: torch.Tensor = handle[name] if isinstance(handle, dict) else handle.get_tensor(name)
        return found

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`, as stored.

        Raises:
            InputError: it is missing, has another shape, or is quantised.
        """
        if name not in self._where:
            raise InputError(f"{self.directory}: tensor {name} is missing from the weights")
        path, found = self._where[name][0], self.stored(name)
        if tuple(found.shape) != shape:
            raise InputError(f"{path}: tensor {name} has shape {list(found.shape)}, expected {list(shape)}")
        if found.dtype not in FLOATS:
            raise InputError(f"{path}: tensor {name} is {found.dtype}; only unquantised weights are supported")
        return found

    def refuse_quantised(self) -> None:
        """Raises `InputError` for a tensor of fewer than 16 bits a number, read from headers alone where possible.

        Whole numbers are accepted: a model may store attention masks, for example.
        """
        for name, (path, handle) in self._where.items():
            kind = str(handle[name].dtype) if isinstance(handle, dict) else handle.get_slice(name).get_dtype()
            if kind.startswith(NARROW_FLOATS):
                raise InputError(f"{path}: tensor {name} is {kind}; only unquantised weights are supported")

    def num_parameters(self, without: tuple[str, ...] = ()) -> int:
        """How many numbers all tensors hold, except those whose names begin with one of `without`; read from headers
        alone where the format has them."""
        return sum(prod(shape) for name, shape in self.shapes().items() if not name.startswith(without))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its name, read from headers alone where the format has them."""
        return {
            name: tuple(handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape())
            for name, (_, handle) in self._where.items()
        }

    def close(self) -> None:
        """Closes the files and frees the memory of their pages. Reading a tensor opens them again."""
        self._stack.close()
        self.__dict__.pop("_where", None)


def load_torch_file(path: Path) -> Any:
    """What a file of `torch.save` holds, of plain data only. Mapped where the format allows it, as only a part of it
    may be read: files of torch before 1.6 are no zip archives, which alone can be mapped."""
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)


def tensors_of(content: object, path: Path) -> dict[str, torch.Tensor]:
    """`content` of the file `path` as tensors by name.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a mapping from names to tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            shown, kind = reprlib.repr(name).strip("'"), type(tensor).__name__
            raise InputError(f"{path}: is not a mapping from names to tensors: {shown} is a {kind}")
    return content


def _dense_tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    """The content of a `.bin` file, checked to be tensors of numbers by name."""
    found = tensors_of(content, path)
    if not found:
        raise InputError(f"{path}: holds no tensors")
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise InputError(f"{path}: tensor {name} is not a dense tensor with numbers")
    return found


def _weight_files(directory: Path) -> list[Path]:
    """The files of a model's weights: of one file and of those that an index names the first that is complete, in the
    order of transformers, so that both read the same."""
    missing = None
    for single, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model.bin")):
        index = directory / f"{single}.index.json"
        names = _indexed_names(index) if os.path.exists(index) else []
        found = [directory / single] if os.path.exists(directory / single) else [directory / name for name in names]
        if names and not all(map(os.path.exists, found)):  # the other format may be complete
            gone = next(name for name in names if not os.path.exists(directory / name))
            missing = missing or f"{directory}: {gone[:100]} is missing, though {index.name} names it"
            continue
        files = found or sorted(directory.glob(pattern))
        for path in files:
            if not path.is_file():
                raise InputError(f"{path}: is not a file of weights")
        if files:
            return files
    raise InputError(missing or f"{directory}: a model folder without weights (no *.safetensors, no pytorch_model.bin)")


def _indexed_names(index: Path) -> list[str]:
    """The names of the files in a weight index, each a path within its folder."""
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise InputError(f"{index}: is not a weight index (no 'weight_map')")
    names = sorted(set(found.values()))
    for name in names:
        if not name or "\0" in name or ".." in Path(name).parts or Path(name).is_absolute():
            raise InputError(f"{index}: weight_map names {reprlib.repr(name)}, which is not a file within the folder")
    return names


def sha256_of_files(files: list[Path]) -> str:
    """sha256 over the contents of `files` in order, cached on disk by path, size and time of change."""
    cache = optional_cache_folder()
    key = "|".join(f"{p.resolve()}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    try:
        known = None if cache is None else read_json(cache / MEMO)
    except InputError:
        known = None
    memo = known if isinstance(known, dict) else {}
    if not isinstance(memo.get(key), str):
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        memo = {old: known for old, known in memo.items() if all(map(_is_there, old.split("|")))}
        memo[key] = digest.hexdigest()
        if cache is not None:
            with suppress(OSError), cached_file(cache / MEMO) as file:  # a read-only cache costs time, not correctness
                file.write(json.dumps(memo).encode())
    return str(memo[key])


def _is_there(file: str) -> bool:
    """True if the file of a cached hash still exists; `file` is `path:size:time`."""
    return os.path.exists(file.rsplit(":", 2)[0])
