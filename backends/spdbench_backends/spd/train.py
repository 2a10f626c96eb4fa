"""How an SPD head is trained: rows of the newest depth against the target, as if every position were the newest.

Source: SPD.md, sections 2 and 8. Must not know how steps are taken, nor where data comes from.
Shapes: B texts, S positions, N rows that count, M model width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from spdbench.errors import InputError
from spdbench.models.partition import split_by_counts, split_evenly
from spdbench.training.losses import greedy_tokens, kl_rows
from spdbench.training.modules import DecoderLayer
from spdbench.training.recipe import Batch, Counts, Provenance, RecipeOptions, Teacher, training_device
from spdbench_backends.drafter_files import origin
from spdbench_backends.packing import Storage, stored, unpacked
from spdbench_backends.spd.formats import VERSION, write_folder, write_published
from spdbench_backends.spd.pipelined import counts_of, usual_stages
from spdbench_backends.spd.plan import FeaturePlan, default_anchors
from spdbench_backends.spd.trainable import TrainableModule, copy_layer, fit_projections, positions

Counted = Annotated[tuple[int, ...] | None, BeforeValidator(counts_of)]
PUBLISHED = "head.pt"
MOST_OWN_ANCHORS = 5
"""Up to so many anchors every stage's end is one by default; beyond, projections would outweigh the layers."""


class PipelineTraining(RecipeOptions):
    """Options of what drafts for a pipeline."""

    stage_layers: Counted = Field(None, description="layers of each stage, e.g. 11,10,9; default: equal stages")
    layers: int = Field(1, ge=1, description="decoder layers of the drafter")
    init_layers: Counted = Field(
        None, description="the target's layers that the drafter's begin as, e.g. 29; default: the last ones"
    )
    storage: Storage = Field(
        "bfloat16", description="a matrix's numbers in the file; int8: half the bytes, a row a scale"
    )


class SPDTraining(PipelineTraining):
    """Options of `train spd`."""

    anchors: Counted = Field(
        None, description="hidden states that rows read, e.g. 0,10,20,30; default: the stages' ends where they are few"
    )
    head: Literal["frozen", "trained"] = Field(
        "frozen", description="frozen: the target's own rows, which the file need not hold; trained: rows of its own"
    )
    all_depths: float = Field(0.0, ge=0, description="weight of the same loss on rows of all other depths")


class SPDRecipe:
    """Trains the Pipeline Draft Module."""

    method: ClassVar[str] = "spd"
    Options: ClassVar[type[RecipeOptions]] = SPDTraining
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "spd-v11")

    def __init__(
        self, options: RecipeOptions, teacher: Teacher, draft_ids_U: Tensor | None, num_stages: int | None
    ) -> None:
        chosen = self._options = cast(SPDTraining, options)
        config, device = teacher.config, training_device(teacher)
        stages = cut(config.num_layers, num_stages, chosen.stage_layers)
        anchors = chosen.anchors or usual_anchors(stages)
        try:
            self._plan = FeaturePlan(anchors, stages)
        except ValueError as error:
            raise InputError(f"-o anchors={','.join(map(str, anchors))}: {error}") from None
        self._teacher = teacher
        self._vocabulary = DraftVocabulary(teacher, draft_ids_U)
        own_head_UM = self._vocabulary.head_UM if chosen.head == "trained" else None
        module = TrainableModule(config, self._plan, chosen.layers, own_head_UM)
        first, *_ = begin_as(cast("list[DecoderLayer]", list(module.spec_layers)), teacher, chosen.init_layers)
        self._aim = first
        self.hidden_indices = tuple(sorted({*anchors, first}))
        self.module: nn.Module = module.to(device)
        self._module = module

    @property
    def _head(self) -> Tensor:
        """The rows `[U, M]` that drafts come from."""
        return self._vocabulary.head_UM if self._module.lm_head is None else self._module.lm_head.weight

    def fit(self, batches: Iterable[Batch]) -> None:
        """Each projection begins as the linear guess, from what its rows read, of what the first layer knew to read."""
        fit_projections(self._module, batches, self._aim)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        full = self._plan.full_depth
        fill = full if full == 1 or torch.rand(()) < 0.5 else int(torch.randint(1, full, ()))
        others = (*range(1, fill), full) if self._options.all_depths else ()
        rows = self._rows(batch, fill, (0, *others))
        counted_BS = batch.answers_BS & self._vocabulary.holds(batch.argmax_BS)
        teacher_NM = self._teacher.normed(batch.states[self._teacher.config.num_layers][counted_BS])
        means = {depth: self._mean_kl(row[counted_BS], teacher_NM) for depth, row in rows.items()}
        total = means[0]
        figures: dict[str, float] = {"fill": fill}
        for depth in others:
            total = total + self._options.all_depths / len(others) * means[depth]
            agreed = self._agreed(rows[depth], batch)[batch.answers_BS]
            figures[f"accuracy_{depth}"] = float(agreed.float().mean()) if len(agreed) else 0.0
        return total, figures

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        row_BSM = self._rows(batch, self._plan.full_depth, (0,))[0]
        agreed = self._agreed(row_BSM, batch)[batch.answers_BS]
        return Counts((agreed.numel(),), (int(agreed.sum()),))

    def require_layout(self, layout: str) -> None:
        """A version 11 file has no words for uneven stages."""
        sizes = [len(layers) for layers in self._plan.stages]
        if layout == "spd-v11" and len(set(sizes)) > 1:
            raise InputError(
                f"--format spd-v11: knows equal stages only, not {','.join(map(str, sizes))} layers; give --stages N "
                f"that divides {sum(sizes)} in place of -o stage_layers, or --format spdbench"
            )

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        self.require_layout(layout)
        config, tensors = self._config(about), stored(self.module.state_dict(), self._options.storage)
        if layout == "spd-v11":
            tensors = stored({"lm_head.weight": self._head, **unpacked(tensors)}, "bfloat16")
            write_published(directory / PUBLISHED, config, tensors)
        write_folder(directory, config, tensors)

    def _config(self, about: Provenance) -> dict[str, Any]:
        plan, base, vocabulary = self._plan, self._teacher.config, self._vocabulary
        sizes = [len(layers) for layers in plan.stages]
        config: dict[str, Any] = {
            "method": self.method,
            "version": VERSION,
            "model_type": base.family,
            "base_model_path": about.model_id,
            "hidden_size": base.hidden_size,
            "vocab_size": base.vocab_size,
            "draft_vocab_size": vocabulary.head_UM.shape[0],
            "num_stages": len(sizes),
            "num_spec_layers": len(self._module.spec_layers),
            "num_aggr_types": len(plan.anchors),
            "aggr_feature_bound": list(plan.anchors),
            "trained_with_use_deepest": True,
            **origin(about),
        }
        if len(set(sizes)) > 1:
            config["stage_layers"] = sizes
        if vocabulary.ids_U is not None:
            config["draft_token_ids"] = vocabulary.ids_U.tolist()
        return config

    def _rows(self, batch: Batch, fill: int, read: tuple[int, ...]) -> dict[int, Tensor]:
        size, device = batch.ids_BS.shape[1], batch.ids_BS.device
        angles = positions(self._teacher.decoder, size, device)
        rows: dict[int, Tensor] = self.module(batch.states, *angles, fill, read)
        return rows

    def _mean_kl(self, rows_NM: Tensor, teacher_NM: Tensor) -> Tensor:
        student_NM = self._teacher.normed(rows_NM)
        total = kl_rows(student_NM, teacher_NM, self._head, self._vocabulary.head_UM)
        return total / max(1, rows_NM.shape[0])

    @torch.no_grad()
    def _agreed(self, row_BSM: Tensor, batch: Batch) -> Tensor:
        """Where the greedy draft is the target's own next token: `[B, S]`."""
        agreed_BS = torch.zeros_like(batch.answers_BS)
        drafts_N = greedy_tokens(self._teacher.normed(row_BSM[batch.answers_BS]), self._head)
        agreed_BS[batch.answers_BS] = self._vocabulary.target_ids(drafts_N) == batch.argmax_BS[batch.answers_BS]
        return agreed_BS


