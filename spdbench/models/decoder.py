"""The target model's forward pass by layer range, with hidden states at chosen depths. Batch 1, no autograd.

This is the reference: what captured graphs and pipelines compute has to agree with it.

Shapes: S rows, M model width, V vocabulary. Hidden state k is the output of layer k - 1, before the final norm; k = 0
is the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding

from spdbench.models.attention_context import AttentionContext, TreeRows
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.cpu.linear import Linear, PackedLinear, linear
from spdbench.models.cpu.recorded_forward import MAX_ROWS, RecordedLayers, can_record
from spdbench.models.interface import CancelledForwardError
from spdbench.models.kv_cache import HybridCache, KeptMemory, KVCache
from spdbench.models.layer_ops import Geometry, LayerOps, NormWeight, ops_by_rows
from spdbench.models.layers import LayerWeights, layer_forward
from spdbench.models.rotary import Rotary
from spdbench.models.torch_utils import to_device


@dataclass(frozen=True, eq=False)
class Decoder:
    """The layers `layers` of a model, with its embedding, final norm and head where they were loaded."""

    config: ModelConfig
    layers: range
    geometry: Geometry
    rotary: Rotary
    weights: dict[int, LayerWeights]
    embeddings_VM: Tensor | None
    final_norm: NormWeight | None
    head: Linear | None
    dtype: torch.dtype
    device: torch.device

    @property
    def takes_trees(self) -> bool:
        """A recurrent layer's rows can only follow each other."""
        return not self._recurrent(self.layers)

    @property
    def kernels(self) -> str:
        """What computes a few rows: `numba` where weights are packed, else `torch`. Experts are always torch's."""
        if not any(isinstance(layer.qkv, PackedLinear) for layer in self.weights.values()):
            return "torch"
        return "numba, experts torch" if any(layer.experts for layer in self.weights.values()) else "numba"

    def embed(self, ids_S: Tensor) -> Tensor:
        """Hidden state 0 of the tokens: `[S, M]`."""
        assert self.embeddings_VM is not None
        return embedding(ids_S, self.embeddings_VM).to(self.dtype)

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: KVCache,
        layers: range | None = None,
        hidden_indices: Collection[int] = (),
        tree: TreeRows | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Rows at positions `start`, `start` + 1, ... through `layers` (all by default), or a tree's rows from `start`.

        Returns the last layer's output `[S, M]` and the hidden states asked for in `hidden_indices`, by index; index 0
        is taken as given when the range begins at layer 0. The new rows are valid in `cache` afterwards.

        Raises:
            CancelledForwardError: `cancelled`, called before each layer, returned true; the cache is unchanged.
        """
        layers = self.layers if layers is None else layers
        num_rows = hidden_SM.shape[0]
        states = {0: hidden_SM} if layers.start == 0 and 0 in hidden_indices else {}
        if num_rows <= MAX_ROWS and (recorded := self._recorded) is not None:
            hidden_SM, found = recorded.forward(hidden_SM, start, cache, layers, hidden_indices, tree, cancelled)
            return hidden_SM, states | found
        context, ops = AttentionContext(self.rotary, start, num_rows, tree), self._ops_for(num_rows)
        for layer in layers:
            if cancelled is not None and cancelled():
                raise CancelledForwardError
            hidden_SM = layer_forward(self.weights[layer], ops, context, layer, hidden_SM, cache)
            if layer + 1 in hidden_indices:
                states[layer + 1] = hidden_SM
        cache.advance(num_rows)
        return hidden_SM, states

    def normed(self, hidden_SM: Tensor) -> Tensor:
        """The last layer's output after the final norm: `[S, M]`."""
        assert self.final_norm is not None
        return self._ops_for(hidden_SM.shape[0]).norm(hidden_SM, self.final_norm)

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Next-token logits `[S, V]` of the last layer's output, final norm included."""
        assert self.head is not None
        return self.head(self.normed(hidden_SM))

    def ids(self, token_ids: Collection[int]) -> Tensor:
        """Token ids as a tensor on the embedding's device: `[S]`."""
        return to_device(list(token_ids), self.device)

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> KVCache:
        """An empty cache for `layers` (all by default) with room for `capacity` tokens."""
        layers = self.layers if layers is None else layers
        heads = self.geometry.num_kv_heads, self.geometry.head_dim
        recurrent = self._recurrent(layers)
        if not recurrent and self._recorded is not None:
            return self._kept_memory.new_cache(layers, capacity)
        if not recurrent:
            return KVCache(layers, *heads, capacity, self.dtype, self.device)
        assert self.config.recurrent is not None
        attention = [layer for layer in layers if layer not in recurrent]
        sizes = self.config.recurrent
        return HybridCache(attention, recurrent, sizes, *heads, capacity, num_snapshots, self.dtype, self.device)

    def snapshot_bytes(self, layers: range) -> int:
        """Bytes of one snapshot of `layers`: of the states of recurrent ones; 0 where there are none."""
        sizes = self.config.recurrent
        return 0 if sizes is None else len(self._recurrent(layers)) * sizes.state_bytes(self.dtype.itemsize)

    def bytes_per_token(self, layers: range, head: bool) -> int:
        """Bytes of weights that one token's forward through `layers` reads; with `head`, final norm and head too."""
        total = sum(self.weights[layer].bytes_per_token() for layer in layers)
        if head:
            assert self.final_norm is not None
            assert self.head is not None
            total += self.final_norm.nbytes + self.head.nbytes
        return total

    def embedding_and_head_on(self, device: torch.device) -> Decoder:
        """Embedding, final norm and head alone, copied to another device."""
        assert self.embeddings_VM is not None
        assert self.final_norm is not None
        assert self.head is not None
        return replace(
            self,
            layers=range(0),
            weights={},
            rotary=self.rotary.on(device),
            embeddings_VM=self.embeddings_VM.to(device),
            final_norm=NormWeight(self.final_norm.weight_M.to(device)),
            head=linear(self.head.plain().to(device)),
            device=device,
        )

    def with_head_of(self, ids: range) -> Decoder:
        """This decoder with a head of its own for these token ids only: `logits` are `[S, len(ids)]`; for none, it has
        no head."""
        if not ids:
            return replace(self, head=None)
        assert self.head is not None
        return replace(self, head=linear(self.head.plain()[ids.start : ids.stop].clone()))

    def _recurrent(self, layers: range) -> list[int]:
        """Those of `layers` that are recurrent."""
        return [layer for layer in layers if self.weights[layer].delta_net is not None]

    @cached_property
    def _recorded(self) -> RecordedLayers | None:
        """Replays passes of a few rows; None where that cannot be done."""
        ops = self._ops_for(1)
        return RecordedLayers(self.weights, ops, self.rotary) if can_record(self.weights.values(), ops) else None

    @cached_property
    def _kept_memory(self) -> KeptMemory:
        return KeptMemory(self.geometry.num_kv_heads, self.geometry.head_dim, self.dtype, self.device)

    @cached_property
    def _ops_for(self) -> Callable[[int], LayerOps]:
        return ops_by_rows(self.geometry, self.dtype, self.device)
