"""SPD's heads on disk: the published files, and our own folder. Source: the heads published with arXiv 2605.30852.

published   one file, torch.save({"state_dict": ..., "config": ...}); version 11 for equal stages, 12 for the
            stages that its config lists, 10 for groups of hidden states instead of anchors
ours        config.json (the same keys, plus method, model_sha256, trained_tokens, stage_layers where stages are
            uneven, and stage_counts where it is for any number of them) and model.safetensors; no lm_head.weight where
            it is the target's own rows; matrices may be in 8 bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, overload

import torch
from pydantic import Field
from torch import Tensor

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.errors import InputError
from spdbench.models.checkpoints.config import canonical_family
from spdbench.models.checkpoints.hybrid_tensors import add_gated_layer, gated_layer
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer, geometry_of
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files, tensors_of
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench_backends.drafter_files.folder import (
    DrafterConfig,
    DrafterFile,
    checked_config,
    load_content,
    read_config,
    read_tensors,
    require_version,
)
from spdbench_backends.drafter_files.tensors import TargetTensors, draft_vocabulary, random_tensors, require_target
from spdbench_backends.spd.head import GroupedWeights, HeadWeights, LastAnchor
from spdbench_backends.spd.plan import FeaturePlan, GroupPlan, default_anchors, default_groups

VERSION, UNEVEN, GROUPED = 11, 12, 10
USUAL_WIDTH = 9216
"""Of the draft layers' feed-forward where neither the target nor the head's config has one."""
MAX_LAYERS = 1000
"""Of a head. So few that a damaged config cannot make the table of expected tensors endless."""


class ModuleConfig(DrafterConfig):
    """The published keys that the configs of all versions have."""

    version: int = VERSION
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int = Field(ge=1)
    num_stages: int = Field(ge=1)
    num_layers: int | None = None
    stage_layers: list[int] | None = None
    num_spec_layers: int = Field(ge=1, le=MAX_LAYERS)
    draft_token_ids: list[int] | None = None
    model_type: str | None = None
    spec_intermediate_size_fallback: int | None = Field(None, ge=1, le=2_000_000)


class HeadConfig(ModuleConfig):
    """The published keys of versions 11 and 12 that matter here, and some of our own."""

    aggr_feature_bound: list[int]
    trained_with_use_deepest: bool = False
    stage_counts: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Of a head for pipelines of any number of stages: those that it learned in, `num_stages` first. Its rows follow
    the layers that tokens have passed, so it may have more anchors than stages, which other readers refuse."""


class GroupedConfig(ModuleConfig):
    """The published keys of version 10. A group for each depth, the deepest first."""

    version: int = GROUPED
    shallow_hidden_layer_indices: list[list[int]] | None = None


HeadFile = DrafterFile[HeadConfig]
GroupedFile = DrafterFile[GroupedConfig]


def read_head(path: Path) -> HeadFile | GroupedFile:
    """The head in a published file of version 10, 11 or 12, or in a folder of ours.

    Raises:
        InputError: neither of the two, damaged, or of a version that is not read.
    """
    if path.is_dir():
        layout, config, files = "spdbench", read_config(path, "spd", ours_alone=True), Checkpoint(path).files
        tensors = read_tensors(files)
    else:
        layout, files, content = "published", [path], load_content(path)
        if not isinstance(content, dict) or not {"state_dict", "config"} <= content.keys():
            raise InputError(f"{path}: is not an SPD head: expected the keys state_dict and config")
        config, tensors = content["config"], tensors_of(content["state_dict"], path)
        if not isinstance(config, dict):
            raise InputError(f"{path}: is not an SPD head: its config is not a mapping")
    require_version(path, config, VERSION, UNEVEN, GROUPED)
    ids, layers = config.get("draft_token_ids"), config.get("stage_layers")
    if isinstance(ids, Tensor):
        config = {**config, "draft_token_ids": ids.tolist()}
    if isinstance(layers, str):  # "8;8;7;7" is published as well as a list
        config = {**config, "stage_layers": [int(part) if part.isdecimal() else part for part in layers.split(";")]}
    if config.get("version") == UNEVEN and layers is None:
        raise InputError(f"{path}: config.stage_layers is missing, which a head of version {UNEVEN} has to list")
    sha256 = sha256_of_files(files)
    if config.get("version") == GROUPED:
        return GroupedFile(path, layout, checked_config(GroupedConfig, config, path), tensors, sha256)
    return HeadFile(path, layout, checked_config(HeadConfig, config, path), tensors, sha256)