class DraftVocabulary:
    """The tokens that a drafter knows, and the target's head rows for them `[U, M]` in float32."""

    def __init__(self, teacher: Teacher, ids_U: Tensor | None) -> None:
        device = training_device(teacher)
        self.ids_U = None if ids_U is None else ids_U.to(device)
        self.head_UM = teacher.head_VM if self.ids_U is None else teacher.head_VM[self.ids_U]
        self._known_V = torch.ones(teacher.config.vocab_size, dtype=torch.bool, device=device)
        if self.ids_U is not None:
            self._known_V.zero_()[self.ids_U] = True

    def holds(self, ids: Tensor) -> Tensor:
        """True for tokens that can be drafted."""
        return self._known_V[ids]

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """The target's ids of the draft vocabulary's."""
        return draft_ids if self.ids_U is None else self.ids_U[draft_ids]


def cut(num_layers: int, num_stages: int | None, counts: tuple[int, ...] | None) -> tuple[range, ...]:
    """The stages asked for.

    Raises:
        InputError: they do not fit the model, or `--stages` and `-o stage_layers` disagree.
    """
    if counts is None:
        return split_evenly(num_layers, num_stages or usual_stages(num_layers))
    if num_stages not in (None, len(counts)):
        raise InputError(f"--stages {num_stages}: -o stage_layers names {len(counts)} stages")
    return split_by_counts(num_layers, counts)


def usual_anchors(stages: tuple[range, ...]) -> tuple[int, ...]:
    """The ends of all stages, so that every depth has features of its own; the published rule for many stages."""
    if len(stages) + 1 <= MOST_OWN_ANCHORS:
        return (0, *(layers.stop for layers in stages))
    return default_anchors(stages[-1].stop, len(stages))


def begin_as(layers: list[DecoderLayer], teacher: Teacher, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """Copies the target's layers `chosen`, its last ones by default, into a drafter's; returns which.

    Raises:
        InputError: as many are not named, or one is none of the target's.
    """
    num_layers = teacher.config.num_layers
    if len(layers) > num_layers:
        raise InputError(f"-o layers={len(layers)}: the model has {num_layers} layers")
    indices = chosen or tuple(range(num_layers - len(layers), num_layers))
    if len(indices) != len(layers) or max(indices) >= num_layers or min(indices) < 0:
        raise InputError(
            f"-o init_layers={','.join(map(str, indices))}: expected {len(layers)} of the layers 0 to {num_layers - 1}"
        )
    for index, layer in zip(indices, layers, strict=True):
        copy_layer(teacher.decoder.weights[index], layer)
    return indices
