"""Drafters on disk as folders and files: a config, tensors, and where they come from.

A method adds what its configs say and how its layouts name tensors. In our own layout matrices may be in 8 bits: a
row's numbers are whole multiples of its own scale, the largest of them 127. That halves the bytes, of the file and of
what a draft reads on a CPU, and no worse drafts could be measured.

    NAME          int8 [O, I]
    NAME.scale    float32 [O]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save
from torch import Tensor

from spdbench.backend import DrafterInfo
from spdbench.errors import InputError, validated
from spdbench.input_files import not_downloaded, read_json
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench.models.checkpoints.folders import drafter_folders
from spdbench.models.checkpoints.layer_tensors import SCALE
from spdbench.models.checkpoints.weights import FLOATS, load_torch_file, tensors_of
from spdbench.models.cpu.linear import from_8_bits, in_8_bits, row_scales

if TYPE_CHECKING:
    from spdbench.training.recipe import Provenance

TENSORS = "model.safetensors"
FOLDER_VERSION = 1
"""Of our own folders, for methods without a published version to name. A folder that names none is of the first."""

Storage = Literal["bfloat16", "int8"]
StorageOption = Annotated[
    Storage,
    Field(description="a matrix's numbers in the file; int8: half the bytes, in the file and read by a draft on a CPU"),
]


class DrafterConfig(BaseModel):
    """What a drafter's config says, under one set of names whatever the layout calls it."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    trained_tokens: int | None = Field(None, ge=0)


C = TypeVar("C", bound=DrafterConfig)


@dataclass(frozen=True)
class DrafterFile(Generic[C]):
    """A drafter as read, before it meets a target. `sha256` is empty where it was drawn at random; `extra` are keys for
    the written config that say where it comes from."""

    path: Path
    layout: str
    config: C
    tensors: Mapping[str, Tensor]
    sha256: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def error(self, text: str) -> InputError:
        return InputError(f"{self.path}: {text}")

    def info(self, kind: str, method: str) -> DrafterInfo:
        """What a result says of the drafter; `kind` is that of the user's choice, e.g. `random`."""
        untrained = kind == "random"
        return DrafterInfo(
            "random" if untrained else Path(os.path.abspath(self.path)).name,
            method,
            synthetic=False,
            sha256=self.sha256 or None,
            trained_tokens=0 if untrained else self.config.trained_tokens,
        )


def find_drafter(model: ModelFiles, method: str, stages: int | None, cut: Sequence[int] | None = None) -> Path:
    """The first drafter trained for these weights and this method.

    With `stages` it drafts for a pipeline of so many, cut into `cut` layers each where these are not equal (none where
    the cut is not known yet). Of the drafters in a folder those for this cut come first, then those for any number of
    stages; where no folder has one of these, those for another cut into as many.

    Raises:
        InputError: there is none; names what was looked for and where.
    """
    of_other_cuts: list[Path] = []
    for folder in drafter_folders():
        for_any: list[Path] = []
        for path in sorted(folder.glob("*/config.json")):
            try:
                config = read_config(path.parent, method)
            except InputError:
                continue
            if (config.get("method"), config.get("model_sha256")) != (method, model.sha256):
                continue
            if stages is None:
                return path.parent
            if is_for_any_stages(config):
                for_any.append(path.parent)
            elif config.get("num_stages") == stages and config.get("stage_layers") == (cut and list(cut)):
                return path.parent
            elif config.get("num_stages") == stages:
                of_other_cuts.append(path.parent)
        if for_any:
            return for_any[0]
    if of_other_cuts:
        return of_other_cuts[0]
    many = f" with {stages} stages" if stages else ""
    raise InputError(
        f"--drafter auto: no trained {method} drafter{many} for {model.id} is installed (looked in $SPDBENCH_DRAFTERS, "
        f"the user's data folder and spdbench itself). Train one (`spdbench train {method} --help`), give one with "
        "--drafter PATH, or an artificial one: --drafter oracle:0.8, or --drafter random."
    )


def is_for_any_stages(config: Mapping[str, Any]) -> bool:
    """True if a config says that its drafter is for pipelines of any number of stages."""
    counts = config.get("stage_counts")
    return isinstance(counts, list) and bool(counts) and all(type(each) is int and each > 0 for each in counts)


def read_config(folder: Path, *methods: str, ours_alone: bool = False) -> dict[str, Any]:
    """The config of a drafter's folder. `ours_alone`: only folders of our own layout are read, which are no models.

    Raises:
        InputError: there is none, it is no mapping, or it is of a method that is not one of `methods`.
    """
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise InputError(f"{folder}: is not a drafter folder, it has no config.json")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise InputError(f"{file}: is not a mapping")
    method = raw.get("method") or _published_method(raw) or methods[0]
    if method not in methods:
        raise InputError(f"{folder}: is a drafter for {method!r:.60}, not for {methods[0]}")
    if ours_alone and "method" not in raw and "architectures" in raw:
        raise InputError(
            f"{folder}: is not a drafter for {methods[0]}: its config.json is that of a model or of an EAGLE head "
            f"(architectures {raw['architectures']!r:.60})"
        )
    return raw


