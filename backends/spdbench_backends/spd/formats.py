"""Heads of pipelines on disk: SPD's published version 11 file and our own folder, and PPSD's exit head.

SPD (source: SPD.md, section 3):

    published   one file, torch.save({"state_dict": ..., "config": ...})
    ours        config.json (the same keys, plus method, model_sha256, trained_tokens, and stage_layers where stages are
                uneven) and model.safetensors; no lm_head.weight where it is the target's own rows; matrices may be
                in 8 bits

PPSD (METHODS.md, section C; the published code is not available, so the format is our own): decoder layers over stage
0's output, then a final norm and a head, by default the target's own.

    config.json         method, version, hidden_size, vocab_size, exit_layer, num_layers; model_sha256, num_stages,
                        trained_tokens
    model.safetensors   layers.I.* as in a target's checkpoint; norm.weight and lm_head.weight if they are its own;
                        matrices may be in 8 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.decoder import Decoder, geometry_of
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench_backends.drafter_files.folder import (
    FOLDER_VERSION,
    DrafterConfig,
    DrafterFile,
    checked_config,
    load_content,
    read_config,
    read_tensors,
    require_version,
    tensors_of,
)
from spdbench_backends.drafter_files.tensors import TargetTensors, draft_vocabulary, random_tensors, require_target
from spdbench_backends.spd.head import HeadWeights
from spdbench_backends.spd.plan import FeaturePlan, default_anchors

VERSION = 11
MOST_LAYERS = 1000
"""Of a head. So few that a damaged config cannot make the table of expected tensors endless."""


class HeadConfig(DrafterConfig):
    """The published keys of a head's config that matter here, and some of our own."""

    version: int = VERSION
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int = Field(ge=1)
    num_stages: int = Field(ge=1)
    stage_layers: list[int] | None = None
    num_spec_layers: int = Field(ge=1, le=MOST_LAYERS)
    aggr_feature_bound: list[int]
    trained_with_use_deepest: bool = False
    draft_token_ids: list[int] | None = None
    model_type: str | None = None


HeadFile = DrafterFile[HeadConfig]


def read_head(path: Path) -> HeadFile:
    """The head in a version 11 file, or in a folder of ours.

    Raises:
        InputError: neither of the two, damaged, or of a version that is not read.
    """
    if path.is_dir():
        layout, config, files = "spdbench", read_config(path, "spd"), Checkpoint(path).files
        tensors = read_tensors(files)
    else:
        layout, files, content = "spd-v11", [path], load_content(path)
        if not isinstance(content, dict) or not {"state_dict", "config"} <= content.keys():
            raise InputError(f"{path}: is not an SPD head: expected the keys state_dict and config")
        config, tensors = content["config"], tensors_of(content["state_dict"], path)
        if not isinstance(config, dict):
            raise InputError(f"{path}: is not an SPD head: its config is not a mapping")
    require_version(path, config, VERSION)
    ids = config.get("draft_token_ids")
    if isinstance(ids, Tensor):
        config = {**config, "draft_token_ids": ids.tolist()}
    return HeadFile(path, layout, checked_config(HeadConfig, config, path), tensors, sha256_of_files(files))


def build_head(file: HeadFile, target: Decoder, stages: tuple[range, ...]) -> HeadWeights:
    """The head for `target` cut into `stages`.

    Raises:
        InputError: made for another hidden size, vocabulary, family or number of stages, or damaged.
    """
    base, config = target.config, file.config
    require_target(
        file,
        ("config.model_type", config.model_type, base.family),
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
    )
    fitting = f"; use -o spd.stages={config.num_stages}"
    require_target(file, ("config.num_stages", config.num_stages, len(stages)), remedy=fitting)
    plan = _plan(file, stages)
    trained = _plan(file, _trained_stages(file, base.num_layers))
    if plan.row_types != trained.row_types:
        cut, asked = (",".join(str(len(layers)) for layers in p.stages) for p in (trained, plan))
        raise file.error(
            f"was trained for stages of {cut} layers; cut into {asked}, tokens in flight have not reached the same of "
            f"its anchors {list(plan.anchors)}"
        )
    token_ids_U = draft_vocabulary(file, config.draft_token_ids, target, size=config.draft_vocab_size)
    expected = _head_tensors(target, len(plan.anchors), config.num_spec_layers)
    rows = {"lm_head.weight": (config.draft_vocab_size, base.hidden_size)}
    expected.add(rows, optional=file.layout == "spdbench")
    tensors = TargetTensors(file, expected, target)
    decoder = _decoder(tensors, target, "spec_layers", config.num_spec_layers, token_ids_U)
    projections = tuple(tensors[f"aggr_projs.{index}.weight"] for index in range(len(plan.anchors)))
    return HeadWeights(plan, projections, decoder, token_ids_U, use_deepest=config.trained_with_use_deepest)


