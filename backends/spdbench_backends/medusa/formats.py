"""Medusa heads as they lie on disk: every published layout and our own folder.

    v0.1      config.json, medusa_lm_head.pt or .safetensors; a linear layer for every head
    v2        the same without linear layers: the target's head serves them all
    medusa2   a whole fine-tuned model with the heads of v0.1 or v2 beside it, under `medusa_head.`
    vllm      model_type medusa; a linear layer for every head or a shared one, over a truncated vocabulary or all of it
    spdbench  method medusa; v0.1's names or one shared lm_head.weight, over any draft vocabulary, or no linear layer:
              the target's rows of that vocabulary

Layouts are told by tensors' names, and heads and blocks are counted from them: published configs are wrong about
both. Strict: an unknown, missing or misshapen tensor is an error that names it.

Source: METHODS.md B. Must not know of targets.

Shapes: M model width, U draft vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spdbench.errors import InputError, validated
from spdbench.models.checkpoints.weights import FLOATS, Checkpoint, sha256_of_files
from spdbench.models.decoder import DRAFT_HEADS
from spdbench_backends.drafter_files import load_tensors, read_config, require_version

Layout = Literal["v0.1", "v2", "medusa2", "vllm", "spdbench"]

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
VLLM_PREFIX = "medusa_heads."
SHARED = "lm_head.weight"
TOKEN_MAP = "token_map"
NUMBER = "(0|[1-9][0-9]{0,5})"


@dataclass(frozen=True)
class _Names:
    """How a layout calls its tensors. `bias`: every block has one; else a file has them in all or in none."""

    block: str
    head: str
    bias: bool = False

    def count(self, names: Iterable[str]) -> tuple[int, int]:
        """Heads and blocks of each that `names` speak of."""
        found = [match.groups() for name in names if (match := re.match(_pattern(self.block), name))]
        heads, blocks = ({int(pair[side]) for pair in found} for side in (0, 1))
        return 1 + max(heads, default=-1), 1 + max(blocks, default=-1)

    def has_heads(self, names: Iterable[str]) -> bool:
        """True if a head has a linear layer of its own."""
        return any(re.fullmatch(_pattern(self.head), name) for name in names)


def _pattern(name: str) -> str:
    """A regular expression for a name, with a group for each number in it."""
    return re.sub(r"\\{[a-z]+\\}", NUMBER, re.escape(name))


NAMES: Mapping[Layout, _Names] = {
    "v0.1": _Names("{head}.{block}.linear.", "{head}.{blocks}.weight", bias=True),
    "v2": _Names("{head}.{block}.linear.", "{head}.{blocks}.weight", bias=True),
    "medusa2": _Names(DRAFT_HEADS + "{head}.{block}.linear.", DRAFT_HEADS + "{head}.{blocks}.weight", bias=True),
    "vllm": _Names("blocks.{head}.layers.{block}.", "lm_heads.{head}.weight"),
    "spdbench": _Names("{head}.{block}.linear.", "{head}.{blocks}.weight"),
}


class MedusaConfig(BaseModel):
    """What a config says of the heads, under one set of names. Where a layout does not say, None."""

    model_config = ConfigDict(strict=True, frozen=True)

    hidden_size: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    target_family: str | None = None
    base_model: str | None = None
    model_sha256: str | None = None
    draft_token_ids: tuple[int, ...] | None = Field(None, min_length=1)
    head_accuracies: tuple[tuple[float, ...], ...] = ()
    trained_tokens: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class Block:
    """A residual block's linear layer."""

    weight_MM: Tensor
    bias_M: Tensor | None


