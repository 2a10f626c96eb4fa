"""Packed layers in the cache: a later start reads them instead of converting, checking and packing the weights again.

A file holds all dense layers of one model in one dtype, with final norm and head. Its name says what it was made from:
the model's files by path, size and time of change, the config, the layout of packed weights, the processor. Each part
has a checksum; a damaged file is removed and made anew. Files of the same model that are no longer used are removed.

The parts are read into memory of our own and not mapped: a mapped file has small pages, from which decoding reads a
tenth to a third slower, and which the system could drop in the middle of a measurement.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.facts_cache import remove_unused
from spdbench.models.checkpoints.folders import optional_cache_folder
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.cpu.linear import Linear, PackedLinear, new_pages
from spdbench.models.layer_ops import HeadNorms, NormWeight
from spdbench.models.layers import LayerWeights
from spdbench.models.torch_utils import array
from spdbench.output_files import cached_file
from spdbench.processors import cpu_model

LAYOUT = 1
"""Changes with the layout of packed weights and of the file."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIN_BYTES, MAX_BYTES = 1 << 24, 1 << 32
"""Less is packed as fast as it is read; more would take too much of a user's disk."""
ROOM = 4
"""A file is written only where the disk has room for so many of its size."""
UNUSED_S = 30 * 86400
"""A file that was not used for so long is removed when another one is written."""
LINE_BYTES = 64
NO_FOLDER = Path("/dev/null")
"""In which no file can be made, for users without a cache."""
HEAD, NORM = "head", "norm"


@dataclass(frozen=True)
class PackedLayers:
    """Layers by index; final norm and head where the last layer is among them."""

    weights: dict[int, LayerWeights]
    norm: NormWeight | None
    head: Linear | None


