"""Medusa heads on disk: every published layout and our own folder.

    v0.1      config.json, medusa_lm_head.pt or .safetensors; a linear layer for every head
    v2        the same without linear layers: the target's head serves them all
    medusa2   a whole fine-tuned model that also holds heads of v0.1 or v2, under `medusa_head.`
    vllm      model_type medusa; a linear layer for every head or a shared one, over a truncated vocabulary or all of it
    spdbench  method medusa; v0.1's names or one shared lm_head.weight, over any draft vocabulary, or no linear layer:
              the target's rows of that vocabulary

Layouts are recognised by the names of tensors, and heads and blocks are counted from them: published configs are wrong
about both. Source: published heads.

Shapes: M model width, U draft vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.load_decoder import DRAFT_HEADS
from spdbench_backends.drafter_files.folder import (
    FOLDER_VERSION,
    DrafterConfig,
    DrafterFile,
    checked_config,
    read_config,
    read_tensors,
    require_version,
    write_folder,
)

Layout = Literal["v0.1", "v2", "medusa2", "vllm", "spdbench"]

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
VLLM_PREFIX = "medusa_heads."
SHARED = "lm_head.weight"
TOKEN_MAP = "token_map"
PARTS = ("weight", "bias")
NUMBER = "(0|[1-9][0-9]{0,2})"
"""Of a head or a block in a name. So few that a damaged name cannot make the table of expected tensors endless."""


@dataclass(frozen=True)
class TensorNames:
    """How a layout calls its tensors. `bias`: every block has one; else a file has them in all blocks or in none."""

    block: str
    head: str
    bias: bool = False

    def count(self, names: Iterable[str]) -> tuple[int, int]:
        """Heads, and blocks of each, that occur in `names`."""
        found = [match.groups() for name in names if (match := re.match(_pattern(self.block), name))]
        heads, blocks = ({int(pair[side]) for pair in found} for side in (0, 1))
        return 1 + max(heads, default=-1), 1 + max(blocks, default=-1)

    def has_heads(self, names: Iterable[str]) -> bool:
        """True if a head has a linear layer of its own."""
        return any(re.fullmatch(_pattern(self.head), name) for name in names)


def _pattern(name: str) -> str:
    """A regular expression for a name, with a group for each number in it."""
    return re.sub(r"\\{[a-z]+\\}", NUMBER, re.escape(name))


NAMES: Mapping[str, TensorNames] = {
    "v0.1": TensorNames("{head}.{block}.linear.", "{head}.{blocks}.weight", bias=True),
    "v2": TensorNames("{head}.{block}.linear.", "{head}.{blocks}.weight", bias=True),
    "medusa2": TensorNames(DRAFT_HEADS + "{head}.{block}.linear.", DRAFT_HEADS + "{head}.{blocks}.weight", bias=True),
    "vllm": TensorNames("blocks.{head}.layers.{block}.", "lm_heads.{head}.weight"),
    "spdbench": TensorNames("{head}.{block}.linear.", "{head}.{blocks}.weight"),
}


class MedusaConfig(DrafterConfig):
    """What a layout does not say is None. `head_accuracies`: how often the token of each rank is right, by head."""

    hidden_size: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    target_family: str | None = None
    base_model: str | None = None
    model_sha256: str | None = None
    draft_token_ids: tuple[int, ...] | None = Field(None, min_length=1)
    head_accuracies: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class MedusaFile(DrafterFile[MedusaConfig]):
    """Tensors keep the layout's names. Linear layers `[U, M]` are one for each head, one for all, or the target's."""

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Heads, and blocks of each; at least one."""
        heads, blocks = NAMES[self.layout].count(self.tensors)
        return max(1, heads), max(1, blocks)

    def block_names(self, layout: str) -> list[list[str]]:
        """How `layout` calls the blocks of each head, without `weight` and `bias`."""
        heads, blocks = self.counts
        name = NAMES[layout].block
        return [[name.format(head=k, block=j) for j in range(blocks)] for k in range(heads)]

    def head_names(self, layout: str) -> list[str]:
        """How `layout` calls the linear layers of all heads."""
        heads, blocks = self.counts
        return [NAMES[layout].head.format(head=k, blocks=blocks) for k in range(heads)]

    def renamed(self, layout: str) -> dict[str, Tensor]:
        """The tensors by their names in `layout`."""
        pairs = list(zip(self.head_names(self.layout), self.head_names(layout), strict=True))
        for olds, news in zip(self.block_names(self.layout), self.block_names(layout), strict=True):
            pairs += [(old + part, new + part) for old, new in zip(olds, news, strict=True) for part in PARTS]
        names = dict(pairs)
        return {names.get(name, name): tensor for name, tensor in self.tensors.items()}


