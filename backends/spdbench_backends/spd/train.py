"""How drafters for a pipeline are trained: what SPD and PPSD share, and SPD's own module.

SPD trains rows of the newest depth against the target, as if every position were the newest. Source: arXiv
2605.30852 and the code published with it.

Shapes: B texts, S positions, N rows that count, M model width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from spdbench.errors import InputError
from spdbench.models.partition import split_by_counts, split_evenly, usual_stages
from spdbench.training.layers import DecoderLayer, angles
from spdbench.training.recipe import Batch, Counts, Provenance, Recipe, RecipeOptions
from spdbench.training.soft_targets import greedy_drafts, mean_kl
from spdbench_backends.drafter_files.folder import StorageOption, origin, stored, unpacked, write_folder
from spdbench_backends.spd.formats import VERSION, write_published
from spdbench_backends.spd.placement import counts_of
from spdbench_backends.spd.plan import FeaturePlan, default_anchors
from spdbench_backends.spd.trainable import TrainableModule

Counted = Annotated[tuple[int, ...] | None, BeforeValidator(counts_of)]
PUBLISHED = "head.pt"
MAX_OWN_ANCHORS = 5
"""Up to so many anchors every stage's end is one by default; beyond, projections would outweigh the layers."""


class PipelineTrainOptions(RecipeOptions):
    """Options of what drafts for a pipeline."""

    stage_layers: Counted = Field(None, description="layers of each stage, e.g. 11,10,9; default: equal stages")
    layers: int = Field(1, ge=1, description="decoder layers of the drafter")
    init_layers: Counted = Field(
        None, description="the target's layers that the drafter's begin as, e.g. 29; default: the last ones"
    )
    storage: StorageOption = "bfloat16"


class SPDTrainOptions(PipelineTrainOptions):
    """Options of `train spd`."""

    anchors: Counted = Field(
        None,
        description="hidden states that rows read, e.g. 0,10,20,30; default: the stages' ends where they are few, with "
        "stage_counts sixths of the model",
    )
    head: Literal["frozen", "trained"] = Field(
        "frozen", description="frozen: the target's own rows, which the file need not hold; trained: rows of its own"
    )
    all_depths: float = Field(0.0, ge=0, description="weight of the same loss on rows of all other depths")
    stage_counts: Counted = Field(
        None,
        description="in place of --stages: one head for pipelines of any number of stages, that learns in pipelines of "
        "these, e.g. 2,3,5, and drafts for the first number where a run names none",
    )


class PipelineRecipe(Recipe):
    """What SPD and PPSD share: a pipeline's stages, layers that begin as the target's, the KL divergence as loss."""

    has_stages: ClassVar[bool] = True
    _options: PipelineTrainOptions

    @cached_property
    def _stages(self) -> tuple[range, ...]:
        """The stages asked for.

        Raises:
            InputError: they do not fit the model, or `--stages` and `-o stage_layers` disagree.
        """
        num_layers, counts = self._teacher.config.num_layers, self._options.stage_layers
        if counts is None:
            return split_evenly(num_layers, self._num_stages or usual_stages(num_layers))
        if self._num_stages not in (None, len(counts)):
            raise InputError(f"--stages {self._num_stages}: -o stage_layers names {len(counts)} stages")
        return split_by_counts(num_layers, counts)

    def _start_layers(self, layers: nn.ModuleList) -> tuple[int, ...]:
        """Copies the target's layers of `init_layers`, its last ones by default, into a drafter's; returns which.
        Those of transformers have no weights of our kind: the drafter's stay as they were drawn.

        Raises:
            InputError: another number of them is named, or one is none of the target's.
        """
        num_layers, count, named = self._teacher.config.num_layers, len(layers), self._options.init_layers
        if count > num_layers:
            raise InputError(f"-o layers={count}: the model has {num_layers} layers")
        indices = named or tuple(range(num_layers - count, num_layers))
        if len(indices) != count or max(indices) >= num_layers or min(indices) < 0:
            raise InputError(
                f"-o init_layers={','.join(map(str, indices))}: expected {count} of the layers 0 to {num_layers - 1}"
            )
        if named and not self._teacher.decoder.weights:
            raise InputError(
                f"-o init_layers={','.join(map(str, named))}: this model runs on transformers' layers, as which a "
                "drafter's cannot begin; leave it out"
            )
        for index, layer in zip(indices, cast("list[DecoderLayer]", list(layers)), strict=True):
            if weights := self._teacher.decoder.weights.get(index):
                layer.start_from(weights)
        return indices

    def _angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin of a batch's positions, `[S, D]`."""
        return angles(self._teacher.decoder.rotary, torch.arange(batch.ids_BS.shape[1]))

    def _mean_kl(self, normed_BSM: Tensor, head_UM: Tensor, batch: Batch) -> Tensor:
        """The divergence from the target where its own next token is an answer's and can be drafted."""
        counted_BS = batch.answers_BS & (self._vocabulary.draft_ids(batch.argmax_BS) >= 0)
        teacher_NM = self._teacher.normed(batch.states[self._teacher.config.num_layers][counted_BS])
        return mean_kl(normed_BSM[counted_BS], head_UM, teacher_NM, self._vocabulary.head_UM)

    @property
    def _stage_sizes(self) -> list[int]:
        return [len(layers) for layers in self._stages]

    def _uneven_stages(self) -> dict[str, Any]:
        """What a config says besides their number of stages that are uneven."""
        return {"stage_layers": self._stage_sizes} if len(set(self._stage_sizes)) > 1 else {}


