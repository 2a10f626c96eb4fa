"""How Medusa's heads are trained: each against the target's distribution over the token that it looks ahead to.

Heads of residual blocks only ("version 2"): the target's own output head serves them all, so that a drafter is a few
matrices. Source: arXiv 2401.10774, section 2.2.

Shapes: B conversations, R rows that draft, K heads, X drafts, N positions that score them, C ranks, M model width,
U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from spdbench.errors import InputError
from spdbench.training.recipe import Batch, Counts, Provenance, Recipe, RecipeOptions
from spdbench.training.soft_targets import (
    DraftRows,
    best_drafts,
    chain_counts,
    draft_rows,
    rank_counts,
    scored_drafts,
    soft_loss,
)
from spdbench_backends.drafter_files.folder import StorageOption, origin, require_storage, stored
from spdbench_backends.medusa.formats import SHARED, Layout, MedusaConfig, MedusaFile, write_medusa

NUM_RANKS = 10
"""Ranks of each head whose accuracy is measured; published trees use no more."""


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), at first x itself, so that a head begins as the target's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + silu(self.linear(rows))


class MedusaOptions(RecipeOptions):
    heads: int = Field(4, ge=1, le=16, description="heads, each for a token further ahead")
    layers: int = Field(1, ge=1, le=8, description="residual blocks of each head")
    share: float = Field(
        0.5, gt=0, le=1, description="share of an answer's tokens that heads behind the first learn from, drawn anew"
    )
    decay: float = Field(0.8, gt=0, le=1, description="weight of each head's loss against the one before it")
    storage: StorageOption = "bfloat16"


class MedusaRecipe(Recipe):
    """Medusa-1 without linear layers: residual blocks on the target's last hidden state, one head for each level."""

    method: ClassVar[str] = "medusa"
    Options: ClassVar[type[RecipeOptions]] = MedusaOptions
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "medusa", "v0.1", "v2", "vllm")

    _options: MedusaOptions

    def _build(self) -> nn.Module:
        config = self._teacher.config
        self.hidden_indices = (config.num_layers,)
        heads, layers = self._options.heads, self._options.layers
        self._heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(layers))) for _ in range(heads)
        )
        # `acceptance` counts ranks for `write`. The counts are part of the module's state, so that the weights that a
        # run keeps come with the counts measured on them. Their names are those in checkpoints.
        self._num_ranks = min(NUM_RANKS, self._vocabulary.size)
        self._heads.register_buffer("ranks_KR", torch.zeros(heads, self._num_ranks, dtype=torch.long))
        self._heads.register_buffer("judged_K", torch.zeros(heads, dtype=torch.long))
        return self._heads

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        for name in ("judged_K", "ranks_KR"):  # a step changes the weights that were measured
            self._heads.get_buffer(name).zero_()
        rows = draft_rows(batch)
        scored = scored_drafts(batch, rows, self._teacher, self._vocabulary, self._options.heads)
        drawn_X = torch.rand(scored.levels_X.shape, device=scored.levels_X.device) < self._options.share
        scored = scored.only(drawn_X | (scored.levels_X == 0))
        normed_YM = self._normed_rows(batch, rows).flatten(0, 1)  # Y = B R
        of_heads = [(scored.levels_X == level).nonzero()[:, 0] for level in range(self._options.heads)]
        drafts = [head(normed_YM[scored.rows_X[some]]) for head, some in zip(self._heads, of_heads, strict=True)]
        drafts_XM = torch.cat(drafts)[torch.cat(of_heads).argsort()]
        head_UM = self._vocabulary.head_UM
        return soft_loss(drafts_XM, head_UM, head_UM, scored, self._options.decay)

    def _normed_rows(self, batch: Batch, rows: DraftRows) -> Tensor:
        """The target's last hidden states of rows after its final norm, which heads read: `[B, R, M]`."""
        return self._teacher.normed(rows.ahead(batch.states[self._teacher.config.num_layers], 0))

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        """First choices as a chain. Also counts the ranks of each head since the last loss, for `write`."""
        rows = draft_rows(batch)
        normed_BRM = self._normed_rows(batch, rows)
        ranked = [
            self._vocabulary.to_target(best_drafts(head(normed_BRM), self._vocabulary.head_UM, self._num_ranks))
            for head in self._heads
        ]
        for name, counts in zip(("judged_K", "ranks_KR"), rank_counts(batch, rows, ranked), strict=True):
            self._heads.get_buffer(name).add_(counts.to(batch.ids_BS.device))
        return chain_counts(batch, rows, [drafts_BRC[..., 0] for drafts_BRC in ranked])

    def _accuracies(self) -> tuple[tuple[float, ...], ...]:
        """By head and rank; empty unless every head has been verified."""
        judged_K, right_KC = (self._heads.get_buffer(name).cpu() for name in ("judged_K", "ranks_KR"))
        if not bool(judged_K.all()):
            return ()
        shares_KC = right_KC.double() / judged_K[:, None]
        return tuple(tuple(round(share, 6) for share in ranks) for ranks in shares_KC.tolist())

    def require_layout(self, layout: str) -> None:
        """The layouts of the method's authors draft from the whole vocabulary."""
        require_storage(layout, self._options.storage)
        if layout in ("v0.1", "v2") and self._vocabulary.token_ids_U is not None:
            raise InputError(
                f"--format {layout}: knows no draft vocabulary; give --draft-vocab {self._teacher.config.vocab_size}, "
                "which is all of it, or --format vllm or spdbench"
            )

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """`medusa` is the published layout that can describe these heads: vLLM's where they draft only some tokens."""
        if layout == "medusa":
            layout = "v0.1" if self._vocabulary.token_ids_U is None else "vllm"
        self.require_layout(layout)
        base = self._teacher.config
        config = MedusaConfig(
            hidden_size=base.hidden_size,
            vocab_size=base.vocab_size,
            target_family=base.family,
            base_model=about.model_id,
            model_sha256=about.model_sha256,
            draft_token_ids=self._vocabulary.listed,
            head_accuracies=self._accuracies(),
            trained_tokens=about.trained_tokens,
        )
        blocks = {name: tensor for name, tensor in self._heads.state_dict().items() if ".linear." in name}
        tensors = stored(blocks | self._linear_layers(layout), self._options.storage)
        write_medusa(
            MedusaFile(directory, "spdbench", config, tensors, "", origin(about)), directory, cast(Layout, layout)
        )

    def _linear_layers(self, layout: str) -> dict[str, Tensor]:
        """The target's rows as often as a layout stores them: for each head, once for all, or not at all."""
        own = [f"{head}.{self._options.layers}.weight" for head in range(self._options.heads)]
        return dict.fromkeys({"v0.1": own, "vllm": [SHARED]}.get(layout, []), self._vocabulary.head_UM)