@overload
def build_head(
    file: HeadFile, target: Decoder, stages: tuple[range, ...], last_anchor: LastAnchor = ...
) -> HeadWeights: ...


@overload
def build_head(
    file: HeadFile | GroupedFile, target: Decoder, stages: tuple[range, ...], last_anchor: LastAnchor = ...
) -> HeadWeights | GroupedWeights: ...


def build_head(
    file: HeadFile | GroupedFile, target: Decoder, stages: tuple[range, ...], last_anchor: LastAnchor = "plain"
) -> HeadWeights | GroupedWeights:
    """The head for `target` cut into `stages`. `last_anchor` says how it reads the last layer's output.

    Raises:
        InputError: made for another hidden size, vocabulary, family, number of layers or of stages, or damaged.
    """
    _require_same_model(file, target, stages)
    if isinstance(file.config, GroupedConfig):
        if last_anchor != "plain":
            raise file.error(f"is of version {GROUPED}, which does not read the last layer's output")
        return _build_grouped(replace(file, config=file.config), target, stages)
    return _build_anchored(replace(file, config=file.config), target, stages, last_anchor)


def _require_same_model(file: HeadFile | GroupedFile, target: Decoder, stages: tuple[range, ...]) -> None:
    base, config = target.config, file.config
    family = None if config.model_type is None else canonical_family(config.model_type)
    require_target(
        file,
        ("config.model_type", family, base.family),
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
        ("config.num_layers", config.num_layers, base.num_layers),
    )
    if isinstance(config, HeadConfig) and config.stage_counts is not None:
        return
    fitting = f"; use -o spd.stages={config.num_stages}"
    require_target(file, ("config.num_stages", config.num_stages, len(stages)), remedy=fitting)


def _build_anchored(file: HeadFile, target: Decoder, stages: tuple[range, ...], last_anchor: LastAnchor) -> HeadWeights:
    base, config = target.config, file.config
    plan = _plan(file, stages)
    if last_anchor != "plain" and base.num_layers not in plan.anchors:
        raise file.error(f"does not read the last layer's output: its anchors are {list(plan.anchors)}")
    if not plan.any_stages and not plan.fits(trained := _trained_stages(file, base.num_layers)):
        cut, asked = (",".join(str(len(layers)) for layers in each) for each in (trained, stages))
        raise file.error(
            f"was trained for stages of {cut} layers; cut into {asked}, tokens in flight have not reached the same of "
            f"its anchors {list(plan.anchors)}"
        )
    vocabulary = draft_vocabulary(file, config.draft_token_ids, target, size=config.draft_vocab_size)
    expected = _head_tensors(target, config)
    rows = {"lm_head.weight": (config.draft_vocab_size, base.hidden_size)}
    expected.add(rows, optional=file.layout == "spdbench")
    tensors = TargetTensors(file, expected, target)
    decoder = _module_decoder(tensors, target, config.num_spec_layers, vocabulary)
    projections = tuple(tensors.linear(f"aggr_projs.{index}.") for index in range(len(plan.anchors)))
    return HeadWeights(plan, decoder, vocabulary, projections, config.trained_with_use_deepest, last_anchor)


def _build_grouped(file: GroupedFile, target: Decoder, stages: tuple[range, ...]) -> GroupedWeights:
    base, config = target.config, file.config
    listed, count = config.shallow_hidden_layer_indices, config.num_stages
    if len({len(layers) for layers in stages}) > 1:
        raise file.error(f"is of version {GROUPED}, whose stages are equal; give -o spd.stages={count} alone")
    try:
        groups = default_groups(base.num_layers, count) if listed is None else tuple(map(tuple, reversed(listed)))
        plan = GroupPlan(groups, stages)
    except ValueError as error:
        raise file.error(f"config.shallow_hidden_layer_indices: {error}") from None
    vocabulary = draft_vocabulary(file, config.draft_token_ids, target, size=config.draft_vocab_size)
    width, layers = base.hidden_size, config.num_spec_layers
    expected = ExpectedTensors({"lm_head.weight": (config.draft_vocab_size, width), "g0_proj.weight": (width, width)})
    for index, group in enumerate(reversed(groups)):
        expected.add({f"stage_projs.{index}.weight": (width, len(group) * width)})
    by_layer = [[f"fixed_stage_per_layer_projs.{layer}.{i}.weight" for i in range(count)] for layer in range(layers)]
    expected.add({name: (width, width) for names in by_layer for name in names})
    _add_module_layers(expected, target, config)
    tensors = TargetTensors(file, expected, target)
    return GroupedWeights(
        plan=plan,
        decoder=_module_decoder(tensors, target, layers, vocabulary),
        vocabulary=vocabulary,
        newest=tensors["g0_proj.weight"],
        by_depth=tuple(tensors[f"stage_projs.{count - depth}.weight"] for depth in range(1, count + 1)),
        restarts=tuple(tuple(tensors[name] for name in reversed(names)) for names in by_layer),
    )