class SPDRecipe(PipelineRecipe):
    """Trains the Pipeline Draft Module."""

    method: ClassVar[str] = "spd"
    Options: ClassVar[type[RecipeOptions]] = SPDTrainOptions
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "spd-v11")

    _options: SPDTrainOptions

    def _build(self) -> nn.Module:
        chosen, config = self._options, self._teacher.config
        if config.recurrent is not None:
            raise InputError(
                f"spd: the draft layers of a head for {config.family} have gates, which are not trained here. "
                "Train ppsd, eagle3 or medusa, or give a published head to `spdbench run --drafter`."
            )
        cuts = self._cuts
        shared = chosen.stage_counts is not None
        anchors = chosen.anchors or (_shared_anchors(config.num_layers) if shared else _usual_anchors(cuts[0]))
        try:
            self._plans = tuple(FeaturePlan(anchors, stages, any_stages=shared) for stages in cuts)
        except ValueError as error:
            raise InputError(f"-o anchors={','.join(map(str, anchors))}: {error}") from None
        own_head_UM = self._vocabulary.head_UM if chosen.head == "trained" else None
        self._module = TrainableModule(config, anchors, chosen.layers, own_head_UM)
        self._first_copied, *_ = self._start_layers(self._module.spec_layers)
        self.hidden_indices = tuple(sorted({*anchors, self._first_copied}))
        return self._module

    @property
    def _cuts(self) -> tuple[tuple[range, ...], ...]:
        """The stages of each pipeline that is drafted for.

        Raises:
            InputError: they do not fit the model, or `-o stage_counts` is given next to other stages.
        """
        counts, num_layers = self._options.stage_counts, self._teacher.config.num_layers
        if counts is None:
            return (self._stages,)
        named = f"-o stage_counts={','.join(map(str, counts))}"
        if self._num_stages is not None or self._options.stage_layers is not None:
            raise InputError(f"{named}: is given in place of --stages and of -o stage_layers")
        if not counts or any(count < 1 or num_layers % count for count in counts):
            raise InputError(f"{named}: expected numbers of equal stages, which divide the model's {num_layers} layers")
        return tuple(split_evenly(num_layers, count) for count in dict.fromkeys(counts))

    @property
    def _head(self) -> Tensor:
        """The rows `[U, M]` that drafts come from."""
        return self._vocabulary.head_UM if self._module.lm_head is None else self._module.lm_head.weight

    def fit(self, batches: Iterable[Batch]) -> None:
        """Each projection begins as a linear estimate of what the first copied layer read in the target."""
        self._module.fit_projections(batches, self._first_copied)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        plan = self._plans[int(torch.randint(len(self._plans), ())) if len(self._plans) > 1 else 0]
        full = plan.full_depth
        fill = full if full == 1 or torch.rand(()) < 0.5 else int(torch.randint(1, full, ()))
        others = (*range(1, fill), full) if self._options.all_depths else ()
        rows = self._normed_rows(plan, batch, fill, (0, *others))
        total = self._mean_kl(rows[0], self._head, batch)
        figures: dict[str, float] = {"fill": fill, **({"stages": full} if len(self._plans) > 1 else {})}
        for depth in others:
            total = total + self._options.all_depths / len(others) * self._mean_kl(rows[depth], self._head, batch)
            agreed_N = self._agreed(rows[depth], batch)
            figures[f"accuracy_{depth}"] = float(agreed_N.float().mean()) if len(agreed_N) else 0.0
        return total, figures

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        """In full pipelines; of several, all verdicts together."""
        agreed = [self._agreed(self._normed_rows(plan, batch, plan.full_depth, (0,))[0], batch) for plan in self._plans]
        return Counts((sum(map(len, agreed)),), (sum(int(agreed_N.sum()) for agreed_N in agreed),))

    def require_layout(self, layout: str) -> None:
        """A version 11 file cannot describe uneven stages, nor a head for several numbers of them."""
        if layout != "spd-v11":
            return
        if self._options.stage_counts is not None:
            raise InputError("--format spd-v11: is for one number of stages; give --stages in place of -o stage_counts")
        if self._uneven_stages():
            sizes = self._stage_sizes
            raise InputError(
                f"--format spd-v11: knows equal stages only, not {','.join(map(str, sizes))} layers; give --stages N "
                f"that divides {sum(sizes)} in place of -o stage_layers, or --format spdbench"
            )

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        self.require_layout(layout)
        config, tensors = self._config(about), stored(self.module.state_dict(), self._options.storage)
        if layout == "spd-v11":
            tensors = stored({"lm_head.weight": self._head, **unpacked(tensors)})
            write_published(directory / PUBLISHED, config, tensors)
        write_folder(directory, config, tensors)

    def _config(self, about: Provenance) -> dict[str, Any]:
        base, listed = self._teacher.config, self._vocabulary.listed
        return {
            "method": self.method,
            "version": VERSION,
            "model_type": base.family,
            "base_model_path": about.model_id,
            "hidden_size": base.hidden_size,
            "vocab_size": base.vocab_size,
            "draft_vocab_size": self._vocabulary.size,
            "num_layers": base.num_layers,
            **self._trained_for(),
            "num_spec_layers": len(self._module.spec_layers),
            "num_aggr_types": len(self._module.anchors),
            "aggr_feature_bound": list(self._module.anchors),
            "trained_with_use_deepest": True,
            **origin(about),
            **({} if listed is None else {"draft_token_ids": list(listed)}),
        }

    def _trained_for(self) -> dict[str, Any]:
        """What a config says of the stages."""
        if self._options.stage_counts is not None:
            counts = [plan.full_depth for plan in self._plans]
            return {"num_stages": counts[0], "stage_counts": counts}
        return {"num_stages": len(self._stages), **self._uneven_stages()}

    def _normed_rows(self, plan: FeaturePlan, batch: Batch, fill: int, read: tuple[int, ...]) -> dict[int, Tensor]:
        """Rows `[B, S, M]` of some depths after the target's final norm."""
        rows = self.module(plan, batch.states, *self._angles(batch), fill, read)
        return {depth: self._teacher.normed(row_BSM) for depth, row_BSM in rows.items()}

    @torch.no_grad()
    def _agreed(self, normed_BSM: Tensor, batch: Batch) -> Tensor:
        """Whether the greedy draft is the target's own next token, for each position of an answer: `[N]`."""
        drafts_N = self._vocabulary.to_target(greedy_drafts(normed_BSM[batch.answers_BS], self._head))
        return drafts_N == batch.argmax_BS[batch.answers_BS]


def _shared_anchors(num_layers: int) -> tuple[int, ...]:
    """All sixths of the model but the fifth: where 2 and 3 equal stages end, and most of 6."""
    return tuple(sorted({round(sixths * num_layers / 6) for sixths in (0, 1, 2, 3, 4, 6)}))


def _usual_anchors(stages: tuple[range, ...]) -> tuple[int, ...]:
    """The ends of all stages, so that every depth has features of its own; the published rule for many stages."""
    if len(stages) + 1 <= MAX_OWN_ANCHORS:
        return (0, *(layers.stop for layers in stages))
    return default_anchors(stages[-1].stop, len(stages))