@dataclass(frozen=True)
class MedusaFile:
    """Heads as read. `heads` are linear layers `[U, M]`, one for each head, or one for all, or none: the target's.
    `extra` are keys of our own folders that say where they come from."""

    path: Path
    layout: Layout
    config: MedusaConfig
    blocks: tuple[tuple[Block, ...], ...]
    heads: tuple[Tensor, ...]
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained_tokens(self) -> int | None:
        return self.config.trained_tokens

    @property
    def head_accuracies(self) -> tuple[tuple[float, ...], ...]:
        """How often the token of each rank is right, by head; empty where nobody has measured it."""
        return self.config.head_accuracies

    @property
    def draft_ids_name(self) -> str:
        """Where the file keeps its draft vocabulary."""
        return f"tensor {TOKEN_MAP}" if self.layout == "vllm" else "config.draft_token_ids"

    def names(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name in `layout`."""
        yield from self.block_names(layout)
        yield from self.head_names(layout)

    def block_names(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        for k, head in enumerate(self.blocks):
            for j, block in enumerate(head):
                prefix = NAMES[layout].block.format(head=k, block=j)
                yield prefix + "weight", block.weight_MM
                if block.bias_M is not None:
                    yield prefix + "bias", block.bias_M

    def head_names(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        name = NAMES[layout].head if len(self.heads) == len(self.blocks) else SHARED
        for k, head in enumerate(self.heads):
            yield name.format(head=k, blocks=len(self.blocks[0])), head


def holds_medusa_heads(model: Path) -> bool:
    """True if the folder of a model is a Medusa-2 checkpoint: its heads were trained with the model itself."""
    with closing(Checkpoint(model)) as checkpoint:
        return any(name.startswith(DRAFT_HEADS) for name in checkpoint)


def read_medusa(path: Path, model: Path | None = None) -> MedusaFile:
    """The heads in a folder, whatever its layout, for the model in the folder `model`.

    Raises:
        InputError: no heads, damaged, or those of a Medusa-2 checkpoint that is not `model`.
    """
    raw = read_config(path)
    if raw.get("method", "medusa") != "medusa":
        raise InputError(f"{path}: is a drafter for {raw['method']!r}, not for medusa")
    layout, tensors, files = _read_tensors(path, raw)
    if layout == "spdbench":
        require_version(path, raw)
    if layout == "medusa2" and (model is None or path.resolve() != model.resolve()):
        raise InputError(
            f"{path}: is a whole model, and its Medusa heads were trained together with it (Medusa-2); use it as the "
            f"model: -m {path} --drafter auto"
        )
    take = _Taker(path, layout, tensors)
    settings = _settings(take, raw)
    # As JSON text, where a list is accepted for a tuple.
    config = validated(MedusaConfig, json.dumps(settings), f"{path}/config.json: ")
    blocks = take.blocks()
    heads = take.heads(raw, config)
    take.refuse_leftovers()
    _check_accuracies(path, config, len(blocks))
    known = {*MedusaConfig.model_fields, "method", "version"}
    extra = {key: value for key, value in raw.items() if key not in known} if layout == "spdbench" else {}
    return MedusaFile(path, layout, config, blocks, heads, sha256_of_files(files), extra)


def _read_tensors(path: Path, raw: Mapping[str, Any]) -> tuple[Layout, dict[str, Tensor], list[Path]]:
    """The heads' tensors by their names in the layout, and the files whose hash stands for them."""
    file = next((path / name for name in HEAD_FILES if (path / name).exists()), None)
    if file is not None:
        tensors = load_tensors(file)
        return _flat_layout(tensors), tensors, [file]
    with closing(Checkpoint(path)) as checkpoint:
        whole = [name for name in checkpoint if name.startswith(DRAFT_HEADS)]
        if whole and "method" not in raw:
            return "medusa2", {name: checkpoint.stored(name) for name in whole}, checkpoint.files
        tensors = {}
        for name in checkpoint:
            short = name if "method" in raw else name.removeprefix(VLLM_PREFIX)
            if short in tensors:
                raise InputError(f"{path}: two tensors are called {short}")
            tensors[short] = checkpoint.stored(name)
        files = checkpoint.files
    if "method" in raw:
        return "spdbench", tensors, files
    if raw.get("model_type") == "medusa" or NAMES["vllm"].count(tensors)[0]:
        return "vllm", tensors, files
    if NAMES["v0.1"].count(tensors)[0]:
        return _flat_layout(tensors), tensors, files
    raise InputError(
        f"{path}: holds no Medusa heads: no {' or '.join(HEAD_FILES)}, and no tensors of a layout that is known"
    )


def _flat_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """v2 if no head has a linear layer of its own."""
    return "v0.1" if NAMES["v0.1"].has_heads(tensors) else "v2"


def _settings(take: _Taker, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `MedusaConfig` knows, from what the layout calls them."""
    if take.layout == "spdbench":
        return {key: raw[key] for key in MedusaConfig.model_fields if key in raw}
    if take.layout in ("v0.1", "v2"):
        return {"base_model": raw.get("base_model_name_or_path")}
    if take.layout == "medusa2":
        return {key: raw.get(key) for key in ("hidden_size", "vocab_size")}
    take.check_counts(raw)
    sizes = {key: raw.get(key) for key in ("hidden_size", "vocab_size")}
    return {**sizes, "draft_token_ids": take.token_map(raw)}


def _check_accuracies(path: Path, config: MedusaConfig, num_heads: int) -> None:
    by_head = config.head_accuracies
    if by_head and len(by_head) != num_heads:
        raise InputError(f"{path}/config.json: head_accuracies are of {len(by_head)} heads, but there are {num_heads}")
    for k, ranks in enumerate(by_head):
        if not ranks or not all(0.0 <= rank <= 1.0 for rank in ranks) or sum(ranks) > 1.0 + 1e-6:
            raise InputError(
                f"{path}/config.json: head_accuracies.{k}: expected one number or more from 0 to 1, which are shares "
                "of a whole"
            )


class _Taker:
    """Hands out a file's tensors once each, checked for all that can be told without the target."""

    def __init__(self, path: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.layout = path, layout
        self._names = NAMES[layout]
        self._left = dict(tensors)
        self.num_heads, self.num_blocks = self._names.count(tensors)
        if not self.num_heads:
            self._take(self._names.block.format(head=0, block=0) + "weight")

    def _take(self, name: str) -> Tensor:
        found = self._left.pop(name, None)
        if found is None:
            raise InputError(f"{self.path}: tensor {name} is missing")
        if found.layout != torch.strided or found.dtype not in FLOATS:
            raise InputError(f"{self.path}: tensor {name} is {found.dtype}; only unquantised weights are supported")
        if not bool(found.isfinite().all()):
            raise InputError(f"{self.path}: tensor {name} holds values that are not finite")
        return found

    def check_counts(self, raw: Mapping[str, Any]) -> None:
        """vLLM's config is what vLLM builds by; it has to agree with the tensors."""
        for key, found in (("num_heads", self.num_heads), ("num_hidden_layers", self.num_blocks)):
            if raw.get(key, found) != found:
                raise InputError(f"{self.path}/config.json: {key} is {raw[key]!r}, but the tensors are of {found}")
        bias = self._names.block.format(head=0, block=0) + "bias"
        if (bias in self._left) != bool(raw.get("medusa_fc_bias", False)):
            there = "there" if bias in self._left else "missing"
            raise InputError(
                f"{self.path}: tensor {bias} is {there}, but config.medusa_fc_bias is "
                f"{json.dumps(raw.get('medusa_fc_bias', False))}"
            )

    def token_map(self, raw: Mapping[str, Any]) -> list[int] | None:
        """Token ids of a truncated vocabulary; a map is not used where the vocabulary is whole."""
        found, vocab = self._left.pop(TOKEN_MAP, None), raw.get("vocab_size")
        size = raw.get("truncated_vocab_size") or vocab
        if size == vocab:
            return None
        if found is None:
            raise InputError(
                f"{self.path}: tensor {TOKEN_MAP} is missing, though config.truncated_vocab_size is {size}"
            )
        if found.is_floating_point() or list(found.shape) != [size]:
            raise InputError(
                f"{self.path}: tensor {TOKEN_MAP} is {found.dtype} of shape {list(found.shape)}, expected [{size}] ids"
            )
        ids: list[int] = found.tolist()
        return ids

    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        first = self._names.block.format(head=0, block=0)
        bias = self._names.bias or first + "bias" in self._left
        return tuple(
            tuple(self._block(self._names.block.format(head=k, block=j), bias) for j in range(self.num_blocks))
            for k in range(self.num_heads)
        )

    def _block(self, prefix: str, bias: bool) -> Block:
        return Block(self._take(prefix + "weight"), self._take(prefix + "bias") if bias else None)

    def heads(self, raw: Mapping[str, Any], config: MedusaConfig) -> tuple[Tensor, ...]:
        """The linear layers: as many as the layout asks for."""
        if self.layout == "vllm":
            return self._vllm_heads(raw, config)
        if self.layout == "spdbench" and SHARED in self._left:
            return (self._take(SHARED),)
        if not self._names.has_heads(self._left):
            return ()
        return tuple(self._take(name) for name in self._head_names())

    def _head_names(self) -> Iterator[str]:
        return (self._names.head.format(head=k, blocks=self.num_blocks) for k in range(self.num_heads))

    def _vllm_heads(self, raw: Mapping[str, Any], config: MedusaConfig) -> tuple[Tensor, ...]:
        """One for each head or one for all; cut to the draft vocabulary where they come over the whole one.

        Under `original_lm_head` copies of the shared one may stand beside it, and without any the target's serves.
        """
        shared = bool(raw.get("original_lm_head", False))
        names = list(self._head_names())
        if SHARED in self._left:
            names = [SHARED]
        elif shared:
            names = [name for name in names if name in self._left]
        heads = [self._take(name) for name in names]
        if shared and len(heads) > 1:
            for name, head in zip(names, heads, strict=True):
                if not torch.equal(head, heads[0]):
                    raise InputError(
                        f"{self.path}: tensor {name} is not {names[0]}, but config.original_lm_head is true"
                    )
            heads = heads[:1]
        ids = config.draft_token_ids
        if ids is not None and config.vocab_size and all(0 <= token < config.vocab_size for token in ids):
            heads = [head[list(ids)] if head.dim() == 2 and len(head) == config.vocab_size else head for head in heads]
        return tuple(heads)

    def refuse_leftovers(self) -> None:
        if self._left:
            raise InputError(f"{self.path}: unknown tensor {min(self._left)} ({len(self._left)} in all)")
