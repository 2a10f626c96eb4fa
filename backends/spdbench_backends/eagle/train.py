"""How an EAGLE-3 head is trained: unrolled over its own outputs, against the target's distribution.

Source: arXiv 2503.01840; METHODS.md A.6. Must not know how attention is laid out, nor of optimisers and data files.

Shapes: B conversations, S tokens, R rows that draft, P columns of them, X drafts, N positions that judge them, K
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
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench.training.recipe import Batch, Counts, Provenance, RecipeOptions, Teacher, training_device
from spdbench_backends.drafter_files import add_origin, origin
from spdbench_backends.eagle.checkpoint_layouts import default_aux
from spdbench_backends.eagle.formats import EagleConfig, EagleFile, Layout
from spdbench_backends.eagle.training_time_test import EagleHead, places
from spdbench_backends.eagle.writing import write_eagle
from spdbench_backends.soft_targets import (
    DraftRows,
    DraftVocabulary,
    best_drafts,
    chain_counts,
    draft_rows,
    judged_drafts,
    soft_loss,
)

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


class Eagle3Recipe:
    """EAGLE-3: one layer behind a fusion of three of the target's features, judged over a draft vocabulary."""

    method: ClassVar[str] = "eagle3"
    Options: ClassVar[type[RecipeOptions]] = Eagle3Options
    formats: ClassVar[tuple[str, ...]] = ("spdbench", "eagle3", "specforge", "speculators")

    def __init__(
        self,
        options: RecipeOptions,
        teacher: Teacher,
        draft_ids_U: Tensor | None,
        num_stages: int | None,  # noqa: ARG002 - a head drafts for any cut
    ) -> None:
        self._options = cast(Eagle3Options, options)
        self._teacher, config = teacher, teacher.config
        if config.num_layers < 3:
            raise InputError(f"eagle3 reads three hidden states of a target, and {config.num_layers} layers have fewer")
        self._aux = default_aux(config.num_layers)
        self.hidden_indices = tuple(sorted({*self._aux, config.num_layers}))
        self._vocabulary = DraftVocabulary(draft_ids_U, teacher.head_VM)
        self._base = teacher.decoder.rotary.plain_base or PLAIN_BASE
        device = training_device(teacher)
        rotary = Rotary(plain_frequencies(self._base, config.head_dim), 1.0, torch.float32, device)
        trained = self._options.head == "trained"
        self._head = EagleHead(config, len(self._aux), rotary, self._vocabulary.rows_UM if trained else None)
        if self._options.init == "target":
            start_from_target(self._head, teacher)
        self.module: nn.Module = self._head.to(device)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        rows, levels = draft_rows(batch), self._options.ttt
        judged = judged_drafts(batch, rows, self._vocabulary, levels)
        num_conversations, num_rows = rows.tokens_BR.shape
        chosen = torch.randperm(num_rows, device=rows.tokens_BR.device)
        columns_P = chosen[: max(1, round(self._options.unrolled * num_rows))].sort().values
        states = self._states(batch, rows, columns_P)
        where_X = places(num_conversations, num_rows, columns_P, levels)[judged.levels_X, judged.rows_X]
        judged, where_X = judged.only(where_X >= 0), where_X[where_X >= 0]
        drafts_XM = self._head.norm(torch.cat([state.flatten(0, 1) for state in states])[where_X])
        last_BRM = rows.states(batch.states[self._teacher.config.num_layers], 1)
        target_NM = self._teacher.normed(last_BRM.flatten(0, 1)[judged.roots_N])
        return soft_loss(drafts_XM, self._output_head, target_NM, self._vocabulary.rows_UM, judged, self._options.decay)

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        rows = draft_rows(batch)
        every_R = torch.arange(rows.tokens_BR.shape[1], device=rows.tokens_BR.device)
        states = [self._head.norm(states_BRM) for states_BRM in self._states(batch, rows, every_R)]
        drafts = [self._vocabulary.token_ids(best_drafts(state, self._output_head)[..., 0]) for state in states]
        return chain_counts(batch, rows, drafts)

    def _states(self, batch: Batch, rows: DraftRows, columns_P: Tensor) -> list[Tensor]:
        """What each level leaves behind along the given text: level 0 for all rows, the others for some columns."""
        features_BSF = torch.cat([batch.states[index] for index in self._aux], dim=-1)
        next_BS = torch.cat((batch.ids_BS[:, 1:], batch.ids_BS[:, -1:]), dim=1)
        levels = range(1, self._options.ttt)
        ids = [next_BS, *(rows.ahead(batch.ids_BS, 1 + level)[:, columns_P] for level in levels)]
        embedded = [self._teacher.embed(some) for some in ids]
        return self._head.unrolled(features_BSF, embedded, rows.tokens_BR, columns_P)

    @property
    def _output_head(self) -> Tensor:
        """The output head."""
        return self._head.lm_head.weight if self._options.head == "trained" else self._vocabulary.rows_UM

    def write(self, directory: Path, about: Provenance, layout: str) -> None:
        """`eagle3` is the layout of the method's authors."""
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.module.state_dict().items()}
        ids_U = self._vocabulary.ids_U
        listed = None
        if layout == "spdbench":
            listed = None if ids_U is None else tuple(ids_U.tolist())
        else:
            tensors["lm_head.weight"] = self._output_head.detach().to("cpu", torch.bfloat16)
            tensors |= {} if ids_U is None else published_vocabulary(ids_U.cpu(), self._teacher.config.vocab_size)
        config = _config(self._teacher.config, self._aux, self._base, about, listed)
        file = EagleFile(directory, "spdbench", config, tensors, "", origin(about))
        write_eagle(file, directory, cast(Layout, "safeailab" if layout == "eagle3" else layout))
        if layout != "spdbench":
            add_origin(directory, about)


