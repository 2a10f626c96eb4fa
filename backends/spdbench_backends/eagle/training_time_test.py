"""EAGLE-3's module with gradients: the head that `head.py` runs, for whole conversations at once.

Training-time test (arXiv 2503.01840, section 3.1; METHODS.md A.6): level 0 reads the target's features, every further
level what the one before it made of the same row, one token and one position further on. A row of level i therefore
sees the keys of level 0 up to itself, as rows that decoding has committed, and of levels 1 to i only its own, as the
path of a tree that leads to it. Must not know losses, files or decoders.

Shapes: B conversations, S tokens, R rows that draft, P columns of them, K levels, M model width, F features, H query
heads, C kv heads, G query heads of each, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.rotary import Rotary
from spdbench.training.modules import DecoderLayer, RMSNorm, angles


class EagleLayer(DecoderLayer):
    """The layer that reads an embedding beside a feature."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)


class EagleHead(nn.Module):
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

    def unrolled(
        self, features_BSF: Tensor, embedded: list[Tensor], tokens_BR: Tensor, columns_P: Tensor
    ) -> list[Tensor]:
        """The states that levels leave behind, before the final norm: `[B, R, M]` at level 0, for the rows at
        `tokens_BR`, and `[B, P, M]` at the others, for those of them in some columns.

        `embedded` are the embeddings of what a level reads: `[B, S, M]` of every token's next one, then `[B, P, M]`.
        """
        layer = self.layer
        hidden_BSM = self.fc(features_BSF).float()  # what is added up stays exact under autocast
        at_BR1 = tokens_BR[..., None]
        queries, keys, values = self._project(hidden_BSM, embedded[0], torch.arange(hidden_BSM.shape[1])[None])
        queries = queries.gather(2, at_BR1[:, None].expand(-1, queries.shape[1], -1, queries.shape[-1]))
        hidden_BRM = hidden_BSM.gather(1, at_BR1.expand(-1, -1, hidden_BSM.shape[-1]))
        states = [layer.finish(_Seen(keys, values, tokens_BR).mix(queries), hidden_BRM)]
        tokens_BP, hidden_BPM = tokens_BR[:, columns_P], states[0][:, columns_P]
        seen = _Seen(keys, values, tokens_BP)
        for level, embedded_BPM in enumerate(embedded[1:], 1):
            queries, keys, values = self._project(hidden_BPM, embedded_BPM, tokens_BP + level)
            seen.add(keys, values)
            hidden_BPM = layer.finish(seen.mix(queries), hidden_BPM)
            states.append(hidden_BPM)
        return states

    def _project(self, hidden_BRM: Tensor, embedded_BRM: Tensor, positions_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layer
        inputs = torch.cat((layer.input_layernorm(embedded_BRM), layer.hidden_norm(hidden_BRM)), dim=-1)
        cos_BRD, sin_BRD = angles(self._rotary, positions_BR.to(hidden_BRM.device))
        return layer.project(inputs, cos_BRD[:, None], sin_BRD[:, None])


def places(num_conversations: int, num_rows: int, columns_P: Tensor, levels: int) -> Tensor:
    """Where the state of each level and row stands when all that `unrolled` returns are laid end to end: `[K, B R]`, -1
    for those that were not computed."""
    found_KBR = torch.full((levels, num_conversations, num_rows), -1, device=columns_P.device)
    first = num_conversations * num_rows
    found_KBR[0] = torch.arange(first, device=columns_P.device).view(num_conversations, num_rows)
    later = torch.arange((levels - 1) * num_conversations * len(columns_P), device=columns_P.device) + first
    found_KBR[1:, :, columns_P] = later.view(levels - 1, num_conversations, len(columns_P))
    return found_KBR.flatten(1)


@dataclass
class _Seen:
    """Whom the rows see: level 0's keys and values `[B, C, S, D]`, and those of their own at later levels."""

    keys_BCSD: Tensor
    values_BCSD: Tensor
    tokens_BR: Tensor
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        index_S = torch.arange(self.keys_BCSD.shape[2], device=self.tokens_BR.device)
        self._hidden_BRS = index_S > self.tokens_BR[..., None]

    def add(self, keys_BCRD: Tensor, values_BCRD: Tensor) -> None:
        self.own.append((keys_BCRD, values_BCRD))

    def mix(self, queries_BHRD: Tensor) -> Tensor:
        """One softmax over both: a column of scores for each later level, beside those of level 0."""
        groups, size = self.keys_BCSD.shape[1], queries_BHRD.shape[-1]
        batch, _, rows, _ = queries_BHRD.shape
        queries_BCGRD = queries_BHRD.reshape(batch, groups, -1, rows, size) * size**-0.5
        common = queries_BCGRD.flatten(2, 3) @ self.keys_BCSD.transpose(-1, -2)
        common = (
            common.view(batch, groups, -1, rows, common.shape[-1])
            .float()
            .masked_fill(self._hidden_BRS[:, None, None], -torch.inf)
        )
        single = [(queries_BCGRD * keys[:, :, None]).sum(dim=-1, keepdim=True) for keys, _ in self.own]
        weights = torch.cat([common, *single], dim=-1).softmax(dim=-1)
        num_tokens = common.shape[-1]
        mixed: Tensor = (weights[..., :num_tokens].flatten(2, 3) @ self.values_BCSD).view(queries_BCGRD.shape)
        for column, (_, values) in enumerate(self.own, num_tokens):
            mixed = mixed + weights[..., column : column + 1] * values[:, :, None]
        return mixed.flatten(1, 2)