def _published_method(raw: Mapping[str, Any]) -> str | None:
    """The method that a config of others shows to be its own; None where it may be anything. EAGLE's first heads look
    as their targets do."""
    named = f"{raw.get('architectures')} {raw.get('speculators_model_type')}".lower()
    if "eagle" in named:
        return "eagle"
    return "medusa" if "medusa" in named or "medusa_num_heads" in raw else None


def require_version(path: Path, config: Mapping[str, Any], *allowed: int) -> None:
    """Raises `InputError` if a config names a version that is not one of `allowed`."""
    found = config.get("version", allowed[0])
    if found not in allowed:
        versions = ", ".join(map(str, allowed))
        raise InputError(
            f"{path}: config.version {found!r:.60} is not known. Allowed: {versions}. A newer spdbench may read it."
        )


def checked_config(kind: type[C], values: Mapping[str, Any], path: Path) -> C:
    """The keys of `values` that `kind` knows.

    Raises:
        InputError: one of them is missing or of a wrong type.
    """
    known = {key: values[key] for key in kind.model_fields if key in values}
    text = json.dumps(known, default=str)  # in strict JSON, a list may be a tuple
    return validated(kind, text, f"{path}: config.")


def load_content(file: Path) -> object:
    """What a safetensors file holds, or a torch file of plain data.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: object = load_torch_file(file)
        return content
    except Exception:  # both libraries raise types of their own, and torch's message advises what must not be done
        why = not_downloaded(file) or "damaged, or holds more than plain tensors"
        raise InputError(f"{file}: cannot be read as weights: it is {why}") from None


def read_tensors(files: Iterable[Path], rename: Callable[[str], str | None] = str) -> dict[str, Tensor]:
    """The tensors of all files under the names that `rename` gives them; those for which it returns None are omitted.
    What a file has in 8 bits is in bfloat16, next to its scale.

    Raises:
        InputError: a file is damaged, two tensors get the same name, or `rename` raised a `ValueError` that says why a
            tensor is not supported.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        content = tensors_of(load_content(file), file)
        for original, tensor in {**unpacked(content), **_scales(content)}.items():
            try:
                name = rename(original)
            except ValueError as error:
                raise InputError(f"{file}: tensor {original} {error}") from None
            if name in found:
                raise InputError(f"{file}: two tensors are called {name}")
            if name is not None:
                found[name] = tensor
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with what was in 8 bits in bfloat16, as other files have it; all else, and what does not fit,
    as it is."""
    scales = _scales(tensors)
    found = {name: tensor for name, tensor in tensors.items() if name not in scales}
    return found | {
        name: from_8_bits(tensors[name], scale) for key, scale in scales.items() if (name := key.removesuffix(SCALE))
    }


def _scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scales of what is in 8 bits, in float32, by their own names."""
    return {name + SCALE: scale for name in tensors if (scale := _scale_of(name, tensors)) is not None}


def _scale_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    packed, scale = tensors[name], tensors.get(name + SCALE)
    if scale is None or packed.dtype != torch.int8 or packed.ndim != 2 or scale.shape != packed.shape[:1]:
        return None
    if scale.dtype not in FLOATS or packed.is_meta or scale.is_meta or scale.layout != torch.strided:
        return None
    return scale.float()


def stored(tensors: Mapping[str, Tensor], storage: Storage = "bfloat16") -> dict[str, Tensor]:
    """Tensors as a file holds them: bfloat16, or matrices in 8 bits and the rest in bfloat16; on the CPU."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu", torch.float32)
        if storage == "int8" and plain.ndim == 2:
            found[name + SCALE] = row_scales(plain)
            found[name] = in_8_bits(plain, found[name + SCALE])
        else:
            found[name] = plain.to(torch.bfloat16)
    return found


def require_storage(layout: str, storage: Storage) -> None:
    """Raises `InputError` for a published layout with matrices in 8 bits, which other programs cannot read."""
    if layout != "spdbench" and storage == "int8":
        raise InputError(f"--format {layout}: knows no matrices in 8 bits; leave out -o storage=int8")


def store_again(folder: Path, storage: Storage) -> None:
    """Rewrites a folder of our own layout with its matrices in `storage`.

    Raises:
        InputError: it is no such folder, or damaged.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "method" not in config:
        raise InputError(f"{folder}: is not of spdbench's own layout: its config names no method")
    content = tensors_of(load_content(folder / TENSORS), folder / TENSORS)
    if bool(_scales(content)) != (storage == "int8"):
        config.pop("storage", None)
        write_folder(folder, config, stored(unpacked(content), storage))


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = TENSORS) -> Path:
    """Writes a drafter's folder, which it returns, with its tensors in the file `name`.

    The config, by which a drafter is found, comes last. It says if matrices are in 8 bits.
    """
    if any(key.endswith(SCALE) for key in tensors):
        config = {**config, "storage": "int8"}
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    if name.endswith(".safetensors"):
        (folder / name).write_bytes(save(own))
    else:
        with (folder / name).open("wb") as file:  # a full disk is an `OSError`, and torch's own error otherwise
            torch.save(own, file)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def origin(about: Provenance) -> dict[str, Any]:
    """What a trained drafter's config says of where it comes from; readers of published layouts pass over it."""
    return {
        "model_id": about.model_id,
        "model_sha256": about.model_sha256,
        "data_sha256": about.data_sha256,
        "trained_tokens": about.trained_tokens,
        "seed": about.seed,
        "acceptance_by_position": list(about.acceptance_by_position),
    }
