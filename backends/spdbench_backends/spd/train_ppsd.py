"""How a PPSD exit head is trained: decoder layers over the first stage's output against the target.

Source: METHODS.md, section C. Must not know how steps are taken, nor where data comes from.
Shapes: B texts, S positions, M model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from spdbench.training.losses import greedy_tokens, kl_rows
from spdbench.training.modules import DecoderLayer
from spdbench.training.recipe import Batch, Counts, Provenance, RecipeOptions, Teacher, training_device
from spdbench_backends.drafter_files import VERSION, origin
from spdbench_backends.packing import stored
from spdbench_backends.spd.formats import write_folder
from spdbench_backends.spd.train import DraftVocabulary, PipelineTraining, begin_as, cut
from spdbench_backends.spd.trainable import positions


class ExitModule(nn.Module):
    """The layers and the norm of an exit head, by the names of its file."""

    def __init__(self, teacher: Teacher, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(teacher.config, head_norms=teacher.config.qk_norm) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(teacher.config.hidden_size, teacher.config.norm_eps)
        self.norm.weight.data.copy_(teacher.norm_M)

    def forward(self, hidden_BSM: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Rows `[B, S, M]` after the norm, from the first stage's output."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            heads = layer.project(layer.input_layernorm(hidden_BSM), cos_SD, sin_SD)
            mixed = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            hidden_BSM = layer.finish(mixed, hidden_BSM)
        rows: Tensor = self.norm(hidden_BSM.float())
        return rows


class PPSDRecipe:
    """Trains an exit head: its layers and its norm; the head rows are the target's own."""

    method: ClassVar[str] = "ppsd"
    Options: ClassVar[type[RecipeOptions]] = PipelineTraining
    formats: ClassVar[tuple[str, ...]] = ("spdbench",)

    def __init__(
        self, options: RecipeOptions, teacher: Teacher, draft_ids_U: Tensor | None, num_stages: int | None
    ) -> None:
        chosen = cast(PipelineTraining, options)
        self._teacher, self._storage = teacher, chosen.storage
        self._stages = cut(teacher.config.num_layers, num_stages, chosen.stage_layers)
        self._exit_layer = self._stages[0].stop
        self._vocabulary = DraftVocabulary(teacher, draft_ids_U)
        self.hidden_indices: tuple[int, ...] = (self._exit_layer,)
        module = ExitModule(teacher, chosen.layers)
        begin_as(cast("list[DecoderLayer]", list(module.layers)), teacher, chosen.init_layers)
        self.module: nn.Module = module.to(training_device(teacher))

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        counted_BS = batch.answers_BS & self._vocabulary.holds(batch.argmax_BS)
        student_NM = self._rows(batch)[counted_BS]
        teacher_NM = self._teacher.normed(batch.states[self._teacher.config.num_layers][counted_BS])
        return kl_rows(student_NM, teacher_NM, self._vocabulary.head_UM) / max(1, len(student_NM)), {}

    @torch.no_grad()
    def acceptance(self, batch: Batch) -> Counts:
        """Over the whole vocabulary, which is what an exit head drafts from."""
        drafts_N = greedy_tokens(self._rows(batch)[batch.answers_BS], self._teacher.head_VM)
        return Counts((len(drafts_N),), (int((drafts_N == batch.argmax_BS[batch.answers_BS]).sum()),))

    def write(self, directory: Path, about: Provenance, layout: str) -> None:  # noqa: ARG002 - there is one
        base, sizes = self._teacher.config, [len(layers) for layers in self._stages]
        config = {
            "method": self.method,
            "version": VERSION,
            "hidden_size": base.hidden_size,
            "vocab_size": base.vocab_size,
            "exit_layer": self._exit_layer,
            "num_layers": len(cast(ExitModule, self.module).layers),
            "num_stages": len(sizes),
            **origin(about),
        }
        if len(set(sizes)) > 1:
            config["stage_layers"] = sizes
        write_folder(directory, config, stored(self.module.state_dict(), self._storage))

    def _rows(self, batch: Batch) -> Tensor:
        angles = positions(self._teacher.decoder, batch.ids_BS.shape[1], batch.ids_BS.device)
        rows: Tensor = self.module(batch.states[self._exit_layer], *angles)
        return rows
