"""How an EAGLE-3 head is trained: training-time test over its own outputs, against the target's distribution.

Source: arXiv 2503.01840.

Shapes: B conversations, S tokens, R rows that draft, P columns of them, X drafts, N positions that score them, K
levels, F features, M model width, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from spdbench.errors import InputError
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench.training.recipe import Batch, Counts, Provenance, Recipe, RecipeOptions
from spdbench.training.soft_targets import (
    DraftRows,
    chain_counts,
    draft_rows,
    greedy_drafts,
    scored_drafts,
    soft_loss,
)
from spdbench_backends.drafter_files.folder import StorageOption, origin, require_storage, stored
from spdbench_backends.drafter_files.tensors import vocabulary_maps
from spdbench_backends.eagle.build import default_aux
from spdbench_backends.eagle.formats import EagleConfig, EagleFile, Layout, write_eagle
from spdbench_backends.eagle.training_time_test import TrainableEagleHead, state_index

PLAIN_BASE = 10_000.0
"""Base of the rotary positions where the target's are scaled, which not every layout can say of a head."""


class Eagle3Options(RecipeOptions):
    ttt: int = Field(5, ge=1, le=16, description="levels that the head is unrolled over in training")
    unrolled: float = Field(
        0.5, gt=0, le=1, description="share of an answer's tokens that go past level 0, drawn anew for every batch"
    )
    decay: float = Field(0.8, gt=0, le=1, description="weight of each level's loss against the one before it")
    head: Literal["frozen", "trained"] = Field(
        "frozen",
        description="the output head: the target's own rows, which need not be stored, or trained from them",
    )
    init: Literal["target", "random"] = Field(
        "target", description="the layer: the target's last one where it fits, or drawn at random"
    )
    storage: StorageOption = "bfloat16"


class Eagle3Recipe(Recipe):
    """EAGLE-3: one layer behind a fusion of three of the target's features, over a draft vocabulary."""

    method: ClassVar[str] = "eagle3"
    Options: ClassVar[type[RecipeOptions]] = Eagle3Options
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "eagle3", "specforge", "speculators")

    _options: Eagle3Options

    def _build(self) -> nn.Module:
        teacher, config = self._teacher, self._teacher.config
        if config.num_layers < 3:
            raise InputError(f"eagle3 reads three hidden states of a target, and {config.num_layers} layers have fewer")
        self._aux = default_aux(config.num_layers)
        self.hidden_indices = tuple(sorted({*self._aux, config.num_layers}))
        self._base = teacher.decoder.rotary.plain_base or PLAIN_BASE
        rotary = Rotary(plain_frequencies(self._base, config.head_dim), 1.0, torch.float32, teacher.device)
        trained = self._options.head == "trained"
        self._head = TrainableEagleHead(config, len(self._aux), rotary, self._vocabulary.head_UM if trained else None)
        if self._options.init == "target":
            self._head.start_from_target(teacher)
        return self._head

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        rows, levels = draft_rows(batch), self._options.ttt
        scored = scored_drafts(batch, rows, self._teacher, self._vocabulary, levels)
        num_conversations, num_rows = rows.tokens_BR.shape
        chosen = torch.randperm(num_rows, device=rows.tokens_BR.device)
        columns_P = chosen[: max(1, round(self._options.unrolled * num_rows))].sort().values
        states = self._states(batch, rows, columns_P)
        index_X = state_index(num_conversations, num_rows, columns_P, levels)[scored.levels_X, scored.rows_X]
        scored, index_X = scored.only(index_X >= 0), index_X[index_X >= 0]
        drafts_XM = self._head.norm(torch.cat([state.flatten(0, 1) for state in states])[index_X])
        return soft_loss(drafts_XM, self._output_head, self._vocabulary.head_UM, scored, self._options.decay)

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        rows = draft_rows(batch)
        every_R = torch.arange(rows.tokens_BR.shape[1], device=rows.tokens_BR.device)
        states = [self._head.norm(states_BRM) for states_BRM in self._states(batch, rows, every_R)]
        drafts = [self._vocabulary.to_target(greedy_drafts(state, self._output_head)) for state in states]
        return chain_counts(batch, rows, drafts)

    def _states(self, batch: Batch, rows: DraftRows, columns_P: Tensor) -> list[Tensor]:
        """Each level's output states along the given text: level 0 for all rows, the others for some columns."""
        features_BSF = torch.cat([batch.states[index] for index in self._aux], dim=-1)
        next_BS = torch.cat((batch.ids_BS[:, 1:], batch.ids_BS[:, -1:]), dim=1)
        levels = range(1, self._options.ttt)
        ids = [next_BS, *(rows.ahead(batch.ids_BS, 1 + level)[:, columns_P] for level in levels)]
        embedded = [self._teacher.embed(some) for some in ids]
        return self._head.training_time_test(features_BSF, embedded, rows.tokens_BR, columns_P)

    @property
    def _output_head(self) -> Tensor:
        """The head rows `[U, M]` that drafts come from."""
        return self._head.lm_head.weight if self._options.head == "trained" else self._vocabulary.head_UM

    def require_layout(self, layout: str) -> None:
        require_storage(layout, self._options.storage)

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """`eagle3` is the layout of the method's authors."""
        self.require_layout(layout)
        tensors, ids_U = dict(self.module.state_dict()), self._vocabulary.token_ids_U
        if layout != "spdbench":  # published layouts store the head and have the vocabulary as tensors
            tensors["lm_head.weight"] = self._output_head
        tensors = stored(tensors, self._options.storage)
        if layout != "spdbench" and ids_U is not None:
            tensors |= vocabulary_maps(ids_U.cpu(), self._teacher.config.vocab_size)
        config = self._config(about, self._vocabulary.listed if layout == "spdbench" else None)
        file = EagleFile(directory, "spdbench", config, tensors, "", origin(about))
        write_eagle(file, directory, cast(Layout, "safeailab" if layout == "eagle3" else layout))

    def _config(self, about: Provenance, listed: tuple[int, ...] | None) -> EagleConfig:
        base = self._teacher.config
        return EagleConfig(
            num_attention_heads=base.num_heads,
            num_key_value_heads=base.num_kv_heads,
            head_dim=base.head_dim,
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            vocab_size=base.vocab_size,
            draft_vocab_size=None if listed is None else len(listed),
            max_position_embeddings=base.max_positions,
            rms_norm_eps=base.norm_eps,
            rope_theta=self._base,
            target_family=base.family,
            aux_hidden_states=self._aux,
            draft_token_ids=listed,
            trained_tokens=about.trained_tokens,
            acceptance_by_position=about.acceptance_by_position,
        )
