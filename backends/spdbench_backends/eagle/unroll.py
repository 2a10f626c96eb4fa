"""EAGLE-3's module with gradients: the head that `head.py` runs, for whole conversations at once.

Training-time test (arXiv 2503.01840, section 3.1; METHODS.md A.6): level 0 reads the target's features, every further
level what the one before it made of the same row, one token and one position further on. A row of level i therefore
sees the keys of level 0 up to itself, as rows that decoding has committed, and of levels 1 to i only its own, as the
path of a tree that leads to it. Must not know losses, files or decoders.

Shapes: B conversations, S tokens, R rows that draft, M model width, A aux features, H query heads, C kv heads, G query
heads of each, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spdbench.models.config import ModelConfig
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

    def unrolled(self, features_BSF: Tensor, embedded: list[Tensor], tokens_BR: Tensor) -> list[Tensor]:
        """The states `[B, R, M]` that levels 0, 1, ... leave behind, before the final norm.

        `embedded[0]` are the embeddings `[B, S, M]` of every token's next one; `embedded[i]`, `[B, R, M]`, those of the
        tokens that the rows at `tokens_BR` read at level i.
        """
        layer = self.layer
        hidden_BSM = self.fc(features_BSF)
        at_BR1 = tokens_BR[..., None]
        queries, keys, values = self._project(hidden_BSM, embedded[0], torch.arange(hidden_BSM.shape[1])[None])
        queries = queries.gather(2, at_BR1[:, None].expand(-1, queries.shape[1], -1, queries.shape[-1]))
        seen = _Seen(keys, values, tokens_BR)
        hidden_BRM = hidden_BSM.gather(1, at_BR1.expand(-1, -1, hidden_BSM.shape[-1]))
        states = [layer.finish(seen.mix(queries), hidden_BRM)]
        for level, embedded_BRM in enumerate(embedded[1:], 1):
            queries, keys, values = self._project(states[-1], embedded_BRM, tokens_BR + level)
            seen.add(keys, values)
            states.append(layer.finish(seen.mix(queries), states[-1]))
        return states

    def _project(self, hidden_BRM: Tensor, embedded_BRM: Tensor, positions_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layer
        inputs = torch.cat((layer.input_layernorm(embedded_BRM), layer.hidden_norm(hidden_BRM)), dim=-1)
        cos_BRD, sin_BRD = angles(self._rotary, positions_BR.to(hidden_BRM.device))
        return layer.project(inputs, cos_BRD[:, None], sin_BRD[:, None])


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
