"""SPD heads on disk: the published version 11 file, and our own folder with the same tensors as safetensors.

Strict: an unknown, missing or misshapen tensor is an error that names it. Source: SPD.md, section 3. Must not know how
a head is used.

    published   one file, torch.save({"state_dict": ..., "config": ...})
    ours        config.json (the same keys, plus method, model_sha256, trained_tokens, and stage_layers where stages are
                uneven) and model.safetensors; no lm_head.weight where it is the target's own rows; matrices may be
                in 8 bits, as `packing` has them
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save
from torch import Tensor

from spdbench.errors import InputError, validated
from spdbench.models.checkpoints.weights import sha256_of_files
from spdbench.models.cpu.linear import Linear, linear
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench_backends.drafter_files import read_config
from spdbench_backends.packing import unpacked
from spdbench_backends.spd.head import HeadWeights
from spdbench_backends.spd.plan import FeaturePlan, default_anchors
from spdbench_backends.spd.tensors import TensorTaker, dense_layer, layer_shapes, random_tensors

VERSION = 11


class HeadConfig(BaseModel):
    """The config of a head: the published keys that matter here, checked, and some of our own."""

    model_config = ConfigDict(strict=True, frozen=True)

    version: int = VERSION
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int = Field(ge=1)
    num_stages: int = Field(ge=1)
    stage_layers: list[int] | None = None
    num_spec_layers: int = Field(ge=1)
    aggr_feature_bound: list[int]
    trained_with_use_deepest: bool = False
    draft_token_ids: list[int] | None = None
    model_type: str | None = None
    trained_tokens: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class HeadFile:
    """A head as read: its config, its tensors in the published names, and where it came from."""

    path: Path
    config: HeadConfig
    tensors: dict[str, Tensor]
    sha256: str


def read_head(path: Path) -> HeadFile:
    """The head in a version 11 file, or in a folder of ours.

    Raises:
        InputError: neither of the two, damaged, or of a version that is not read.
    """
    config, tensors, file = _read_folder(path) if path.is_dir() else _read_published(path)
    if not isinstance(config, dict) or not isinstance(tensors, dict):
        raise InputError(f"{path}: is not an SPD head: its config and its state_dict have to be mappings")
    if config.get("version", VERSION) != VERSION:
        raise InputError(f"{path}: is an SPD head of version {config['version']}. Allowed: {VERSION}.")
    ids = config.get("draft_token_ids")
    if isinstance(ids, Tensor):
        config = {**config, "draft_token_ids": ids.tolist()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise InputError(f"{path}: {name} is not a dense tensor of floating-point numbers")
    checked = validated(HeadConfig, config, f"{path}: config.")
    return HeadFile(path, checked, {str(name): tensor for name, tensor in tensors.items()}, sha256_of_files([file]))


def _read_folder(path: Path) -> tuple[object, object, Path]:
    config, file = read_config(path), path / "model.safetensors"
    try:
        return config, unpacked(load_file(file)), file
    except FileNotFoundError:
        raise InputError(f"{path}: is not a drafter folder, it has no {file.name}") from None
    except Exception as error:  # safetensors raises a type of its own
        raise InputError(f"{path}: cannot be read as a drafter ({error})") from None


def _read_published(path: Path) -> tuple[object, object, Path]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types, and its message for unsafe files advises what must not be done
        raise InputError(
            f"{path}: cannot be read as an SPD head: it is damaged, no torch file, or holds more than plain tensors"
        ) from None
    if not isinstance(content, dict) or not {"state_dict", "config"} <= content.keys():
        raise InputError(f"{path}: is not an SPD head: expected the keys state_dict and config")
    return content["config"], content["state_dict"], path


def build_head(file: HeadFile, target: Decoder, stages: tuple[range, ...]) -> HeadWeights:
    """The head for `target` cut into `stages`.

    Raises:
        InputError: made for another hidden size, vocabulary, family or number of stages, or damaged.
    """
    base = target.config
    config = file.config
    for key, found, expected in (
        ("model_type", config.model_type or base.family, base.family),
        ("hidden_size", config.hidden_size, base.hidden_size),
        ("vocab_size", config.vocab_size, base.vocab_size),
        ("num_stages", config.num_stages, len(stages)),
    ):
        if found != expected:
            mend = f"; use -o spd.stages={found}" if key == "num_stages" else ": it was made for another model"
            raise InputError(f"{file.path}: config.{key} is {found}, but here it is {expected}{mend}")
    plan = _plan(file, stages)
    trained = _plan(file, _trained_stages(file, base.num_layers))
    if plan.row_types != trained.row_types:
        cut, asked = (",".join(str(len(layers)) for layers in p.stages) for p in (trained, plan))
        raise InputError(
            f"{file.path}: was trained for stages of {cut} layers; cut into {asked}, tokens in flight have not reached "
            f"the same of its anchors {list(plan.anchors)}"
        )
    token_ids = _draft_vocabulary(file, base.vocab_size)
    take = TensorTaker(file.path, file.tensors, target)
    head = _assemble(take, plan, target, config, token_ids, shared_head=file.path.is_dir())
    take.refuse_leftovers()
    return replace(head, use_deepest=config.trained_with_use_deepest)


def _plan(file: HeadFile, stages: tuple[range, ...]) -> FeaturePlan:
    try:
        return FeaturePlan(tuple(file.config.aggr_feature_bound), stages)
    except ValueError as error:
        raise InputError(f"{file.path}: config.aggr_feature_bound: {error}") from None


def _trained_stages(file: HeadFile, num_layers: int) -> tuple[range, ...]:
    """The cut that the head was trained for; published heads know only even ones."""
    try:
        if file.config.stage_layers is not None:
            return split_by_counts(num_layers, file.config.stage_layers)
        return split_evenly(num_layers, file.config.num_stages)
    except InputError as error:
        raise InputError(f"{file.path}: config: {error}") from None


def _draft_vocabulary(file: HeadFile, vocab_size: int) -> Tensor | None:
    ids, size = file.config.draft_token_ids, file.config.draft_vocab_size
    if ids is None:
        if size != vocab_size:
            raise InputError(f"{file.path}: config.draft_vocab_size is {size} but config.draft_token_ids is missing")
        return None
    ascending = all(a < b for a, b in pairwise(ids))
    if len(ids) != size or not ascending or ids[0] < 0 or ids[-1] >= vocab_size:
        raise InputError(f"{file.path}: config.draft_token_ids must be {size} ascending ids below {vocab_size}")
    return torch.tensor(ids, dtype=torch.long)


def _assemble(
    take: TensorTaker,
    plan: FeaturePlan,
    target: Decoder,
    config: HeadConfig,
    token_ids: Tensor | None,
    *,
    shared_head: bool,
) -> HeadWeights:
    """`shared_head`: a file without a head means the target's own rows of the draft vocabulary."""
    width, indices = target.config.hidden_size, range(config.num_spec_layers)
    projections = tuple(take(f"aggr_projs.{i}.weight", width, (i + 1) * width) for i in range(len(plan.anchors)))
    layers = {index: dense_layer(take, target, f"spec_layers.{index}.", head_norms=True) for index in indices}
    shape = (config.draft_vocab_size, width)
    rows = take.optional("lm_head.weight", *shape) if shared_head else take("lm_head.weight", *shape)
    head = _targets_rows(target, token_ids) if rows is None else linear(rows)
    decoder = replace(target, layers=indices, weights=layers, embeddings_VM=None, head=head)
    ids = None if token_ids is None else token_ids.to(target.device)
    return HeadWeights(plan, projections, decoder, ids, use_deepest=True)