def _decoder(
    tensors: TargetTensors, target: Decoder, prefix: str, num_layers: int, token_ids_U: Tensor | None
) -> Decoder:
    """A drafter's own layers, called `PREFIX.0` and so on, between no embedding and the target's final norm."""
    return replace(
        target,
        layers=range(num_layers),
        weights={index: dense_layer(tensors.get, f"{prefix}.{index}.") for index in range(num_layers)},
        embeddings_VM=None,
        head=tensors.head("lm_head.weight", token_ids_U),
    )


def _plan(file: HeadFile, stages: tuple[range, ...]) -> FeaturePlan:
    try:
        return FeaturePlan(tuple(file.config.aggr_feature_bound), stages)
    except ValueError as error:
        raise file.error(f"config.aggr_feature_bound: {error}") from None


def _trained_stages(file: HeadFile, num_layers: int) -> tuple[range, ...]:
    """The cut that the head was trained for; published heads know only even ones."""
    try:
        if file.config.stage_layers is not None:
            return split_by_counts(num_layers, file.config.stage_layers)
        return split_evenly(num_layers, file.config.num_stages)
    except InputError as error:
        raise file.error(f"config: {error}") from None


def _head_tensors(target: Decoder, num_anchors: int, num_layers: int) -> ExpectedTensors:
    """The tensors of a head but for its output head."""
    base, expected = target.config, ExpectedTensors()
    width = base.hidden_size
    expected.add({f"aggr_projs.{index}.weight": (width, (index + 1) * width) for index in range(num_anchors)})
    for index in range(num_layers):
        expected.add_layer(f"spec_layers.{index}.", geometry_of(base), width, base.intermediate_size, head_norms=True)
    return expected


def random_head(target: Decoder, stages: tuple[range, ...], seed: int, num_layers: int = 1) -> HeadFile:
    """An untrained head: matrices drawn from N(0, 0.02²), norms of ones, the target's own head rows."""
    base, anchors = target.config, default_anchors(target.config.num_layers, len(stages))
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
    shapes = _head_tensors(target, len(anchors), num_layers).required
    return HeadFile(Path("random"), "spdbench", config, random_tensors(shapes, seed))


def write_published(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A head as a version 11 file, which has to hold its `lm_head.weight`."""
    torch.save({"state_dict": dict(tensors), "config": dict(config)}, file)


class ExitConfig(DrafterConfig):
    """`exit_layer` is how many of the target's layers come before the head."""

    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    exit_layer: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_stages: int | None = Field(None, ge=1)


ExitFile = DrafterFile[ExitConfig]


def read_exit(path: Path) -> ExitFile:
    """The head in a folder.

    Raises:
        InputError: it is no such folder, or damaged.
    """
    raw = read_config(path, "ppsd")
    if "method" not in raw:
        raise InputError(f"{path}: is not a PPSD drafter: its config names no method")
    require_version(path, raw, FOLDER_VERSION)
    files = Checkpoint(path).files
    config = checked_config(ExitConfig, raw, path)
    return ExitFile(path, "spdbench", config, read_tensors(files), sha256_of_files(files))


def random_exit(target: Decoder, stages: tuple[range, ...], seed: int) -> ExitFile:
    """An untrained head of one layer."""
    base = target.config
    config = ExitConfig(
        hidden_size=base.hidden_size, vocab_size=base.vocab_size, exit_layer=stages[0].stop, num_layers=1
    )
    return ExitFile(Path("random"), "spdbench", config, random_tensors(_exit_tensors(target, 1).required, seed))


def build_exit(file: ExitFile, target: Decoder, stages: tuple[range, ...]) -> Decoder:
    """The head as a decoder of its own layers alone, for `target` cut into `stages`.

    Raises:
        InputError: made for another target or another first stage, or damaged.
    """
    base, config = target.config, file.config
    require_target(
        file,
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
    )
    fitting = ": give ppsd.stages or ppsd.stage_layers that fit"
    require_target(file, ("config.exit_layer", config.exit_layer, stages[0].stop), remedy=fitting)
    tensors = TargetTensors(file, _exit_tensors(target, config.num_layers), target)
    decoder = _decoder(tensors, target, "layers", config.num_layers, None)
    return replace(decoder, final_norm=tensors.norm("norm.weight") or target.final_norm)


def _exit_tensors(target: Decoder, num_layers: int) -> ExpectedTensors:
    base, expected = target.config, ExpectedTensors()
    for index in range(num_layers):
        expected.add_layer(f"layers.{index}.", geometry_of(base), base.hidden_size, base.intermediate_size)
    expected.add({"norm.weight": (base.hidden_size,)}, optional=True)
    expected.add({"lm_head.weight": (base.vocab_size, base.hidden_size)}, optional=True)
    return expected