class PackedFile:
    """The file of one model in one dtype; it may not be there."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
        files = [path.resolve() for path in checkpoint.files]
        states = [(found.st_size, found.st_mtime_ns) for found in map(os.stat, files)]
        self._config = config
        made_from = repr((LAYOUT, states, config, cpu_model()))
        folder = (optional_cache_folder() or NO_FOLDER) / "packed"
        self._same_model = f"{checkpoint.directory.name[:40]}-{_dtype_name(dtype)}-{_digest(repr(files))}-"
        self._path = folder / f"{self._same_model}{_digest(made_from)}.packed"

    def read(self, layers: range) -> PackedLayers | None:
        """The layers `layers`; None where there is no file, or a damaged one, which is removed."""
        try:
            with self._path.open("rb") as file:
                found = self._layers(_Parts(file), layers)
            os.utime(self._path)
        except OSError:
            return None
        except (ValueError, KeyError, TypeError, RuntimeError):  # whatever damage makes of a header and its numbers
            with suppress(OSError):
                self._path.unlink()
            return None
        return found

    def write(self, packed: PackedLayers) -> None:
        """Writes the file, if that can be done and is worth it, and removes those that it replaces."""
        tensors = _tensors_of(packed)
        num_outputs = {name: part.shape[0] for name, part in _parts_of(packed) if isinstance(part, PackedLinear)}
        total = sum(tensor.nbytes for tensor in tensors.values())
        if not MIN_BYTES <= total <= MAX_BYTES:
            return
        folder = self._path.parent
        with suppress(OSError):  # a cache that cannot be written costs time, not correctness
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < ROOM * total:
                return
            remove_unused(folder, UNUSED_S)
            with cached_file(self._path) as file:
                _write(file, tensors, num_outputs)
            for other in folder.glob(f"{self._same_model}*"):
                if other != self._path and other.suffix != ".part":
                    other.unlink(missing_ok=True)

    def _layers(self, parts: _Parts, layers: range) -> PackedLayers:
        norm, head = None, None
        if layers.stop == self._config.num_layers:
            norm, head = parts.norm(NORM), parts.linear(HEAD)
        return PackedLayers({index: self._layer(parts, index) for index in layers}, norm, head)

    def _layer(self, parts: _Parts, index: int) -> LayerWeights:
        query, key = (parts.norm(f"{index}.head_norms.{name}") for name in ("query", "key"))
        qkv, out, gate_up, down = (parts.linear(f"{index}.{name}") for name in ("qkv", "out", "gate_up", "down"))
        post_norm = parts.norm(f"{index}.post_norm")
        if qkv is None or out is None or post_norm is None:
            raise ValueError(f"layer {index} is not whole")
        return LayerWeights(
            input_norm=parts.norm(f"{index}.input_norm"),
            qkv=qkv,
            head_norms=None if query is None or key is None else HeadNorms(query, key),
            out=out,
            post_norm=post_norm,
            gate_up=gate_up,
            down=down,
            experts=None,
            window=self._config.windows[index],
        )


class _Parts:
    """The parts of an open file, which begins with a checksum of its header and the header: by name the dtype, shape,
    place and checksum of each tensor, and the number of outputs of each packed weight."""

    def __init__(self, file: BufferedReader) -> None:
        digest, _, content = file.readline().partition(b" ")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("a damaged header")
        header = json.loads(content)
        self._file, self._start = file, _whole_lines(len(digest) + 1 + len(content))
        self._tensors, self._num_outputs = header["tensors"], header["num_outputs"]

    def linear(self, name: str) -> PackedLinear | None:
        packed = self._tensor(name)
        return None if packed is None else PackedLinear(packed, self._num_outputs[name], self._tensor(f"{name}.bias"))

    def norm(self, name: str) -> NormWeight | None:
        weight_M = self._tensor(name)
        return None if weight_M is None else NormWeight(weight_M)

    def _tensor(self, name: str) -> Tensor | None:
        """Raises `ValueError` if its numbers are not those that were written."""
        if name not in self._tensors:
            return None
        dtype, shape, place, checksum = self._tensors[name]
        tensor = new_pages(tuple(shape), DTYPES[dtype])
        self._file.seek(self._start + place)
        if self._file.readinto(_bytes_of(tensor)) != tensor.nbytes or _checksum(tensor) != checksum:
            raise ValueError(f"{name} is damaged")
        return tensor


def _parts_of(packed: PackedLayers) -> Iterator[tuple[str, Any]]:
    """Everything of the layers that has numbers, by name."""
    yield HEAD, packed.head
    yield NORM, packed.norm
    for index, layer in packed.weights.items():
        for field in fields(layer):
            part = getattr(layer, field.name)
            if isinstance(part, HeadNorms):
                yield f"{index}.{field.name}.query", part.query
                yield f"{index}.{field.name}.key", part.key
            elif part is not None and field.name != "window":
                yield f"{index}.{field.name}", part


def _tensors_of(packed: PackedLayers) -> dict[str, Tensor]:
    """The tensors to write, by name; none at all if a part is of a kind that no file holds."""
    found: dict[str, Tensor] = {}
    for name, part in _parts_of(packed):
        if isinstance(part, NormWeight):
            found[name] = part.weight_M.contiguous()
        elif isinstance(part, PackedLinear):
            found[name] = part.packed
            if part.bias is not None:
                found[f"{name}.bias"] = part.bias
        else:
            return {}
    return found


def _write(file: IO[bytes], tensors: Mapping[str, Tensor], num_outputs: Mapping[str, int]) -> None:
    entries, place = {}, 0
    for name, tensor in tensors.items():
        entries[name] = (_dtype_name(tensor.dtype), list(tensor.shape), place, _checksum(tensor))
        place += _whole_lines(tensor.nbytes)
    content = json.dumps({"tensors": entries, "num_outputs": num_outputs}).encode() + b"\n"
    file.write(hashlib.sha256(content).hexdigest().encode() + b" " + content)
    start = _whole_lines(file.tell())
    for name, tensor in tensors.items():
        file.seek(start + entries[name][2])
        file.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(array(tensor.reshape(-1).view(torch.uint8)))


def _checksum(tensor: Tensor) -> int:
    """The sum of the numbers' bits, in words of 8 bytes where it consists of whole ones."""
    flat = tensor.reshape(-1)
    return int(flat.view(torch.int64 if tensor.nbytes % 8 == 0 else torch.uint8).sum())


def _whole_lines(size: int) -> int:
    return -(-size // LINE_BYTES) * LINE_BYTES


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
