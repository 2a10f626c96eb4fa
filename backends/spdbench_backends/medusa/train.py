"""How Medusa's heads are trained: each against the target's distribution over the token that it looks ahead to.

Heads of residual blocks only ("version 2"): the target's own output head serves them all, so that a drafter is a few
matrices. Source: arXiv 2401.10774, section 2.2; METHODS.md B. Must not know of optimisers and data files.

Shapes: B conversations, R rows that draft, K heads, X drafts, N positions that judge them, M model width,
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
from spdbench.training.recipe import Batch, Counts, Provenance, RecipeOptions, Teacher, training_device
from spdbench_backends.drafter_files import add_origin, origin
from spdbench_backends.medusa.formats import Block, MedusaConfig, MedusaFile
from spdbench_backends.medusa.writing import WrittenLayout, write_medusa
from spdbench_backends.soft_targets import (
    DraftVocabulary,
    best_drafts,
    chain_counts,
    draft_rows,
    judged_drafts,
    rank_counts,
    soft_loss,
)

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


class MedusaRecipe:
    """Medusa-1 without linear layers: residual blocks on the target's last hidden state, one head for each level."""

    method: ClassVar[str] = "medusa"
    Options: ClassVar[type[RecipeOptions]] = MedusaOptions
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "medusa", "v0.1", "v2", "vllm")

    def __init__(
        self,
        options: RecipeOptions,
        teacher: Teacher,
        draft_ids_U: Tensor | None,
        num_stages: int | None,  # noqa: ARG002 - heads draft for any cut
    ) -> None:
        self._options = cast(MedusaOptions, options)
        self._teacher, config = teacher, teacher.config
        self.hidden_indices: tuple[int, ...] = (config.num_layers,)
        self._vocabulary = DraftVocabulary(draft_ids_U, teacher.head_VM)
        heads, layers = self._options.heads, self._options.layers
        self._heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(layers))) for _ in range(heads)
        )
        # What `acceptance` counts for `write` is part of the module's state, so that it is that of the weights kept.
        self._heads.register_buffer("ranks_KR", torch.zeros(heads, self._num_ranks, dtype=torch.long))
        self._heads.register_buffer("judged_K", torch.zeros(heads, dtype=torch.long))
        self.module: nn.Module = self._heads.to(training_device(teacher))

    @property
    def _num_ranks(self) -> int:
        return min(NUM_RANKS, len(self._vocabulary.rows_UM))

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        self._forget_accuracies()
        rows = draft_rows(batch)
        judged = judged_drafts(batch, rows, self._vocabulary, self._options.heads)
        drawn_X = torch.rand(judged.levels_X.shape, device=judged.levels_X.device) < self._options.share
        judged = judged.only(drawn_X | (judged.levels_X == 0))
        last_BSM = batch.states[self._teacher.config.num_layers]
        normed_YM = self._teacher.normed(rows.states(last_BSM)).flatten(0, 1)
        of_heads = [(judged.levels_X == level).nonzero()[:, 0] for level in range(self._options.heads)]
        drafts = [head(normed_YM[judged.rows_X[some]]) for head, some in zip(self._heads, of_heads, strict=True)]
        drafts_XM = torch.cat(drafts)[torch.cat(of_heads).argsort()]
        target_NM = self._teacher.normed(rows.states(last_BSM, 1).flatten(0, 1)[judged.roots_N])
        rows_UM = self._vocabulary.rows_UM
        return soft_loss(drafts_XM, rows_UM, target_NM, rows_UM, judged, self._options.decay)

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        """First choices as a chain. Counts the ranks of each head as well, since the last loss, for `write`."""
        rows = draft_rows(batch)
        normed_BRM = self._teacher.normed(rows.states(batch.states[self._teacher.config.num_layers]))
        ranked = [
            self._vocabulary.token_ids(best_drafts(head(normed_BRM), self._vocabulary.rows_UM, self._num_ranks))
            for head in self._heads
        ]
        judged_K, right_KR = rank_counts(batch, rows, ranked)
        self._counts("judged_K").add_(judged_K.to(batch.ids_BS.device))
        self._counts("ranks_KR").add_(right_KR.to(batch.ids_BS.device))
        return chain_counts(batch, rows, [drafts_BRC[..., 0] for drafts_BRC in ranked])

    def _forget_accuracies(self) -> None:
        """They were another module's, before this step."""
        self._counts("judged_K").zero_()
        self._counts("ranks_KR").zero_()

    def _counts(self, name: str) -> Tensor:
        """Drafts judged, `[K]`, or right by rank, `[K, R]`, by head."""
        return self._heads.get_buffer(name)

    def _accuracies(self) -> tuple[tuple[float, ...], ...]:
        """By head and rank; none where a head has not been judged."""
        judged_K = self._counts("judged_K").cpu()
        if not bool(judged_K.all()):
            return ()
        shares_KR = self._counts("ranks_KR").cpu().double() / judged_K[:, None]
        return tuple(tuple(round(share, 6) for share in ranks) for ranks in shares_KR.tolist())

    def require_layout(self, layout: str) -> None:
        """The layouts of the method's authors draft from the whole vocabulary."""
        if layout in ("v0.1", "v2") and self._vocabulary.ids_U is not None:
            raise InputError(
                f"--format {layout}: knows no draft vocabulary; give --draft-vocab {self._teacher.config.vocab_size}, "
                "which is all of it, or --format vllm or spdbench"
            )

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """`medusa` is the published layout that has words for these heads: vLLM's where they draft some tokens only."""
        if layout == "medusa":
            layout = "v0.1" if self._vocabulary.ids_U is None else "vllm"
        base, ids_U = self._teacher.config, self._vocabulary.ids_U
        config = MedusaConfig(
            hidden_size=base.hidden_size,
            vocab_size=base.vocab_size,
            target_family=base.family,
            base_model=about.model_id,
            model_sha256=about.model_sha256,
            draft_token_ids=None if ids_U is None else tuple(ids_U.tolist()),
            head_accuracies=self._accuracies(),
            trained_tokens=about.trained_tokens,
        )
        file = MedusaFile(directory, "spdbench", config, self._blocks(), self._linear_layers(layout), "", origin(about))
        write_medusa(file, directory, cast(WrittenLayout, layout))
        if layout != "spdbench":
            add_origin(directory, about)

    def _blocks(self) -> tuple[tuple[Block, ...], ...]:
        def stored(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.bfloat16)

        return tuple(
            tuple(Block(stored(block.linear.weight), stored(block.linear.bias)) for block in head)
            for head in cast("list[list[ResidualBlock]]", self._heads)
        )

    def _linear_layers(self, layout: str) -> tuple[Tensor, ...]:
        """The target's rows as far as a layout wants to see them: for each head, once for all, or not at all."""
        count = {"v0.1": self._options.heads, "vllm": 1}.get(layout, 0)
        return (self._vocabulary.rows_UM.to("cpu", torch.bfloat16),) * count
