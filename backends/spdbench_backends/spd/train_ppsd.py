"""How a PPSD exit head is trained: decoder layers over the first stage's output against the target.

Source: arXiv 2509.19368.
Shapes: B texts, S positions, N rows that count, M model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from spdbench.training.layers import DecoderLayer, RMSNorm
from spdbench.training.recipe import Batch, Counts, Provenance, RecipeOptions, Teacher
from spdbench.training.soft_targets import greedy_drafts
from spdbench_backends.drafter_files.folder import FOLDER_VERSION, origin, stored, write_folder
from spdbench_backends.spd.train import PipelineRecipe, PipelineTrainOptions


class ExitModule(nn.Module):
    """The layers and the norm of an exit head, by the names of its file."""

    def __init__(self, teacher: Teacher, num_layers: int) -> None:
        super().__init__()
        config = teacher.config
        self.layers = nn.ModuleList(DecoderLayer(config, head_norms=config.qk_norm) for _ in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.norm.weight.data.copy_(teacher.norm_M)

    def forward(self, hidden_BSM: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Rows `[B, S, M]` after the norm, from the first stage's output."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            heads = layer.project(layer.input_layernorm(hidden_BSM), cos_SD, sin_SD)
            mixed = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            hidden_BSM = layer.finish(mixed, hidden_BSM)
        rows: Tensor = self.norm(hidden_BSM)
        return rows


class PPSDRecipe(PipelineRecipe):
    """Trains an exit head: its layers and its norm; the head rows are the target's own."""

    method: ClassVar[str] = "ppsd"
    Options: ClassVar[type[RecipeOptions]] = PipelineTrainOptions
    formats: ClassVar[tuple[str, ...]] = ("spdbench",)

    def _build(self) -> nn.Module:
        self._exit_layer = self._stages[0].stop
        self.hidden_indices = (self._exit_layer,)
        module = ExitModule(self._teacher, self._options.layers)
        self._start_layers(module.layers)
        return module

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        return self._mean_kl(self._rows(batch), self._vocabulary.head_UM, batch), {}

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        """Over the whole vocabulary, which is what an exit head drafts from."""
        drafts_N = greedy_drafts(self._rows(batch)[batch.answers_BS], self._teacher.head_VM)
        return Counts((len(drafts_N),), (int((drafts_N == batch.argmax_BS[batch.answers_BS]).sum()),))

    def write(self, directory: Path, about: Provenance, layout: str) -> None:  # noqa: ARG002 - there is one
        base = self._teacher.config
        config = {
            "method": self.method,
            "version": FOLDER_VERSION,
            "hidden_size": base.hidden_size,
            "vocab_size": base.vocab_size,
            "exit_layer": self._exit_layer,
            "num_layers": self._options.layers,
            "num_stages": len(self._stages),
            **origin(about),
            **self._uneven_stages(),
        }
        write_folder(directory, config, stored(self.module.state_dict(), self._options.storage))

    def _rows(self, batch: Batch) -> Tensor:
        rows: Tensor = self.module(batch.states[self._exit_layer], *self._angles(batch))
        return rows