def _config(
    base: ModelConfig, aux: tuple[int, ...], rope_base: float, about: Provenance, listed: tuple[int, ...] | None
) -> EagleConfig:
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
        rope_theta=rope_base,
        target_family=base.family,
        aux_ids=aux,
        draft_token_ids=listed,
        trained_tokens=about.trained_tokens,
        acceptance_by_position=about.acceptance_by_position,
    )


def published_vocabulary(ids_U: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """`d2t`, by how much a draft id falls short of its token id, and `t2d`, which tokens have one."""
    member = torch.zeros(vocab_size, dtype=torch.bool)
    member[ids_U] = True
    return {"d2t": ids_U - torch.arange(len(ids_U)), "t2d": member}


@torch.no_grad()
def start_from_target(head: EagleHead, teacher: Teacher) -> None:
    """The head as a copy of the target's last layer that reads its deepest feature, the next token's embedding faint.

    `fc` passes the deepest feature on. What a layer of experts has no match for stays as it was drawn.
    """
    config, layer = teacher.config, head.layer
    last = teacher.decoder.weights[config.num_layers - 1]
    width = config.hidden_size
    head.fc.weight[:, -width:] += torch.eye(width)
    attention = layer.self_attn
    queries, kv = attention.q_proj.out_features, attention.k_proj.out_features
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    for projection, rows in zip(projections, torch.split(last.qkv.plain(), [queries, kv, kv]), strict=True):
        projection.weight[:, width:] = rows.float()
    attention.o_proj.weight.copy_(last.out.plain())
    if last.input_norm is not None:
        layer.hidden_norm.weight.copy_(last.input_norm.weight_M)
    layer.post_attention_layernorm.weight.copy_(last.post_norm.weight_M)
    head.norm.weight.copy_(teacher.norm_M)
    if last.gate_up is not None and last.down is not None:
        gate, up = last.gate_up.plain().chunk(2)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(last.down.plain())
