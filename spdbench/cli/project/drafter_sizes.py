"""What a draft of each installed drafter reads on an accelerator, from configs and the headers of weight files.

A matrix counts as it is computed with there: in the target's dtype, however the file stores it (8 bits are multiplied
on CPUs alone). Most files hold no output head: they borrow the target's rows of their draft vocabulary, which a draft
reads like the drafter's own. Of an embedding it reads one row, and of scales and token maps nothing.

    spd, ppsd   all matrices and the head in each draft; of a head for any number of stages, the projections of the row
                types that tokens reach in so many
    eagle3      layers and head for each level of a tree; `fc` once a draft, where it reads the target's features alone
    medusa      one head's blocks for each level; the rows of the output head once, where all heads share them

A drafter's own keys and values are omitted: its one or two layers have few next to their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdbench.errors import InputError
from spdbench.input_files import read_json
from spdbench.models.checkpoints.folders import drafter_folders
from spdbench.models.checkpoints.layer_tensors import SCALE
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.profiles.datasheet import DrafterSize, Sizes

if TYPE_CHECKING:
    from spdbench.models.target import Target

TREE_METHODS = {"eagle": "eagle3", "medusa": "medusa"}
"""Backends that choose trees by cost -> the method of their drafters."""
PIPELINE_METHODS = {"spd": "spd", "ppsd": "ppsd"}
UNREAD = ("embed_tokens.", "d2t", "t2d")
Shapes = Mapping[str, tuple[int, ...]]


def drafter_sizes(target: Target, sizes: Sizes) -> Iterator[DrafterSize]:
    """Those of the drafters for `target` that are installed; for a method without one, that of a drafter of one layer
    (Medusa: one block a head) and the target's whole head."""
    found = set()
    for folder in drafter_folders():
        for file in sorted(folder.glob("*/config.json")):
            with suppress(InputError, TypeError, ValueError):  # `run` names what is wrong with a config
                config = read_json(file)
                if isinstance(config, dict) and config.get("model_sha256") == target.files.sha256:
                    yield from list(_sizes_of(file.parent, config, target))  # all of them, or none
                    found.add(config.get("method"))
    block = float(target.config.hidden_size**2 * sizes.itemsize)
    for method in {*TREE_METHODS.values(), *PIPELINE_METHODS.values()} - found:
        fields = (("stages", 2),) if method in PIPELINE_METHODS.values() else (("tree", "chain"),)
        if method == "medusa":
            yield DrafterSize(method, "assumed", block, fields, sizes.head)
        else:
            yield DrafterSize(method, "assumed", sizes.layer_read(1) + sizes.head, fields)


def _sizes_of(folder: Path, config: Mapping[str, Any], target: Target) -> Iterator[DrafterSize]:
    """One for each number of stages that it learned in. Raises `InputError` for weights that cannot be read, and
    `ValueError` or `TypeError` for a config that makes no sense."""
    with closing(Checkpoint(folder)) as checkpoint:
        shapes = {name: shape for name, shape in checkpoint.shapes().items() if not name.endswith(SCALE)}
        sha256 = sha256_of_files(checkpoint.files)
    itemsize, method = target.dtype.itemsize, str(config.get("method"))
    for stages in config.get("stage_counts") or [config.get("num_stages")]:
        read = reached(config, shapes, stages)
        each, once = draft_parameters(config, read, target.config.vocab_size, target.config.hidden_size)
        fields = (("stages", stages),) if stages else (("tree", "chain"),)
        yield DrafterSize(method, sha256, each * itemsize, fields, once * itemsize)


def reached(config: Mapping[str, Any], shapes: Shapes, stages: int | None) -> Shapes:
    """`shapes` but for projections that a draft in so many equal stages does not read: those of row types that no token
    has at a stage's end. Only a head for any number of stages has such.

    Raises:
        ValueError: the config does not say what its rows read, or has more stages than layers.
    """
    if not config.get("stage_counts") or not stages:
        return shapes
    anchors, num_layers = config.get("aggr_feature_bound"), config.get("num_layers")
    if not isinstance(anchors, list) or not isinstance(num_layers, int) or not 1 <= stages <= num_layers:
        raise ValueError(f"{stages} stages of {num_layers} layers, anchors {anchors}")
    ends = [depth * num_layers // stages for depth in range(stages + 1)]
    kinds = {max(kind for kind, anchor in enumerate(anchors) if anchor <= end) for end in ends}
    unread = {f"aggr_projs.{kind}.weight" for kind in range(len(anchors)) if kind not in kinds}
    return {name: shape for name, shape in shapes.items() if name not in unread}


def draft_parameters(config: Mapping[str, Any], shapes: Shapes, vocab_size: int, width: int) -> tuple[float, float]:
    """Parameters that a draft reads for each of its levels, and once. `shapes` are those of the drafter's tensors
    without scales, `vocab_size` and `width` the target's."""
    ids = config.get("draft_token_ids")
    vocabulary = len(ids) if isinstance(ids, list) else int(config.get("draft_vocab_size") or vocab_size)
    read = {name: prod(shape) for name, shape in shapes.items() if not name.startswith(UNREAD)}
    heads = {name for name in read if len(shapes[name]) > 1 and shapes[name][0] == vocabulary}
    borrowed = 0 if heads else vocabulary * width
    total = float(sum(read.values()) + borrowed)
    if config.get("method") == "medusa":
        shared = borrowed + sum(read[name] for name in heads if name.startswith("lm_head."))
        return (total - shared) / max(1, len({name.partition(".")[0] for name in {*read} - heads})), shared
    once = read.get("fc.weight", 0) if config.get("aux_hidden_states") else 0
    return total - once, once