def holds_medusa_heads(model: Path) -> bool:
    """True if the folder of a model is a Medusa-2 checkpoint: its heads were trained with the model itself."""
    with closing(Checkpoint(model)) as checkpoint:
        return any(name.startswith(DRAFT_HEADS) for name in checkpoint)


def read_medusa(path: Path, model: Path | None = None) -> MedusaFile:
    """The heads in a folder, whatever its layout, for the model in the folder `model`.

    Raises:
        InputError: no heads, damaged, or those of a Medusa-2 checkpoint that is not `model`.
    """
    raw = read_config(path, "medusa")
    own = next(([path / name] for name in HEAD_FILES if (path / name).exists()), None)
    files = own or Checkpoint(path).files
    ours = own is None and "method" in raw
    tensors = read_tensors(files, str if ours or own else _without_vllm_prefix)
    layout = "spdbench" if ours else _layout(path, raw, tensors, alone=own is not None)
    if layout == "spdbench":
        require_version(path, raw, FOLDER_VERSION)
    if layout == "medusa2":
        if model is None or path.resolve() != model.resolve():
            raise InputError(
                f"{path}: is a whole model, and its Medusa heads were trained together with it (Medusa-2); use it as "
                f"the model: -m {path} --drafter auto"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(DRAFT_HEADS)}
    file = MedusaFile(path, layout, MedusaConfig(), tensors, sha256_of_files(files))
    if layout == "vllm":
        return _from_vllm(file, raw)
    if layout in ("v0.1", "v2"):
        values: Mapping[str, Any] = {"base_model": raw.get("base_model_name_or_path")}
    else:
        values = raw if ours else {key: raw.get(key) for key in ("hidden_size", "vocab_size")}
    config = checked_config(MedusaConfig, values, path)
    _check_accuracies(path, config, file.counts[0])
    return replace(file, config=config)


def _without_vllm_prefix(name: str) -> str:
    return name.removeprefix(VLLM_PREFIX)


def _layout(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], *, alone: bool) -> Layout:
    """The published layout that names tensors so; `alone` if they lie in a file of heads only."""
    if not alone and any(name.startswith(DRAFT_HEADS) for name in tensors):
        return "medusa2"
    if not alone and (raw.get("model_type") == "medusa" or NAMES["vllm"].count(tensors)[0]):
        return "vllm"
    if alone or NAMES["v0.1"].count(tensors)[0]:
        return "v0.1" if NAMES["v0.1"].has_heads(tensors) else "v2"
    raise InputError(
        f"{path}: holds no Medusa heads: no {' or '.join(HEAD_FILES)}, and no tensors of a layout that is known"
    )


def _check_accuracies(path: Path, config: MedusaConfig, num_heads: int) -> None:
    by_head = config.head_accuracies
    if by_head and len(by_head) != num_heads:
        raise InputError(f"{path}/config.json: head_accuracies are of {len(by_head)} heads, but there are {num_heads}")
    for k, ranks in enumerate(by_head):
        if not ranks or not all(0.0 <= rank <= 1.0 for rank in ranks) or sum(ranks) > 1.0 + 1e-6 * len(ranks):
            raise InputError(
                f"{path}/config.json: head_accuracies.{k}: expected one number or more from 0 to 1, which are shares "
                "of a whole"
            )


