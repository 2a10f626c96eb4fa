"""EAGLE-3's module with gradients: the head that `head.py` runs, for whole conversations at once.

Training-time test (arXiv 2503.01840, section 3.1): level 0 reads the target's features, every further
level the previous level's output of the same row, one token and one position further on. A row of level i therefore
sees the keys of level 0 up to itself, as rows that decoding has committed, and of levels 1 to i only its own, as the
path of a tree that leads to it.

Shapes: B conversations, S tokens, R rows that draft, P columns of them, K levels, M model width, F features, D head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.rotary import Rotary
from spdbench.training.layers import DecoderLayer, RMSNorm, angles, attend_with_own
from spdbench.training.recipe import Teacher


class EagleLayer(DecoderLayer):
    """The layer that reads an embedding, then a feature."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)


class TrainableEagleHead(nn.Module):
    """The tensors of a head under their published names; `lm_head` only if its rows are trained."""

    def __init__(self, config: ModelConfig, num_aux: int, rotary: Rotary, head_UM: Tensor | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.fc = nn.Linear(num_aux * width, width, bias=False)
        nn.init.normal_(self.fc.weight, std=0.02)
        self.layers = nn.ModuleList([EagleLayer(config)])
        self.norm = RMSNorm(width, config.norm_eps)
        if head_UM is not None:
            self.lm_head = nn.Linear(width, len(head_UM), bias=False)
            self.lm_head.weight = nn.Parameter(head_UM.clone())
        self._rotary = rotary

    @property
    def layer(self) -> EagleLayer:
        layer = self.layers[0]
        assert isinstance(layer, EagleLayer)
        return layer

    @torch.no_grad()
    def start_from_target(self, teacher: Teacher) -> None:
        """Begins as the target's last layer behind `fc`, which passes the deepest feature on; the weights that read the
        next token's embedding stay small as drawn. Layers of transformers have no weights of our kind to begin as."""
        width = teacher.config.hidden_size
        self.fc.weight[:, -width:] += torch.eye(width)
        if last := teacher.decoder.weights.get(teacher.config.num_layers - 1):
            self.layer.start_from(last, self.layer.hidden_norm)
        self.norm.weight.copy_(teacher.norm_M)

    def training_time_test(
        self, features_BSF: Tensor, embedded: list[Tensor], tokens_BR: Tensor, columns_P: Tensor
    ) -> list[Tensor]:
        """Each level's output states, before the final norm: `[B, R, M]` at level 0, for the rows at `tokens_BR`, and
        `[B, P, M]` at the others, for the rows in some columns.

        `embedded` are the embeddings that each level reads: `[B, S, M]` of every token's next one, then `[B, P, M]`.
        """
        layer = self.layer
        index_S = torch.arange(features_BSF.shape[1], device=tokens_BR.device)
        later_BRS = index_S > tokens_BR[..., None]
        hidden_BSM = self.fc(features_BSF).float()  # residual sums stay exact under autocast
        at_BR1 = tokens_BR[..., None]
        queries, keys, values = self._project(hidden_BSM, embedded[0], index_S[None])
        queries = queries.gather(2, at_BR1[:, None].expand(-1, queries.shape[1], -1, queries.shape[-1]))
        hidden_BRM = hidden_BSM.gather(1, at_BR1.expand(-1, -1, hidden_BSM.shape[-1]))
        states = [layer.finish(attend_with_own(queries, keys, values.float(), later_BRS, ()), hidden_BRM)]
        tokens_BP, hidden_BPM, later_BPS = tokens_BR[:, columns_P], states[0][:, columns_P], later_BRS[:, columns_P]
        own: list[tuple[Tensor, Tensor]] = []
        for level, embedded_BPM in enumerate(embedded[1:], 1):
            queries, own_keys, own_values = self._project(hidden_BPM, embedded_BPM, tokens_BP + level)
            own.append((own_keys, own_values))
            hidden_BPM = layer.finish(attend_with_own(queries, keys, values.float(), later_BPS, own), hidden_BPM)
            states.append(hidden_BPM)
        return states

    def _project(self, hidden_BRM: Tensor, embedded_BRM: Tensor, positions_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layer
        inputs = torch.cat((layer.input_layernorm(embedded_BRM), layer.hidden_norm(hidden_BRM)), dim=-1)
        cos_BRD, sin_BRD = angles(self._rotary, positions_BR)
        return layer.project(inputs, cos_BRD[:, None], sin_BRD[:, None])


def state_index(num_conversations: int, num_rows: int, columns_P: Tensor, levels: int) -> Tensor:
    """Index of each level's and row's state in all states that `training_time_test` returns, laid end to end:
    `[K, B R]`, -1 for those that were not computed."""
    found_KBR = torch.full((levels, num_conversations, num_rows), -1, device=columns_P.device)
    first = num_conversations * num_rows
    found_KBR[0] = torch.arange(first, device=columns_P.device).view(num_conversations, num_rows)
    later = torch.arange((levels - 1) * num_conversations * len(columns_P), device=columns_P.device) + first
    found_KBR[1:, :, columns_P] = later.view(levels - 1, num_conversations, len(columns_P))
    return found_KBR.flatten(1)