def _targets_rows(target: Decoder, token_ids: Tensor | None) -> Linear:
    """The target's head over the draft vocabulary."""
    assert target.head is not None
    return target.head if token_ids is None else linear(target.head.plain()[token_ids.to(target.device)])


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A head as a folder of ours; the config, by which it is found, comes last."""
    (folder / "model.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    (folder / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def write_published(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A head as a version 11 file, which has to hold its `lm_head.weight`."""
    torch.save({"state_dict": dict(tensors), "config": dict(config)}, file)


def random_head(target: Decoder, stages: tuple[range, ...], seed: int, num_layers: int = 1) -> HeadFile:
    """An untrained head: matrices drawn from N(0, 0.02²), norms of ones, the target's own head rows."""
    base = target.config
    assert target.head is not None
    anchors = default_anchors(base.num_layers, len(stages))
    tensors = {"lm_head.weight": target.head.plain(), **random_tensors(_shapes(target, len(anchors), num_layers), seed)}
    config = HeadConfig(
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        draft_vocab_size=base.vocab_size,
        num_stages=len(stages),
        stage_layers=[len(layers) for layers in stages],
        num_spec_layers=num_layers,
        aggr_feature_bound=list(anchors),
        trained_with_use_deepest=True,
    )
    return HeadFile(Path("random"), config, tensors, "")


def _shapes(target: Decoder, num_anchors: int, num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a head but its `lm_head`, by published name."""
    width = target.config.hidden_size
    for i in range(num_anchors):
        yield f"aggr_projs.{i}.weight", (width, (i + 1) * width)
    for index in range(num_layers):
        yield from layer_shapes(target, f"spec_layers.{index}.", head_norms=True)