def _from_vllm(file: MedusaFile, raw: Mapping[str, Any]) -> MedusaFile:
    """The file with its draft vocabulary in the config, and with linear layers cut to it.

    Under `original_lm_head` there may be copies of the shared linear layer, of which one is kept, and without any the
    target's serves. vLLM builds by its config, which has to agree with the tensors.
    """
    (num_heads, num_blocks), tensors = file.counts, dict(file.tensors)
    for key, found in (("num_heads", num_heads), ("num_hidden_layers", num_blocks)):
        if raw.get(key, found) != found:
            raise InputError(f"{file.path}/config.json: {key} is {raw[key]!r}, but the tensors are of {found}")
    bias, stated = file.block_names("vllm")[0][0] + "bias", raw.get("medusa_fc_bias", False)
    if (bias in tensors) != bool(stated):
        there = "there" if bias in tensors else "missing"
        raise file.error(f"tensor {bias} is {there}, but config.medusa_fc_bias is {json.dumps(stated)}")
    values = {key: raw.get(key) for key in ("hidden_size", "vocab_size")}
    ids = _token_map(file, tensors.pop(TOKEN_MAP, None), raw)
    config = checked_config(MedusaConfig, {**values, "draft_token_ids": ids}, file.path)
    heads = file.head_names("vllm")
    if SHARED not in tensors and not raw.get("original_lm_head"):
        if missing := next((name for name in heads if name not in tensors), None):
            raise file.error(f"tensor {missing} is missing")
    elif SHARED not in tensors:
        copies = {name: tensors.pop(name) for name in heads if name in tensors}
        for name, copy in copies.items():
            tensors.setdefault(SHARED, copy)
            if not torch.equal(copy, tensors[SHARED]):
                raise file.error(f"tensor {name} is not {next(iter(copies))}, but config.original_lm_head is true")
    if ids is not None and config.vocab_size and all(0 <= token < config.vocab_size for token in ids):
        for name in {SHARED, *heads} & tensors.keys():
            if tensors[name].dim() == 2 and len(tensors[name]) == config.vocab_size:
                tensors[name] = tensors[name][ids]
    return replace(file, config=config, tensors=tensors)


def _token_map(file: MedusaFile, token_map: Tensor | None, raw: Mapping[str, Any]) -> list[int] | None:
    """Token ids of a truncated vocabulary; a map is not used where the vocabulary is whole."""
    size = raw.get("truncated_vocab_size") or raw.get("vocab_size")
    if size == raw.get("vocab_size"):
        return None
    if token_map is None:
        raise file.error(f"tensor {TOKEN_MAP} is missing, though config.truncated_vocab_size is {size}")
    if token_map.is_floating_point() or list(token_map.shape) != [size]:
        kind, shape = token_map.dtype, list(token_map.shape)
        raise file.error(f"tensor {TOKEN_MAP} is {kind} of shape {shape}, expected [{size}] ids")
    ids: list[int] = token_map.tolist()
    return ids


def write_medusa(file: MedusaFile, directory: Path, layout: Layout) -> Path:
    """Writes heads of our own layout, as they are trained, in any layout but medusa2; returns `directory`.

    v0.1 needs a linear layer for every head and vllm at least one; v2 has none. v0.1 and v2 know no draft vocabulary.
    """
    config, (num_heads, num_blocks), tensors = file.config, file.counts, file.renamed(layout)
    name = {"v0.1": "medusa_lm_head.pt", "v2": "medusa_lm_head.safetensors"}.get(layout, "model.safetensors")
    first = file.block_names(layout)[0][0]
    width = len(tensors[first + "weight"])
    written: dict[str, Any]
    if layout == "spdbench":
        known = config.model_dump(mode="json", exclude_defaults=True)
        written = {"method": "medusa", "version": FOLDER_VERSION, "hidden_size": width, **known}
    elif layout == "vllm":
        linears = [tensor for key, tensor in tensors.items() if key == SHARED or key in file.head_names(layout)]
        written = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": width,
            "vocab_size": config.vocab_size,
            "num_heads": num_heads,
            "num_hidden_layers": num_blocks,
            "truncated_vocab_size": len(linears[0]),
            "medusa_fc_bias": first + "bias" in tensors,
            "original_lm_head": len(linears) < num_heads,
        }
        if config.draft_token_ids is not None:
            tensors[TOKEN_MAP] = torch.tensor(config.draft_token_ids)
    else:
        sizes = {"medusa_num_heads": num_heads, "medusa_num_layers": num_blocks}
        version = {"version": "2"} if layout == "v2" else {}
        written = {"base_model_name_or_path": config.base_model, **sizes, **version}
    return write_folder(directory, {**file.extra, **written}, tensors, name)