def _module_decoder(tensors: TargetTensors, target: Decoder, num_layers: int, vocabulary: DraftVocabulary) -> Decoder:
    """A draft module's layers, which are of the target's kind of full attention."""
    decoder = drafter_decoder(tensors, target, "spec_layers", 0, vocabulary)
    hybrid = target.config.recurrent is not None
    prefixes = [f"spec_layers.{index}." for index in range(num_layers)]
    weights = {
        index: gated_layer(tensors.get, prefix, target.config) if hybrid else dense_layer(tensors.get, prefix)
        for index, prefix in enumerate(prefixes)
    }
    return replace(decoder, layers=range(num_layers), weights=weights)


def drafter_decoder(
    tensors: TargetTensors, target: Decoder, prefix: str, num_layers: int, vocabulary: DraftVocabulary
) -> Decoder:
    """A drafter's own layers, called `PREFIX.0` and so on, between no embedding and the target's final norm."""
    return replace(
        target,
        layers=range(num_layers),
        weights={index: dense_layer(tensors.get, f"{prefix}.{index}.") for index in range(num_layers)},
        embeddings_VM=None,
        head=tensors.head("lm_head.weight", vocabulary),
    )


def _plan(file: HeadFile, stages: tuple[range, ...]) -> FeaturePlan:
    try:
        shared = file.config.stage_counts is not None
        return FeaturePlan(tuple(file.config.aggr_feature_bound), stages, any_stages=shared)
    except ValueError as error:
        raise file.error(f"config.aggr_feature_bound: {error}") from None


def _trained_stages(file: HeadFile, num_layers: int) -> tuple[range, ...]:
    """The cut that the head was trained for: an even one unless its config lists the stages."""
    try:
        if file.config.stage_layers is not None:
            if len(file.config.stage_layers) != file.config.num_stages:
                raise InputError(
                    f"num_stages is {file.config.num_stages}, but stage_layers lists {len(file.config.stage_layers)}"
                )
            return split_by_counts(num_layers, file.config.stage_layers)
        return split_evenly(num_layers, file.config.num_stages)
    except InputError as error:
        raise file.error(f"config: {error}") from None


def _head_tensors(target: Decoder, config: HeadConfig) -> ExpectedTensors:
    """The tensors of a head but for its output head."""
    expected, width = ExpectedTensors(), target.config.hidden_size
    rows = range(len(config.aggr_feature_bound))
    expected.add({f"aggr_projs.{index}.weight": (width, (index + 1) * width) for index in rows})
    _add_module_layers(expected, target, config)
    return expected


def _add_module_layers(expected: ExpectedTensors, target: Decoder, config: ModuleConfig) -> None:
    """The draft layers, of the kind that `_module_decoder` makes. Where all of the target's layers are mixtures, the
    head's config gives the width of their feed-forward."""
    base, width = target.config, target.config.intermediate_size
    if base.recurrent is not None and base.experts is not None:
        width = config.spec_intermediate_size_fallback or USUAL_WIDTH
    for prefix in (f"spec_layers.{index}." for index in range(config.num_spec_layers)):
        if base.recurrent is None:
            expected.add_layer(prefix, geometry_of(base), base.hidden_size, width, head_norms=True)
        else:
            add_gated_layer(expected, prefix, base, width)


def random_head(target: Decoder, stages: tuple[range, ...], seed: int, num_layers: int = 1) -> HeadFile:
    """An untrained head: matrices drawn from N(0, 0.02²), norms that change nothing, the target's own head rows."""
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
        spec_intermediate_size_fallback=base.intermediate_size,
    )
    tensors = random_tensors(_head_tensors(target, config).required, seed)
    if base.recurrent is not None:  # whose norms are stored as their difference from one
        tensors = {name: torch.zeros_like(each) if each.ndim == 1 else each for name, each in tensors.items()}
    return HeadFile(Path("random"), "spdbench", config, tensors)


def write_published(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A head as a version 11 file, which has to hold its `lm_head.weight`."""
    with file.open("wb") as handle:  # a full disk is an `OSError`, and torch's own error otherwise
        torch.save({"state_dict": dict(tensors), "config": dict(config)}, handle)
