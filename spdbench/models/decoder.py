"""The target model's forward pass by layer range, with hidden states at chosen depths. Batch 1, no autograd.

This is the reference: what captured graphs and pipelines compute has to agree with it.

Shapes: S rows, M model width, V vocabulary. Hidden state k is the output of layer k - 1, before the final norm; k = 0
is the embedding (SPD.md, section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding

from spdbench.errors import InputError
from spdbench.models.attention_context import AttentionContext, TreeRows
from spdbench.models.checkpoints.config import Experts, ModelConfig
from spdbench.models.checkpoints.hybrid_tensors import (
    add_gated_layer,
    add_recurrent_layer,
    gated_layer,
    plain_norm,
    recurrent_layer,
)
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer, geometry_of
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.cpu.linear import Linear, PackedLinear, can_pack, linear
from spdbench.models.interface import CancelledForwardError
from spdbench.models.kv_cache import HybridCache, KVCache
from spdbench.models.layer_ops import Geometry, LayerOps, NormWeight, ops_by_rows
from spdbench.models.layers import ExpertWeights, LayerWeights, SharedExpert, layer_forward
from spdbench.models.rotary import Rotary
from spdbench.models.torch_utils import require_finite, return_freed_memory, to_device

DRAFT_HEADS = "medusa_head."
"""Prefix of the draft heads' tensors in a Medusa-2 checkpoint."""
NO_PART = (DRAFT_HEADS, "mtp.", "model.visual.")
"""Prefixes of tensors that are no part of the language model: of draft heads, and of what predicts further tokens or
reads images in Qwen3.5's checkpoints."""
HEAD = "lm_head.weight"
NESTED = "model.language_model."
"""Where the language model's tensors lie, instead of in `model.`, if the checkpoint also reads images."""
EXACT = ("norm.weight", "A_log", "dt_bias")
"""Ends of names whose numbers are kept in float32 in a hybrid model."""


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
        context, ops = AttentionContext(self.rotary, start, num_rows, tree), self._ops_for(num_rows)
        states = {0: hidden_SM} if layers.start == 0 and 0 in hidden_indices else {}
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
        if not recurrent:
            return KVCache(layers, *heads, capacity, self.dtype, self.device)
        assert self.config.recurrent is not None
        attention = [layer for layer in layers if layer not in recurrent]
        sizes = self.config.recurrent
        return HybridCache(attention, recurrent, sizes, *heads, capacity, num_snapshots, self.dtype, self.device)

    def snapshot_bytes(self, layers: range) -> int:
        """Bytes of one snapshot of `layers`: of the states of recurrent ones; 0 where there are none."""
        sizes = self.config.recurrent
        if sizes is None:
            return 0
        window = sizes.window * sizes.channels * self.dtype.itemsize
        matrices = sizes.values * sizes.key_dim * torch.float32.itemsize
        return len(self._recurrent(layers)) * (window + matrices)

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
    def _ops_for(self) -> Callable[[int], LayerOps]:
        return ops_by_rows(self.geometry, self.dtype, self.device)


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    frequencies: tuple[Tensor, float],
    dtype: torch.dtype,
    device: torch.device,
    layers: range | None = None,
) -> Decoder:
    """Reads the decoder's layers (all by default) from `checkpoint`, in `dtype` on `device`.

    Embedding and head come along with the layers that need them, the first and the last; tied ones share memory.

    Raises:
        InputError: a tensor is missing or misshapen.
    """
    whole = layers is None
    layers = range(config.num_layers) if layers is None else layers
    reader = _Reader(checkpoint, config, dtype, device)
    first, last = layers.start == 0, layers.stop == config.num_layers
    vocab_by_width = (config.vocab_size, config.hidden_size)
    name = reader.base + "embed_tokens.weight"
    embeddings = head = None
    if last:
        head = linear(reader.read(name if config.tied else HEAD, vocab_by_width))
    if first and config.tied and can_pack(dtype, device):  # else the head's numbers would be held twice
        checkpoint.close()
        embeddings = reader.mapped(name, vocab_by_width)
    elif first:
        embeddings = head.plain() if head is not None and config.tied else reader.read(name, vocab_by_width)
    weights = {layer: reader.layer(layer) for layer in layers}
    norm = reader.final_norm() if last else None
    if whole:
        reader.refuse_leftovers()
    return_freed_memory()
    return Decoder(
        config=config,
        layers=layers,
        geometry=geometry_of(config),
        rotary=Rotary(*frequencies, dtype, device),
        weights=weights,
        embeddings_VM=embeddings,
        final_norm=norm,
        head=head,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class _Reader:
    checkpoint: Checkpoint
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    taken: set[str] = field(default_factory=set)

    def refuse_leftovers(self) -> None:
        """Raises `InputError` for weights that the config gives no place: they would be missing from the model."""
        if self.config.tied and HEAD in self.checkpoint:
            self._refuse_other_head()
        known = self.taken | ({HEAD} if self.config.tied else set())
        left = [
            name
            for name in self.checkpoint
            if name not in known and not name.endswith(".inv_freq") and not name.startswith(NO_PART)
        ]
        if left:
            raise InputError(
                f"{self.checkpoint.directory}: {len(left)} tensors have no place in this model, e.g. {min(left)}; "
                "is config.json the one that belongs to the weights?"
            )

    def _refuse_other_head(self) -> None:
        """Raises `InputError` for an output head of its own where the config ties it to the embedding: libraries differ
        in which of the two they then use."""
        if not torch.equal(self.checkpoint.stored(HEAD), self.checkpoint.stored(self.base + "embed_tokens.weight")):
            raise InputError(
                f"{self.checkpoint.directory}: {HEAD} is not the embedding, though config.json ties the two "
                "(tie_word_embeddings). Set it to false if the model has a head of its own, else remove the tensor."
            )

    @cached_property
    def base(self) -> str:
        """What the names of the language model's tensors begin with, but for the output head's."""
        return NESTED if any(name.startswith(NESTED) for name in self.checkpoint) else "model."

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A copy in memory of our own: a mapped file's pages could be dropped in the middle of a measurement."""
        self.taken.add(name)
        dtype = torch.float32 if self.config.recurrent is not None and name.endswith(EXACT) else self.dtype
        tensor = self.checkpoint.tensor(name, shape).to(self.device, dtype, copy=True)
        require_finite(str(self.checkpoint.directory), name, tensor)
        return tensor

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as it lies in the file, in the file's dtype: for what is read by a few rows."""
        self.taken.add(name)
        return self.checkpoint.tensor(name, shape)

    def final_norm(self) -> NormWeight:
        weight_M = self.read(self.base + "norm.weight", (self.config.hidden_size,))
        return NormWeight(weight_M if self.config.recurrent is None else plain_norm(weight_M))

    def layer(self, index: int) -> LayerWeights:
        config, prefix = self.config, f"{self.base}layers.{index}."
        sparse = config.experts is not None and index in config.experts.layers
        expected = ExpectedTensors()
        ffn = None if sparse else config.intermediate_size
        if config.recurrent is None:
            expected.add_layer(prefix, geometry_of(config), config.hidden_size, ffn, head_norms=config.qk_norm)
        elif index in config.recurrent.layers:
            add_recurrent_layer(expected, prefix, config, ffn)
        else:
            add_gated_layer(expected, prefix, config, ffn)
        shapes = expected.present(self.checkpoint)

        def tensor(name: str) -> Tensor | None:
            return self.read(name, shapes[name]) if name in shapes else None

        if config.recurrent is None:
            weights = dense_layer(tensor, prefix, config.windows[index])
        else:
            weights = (recurrent_layer if index in config.recurrent.layers else gated_layer)(tensor, prefix, config)
        if sparse:
            assert config.experts is not None
            weights = replace(weights, experts=self.mixture(prefix + "mlp.", config.experts))
        self.checkpoint.close()
        return_freed_memory()
        return weights

    def mixture(self, prefix: str, experts: Experts) -> ExpertWeights:
        width, ffn, count = self.config.hidden_size, experts.intermediate_size, experts.count
        both, down = prefix + "experts.gate_up_proj", prefix + "experts.down_proj"
        if both in self.checkpoint:
            gate_up_E2FM = self.read(both, (count, 2 * ffn, width))
            down_EMF = self.read(down, (count, width, ffn))
        else:
            each = [self.expert(f"{prefix}experts.{index}.", ffn) for index in range(count)]
            gate_up_E2FM, down_EMF = (torch.stack(parts) for parts in zip(*each, strict=True))
        return ExpertWeights(
            router=self.read(prefix + "gate.weight", (count, width)),
            gate_up=gate_up_E2FM,
            down=down_EMF,
            per_token=experts.per_token,
            normalise=experts.normalise,
            shared=self.shared_expert(prefix, experts.shared_size) if experts.shared_size else None,
        )

    def expert(self, prefix: str, ffn: int) -> tuple[Tensor, Tensor]:
        """Gate and up together, `[2F, M]`, and down `[M, F]`."""
        width = self.config.hidden_size
        both = [self.read(f"{prefix}{part}_proj.weight", (ffn, width)) for part in ("gate", "up")]
        return torch.cat(both), self.read(f"{prefix}down_proj.weight", (width, ffn))

    def shared_expert(self, prefix: str, ffn: int) -> SharedExpert:
        gate_up, down = self.expert(prefix + "shared_expert.", ffn)
        gate_1M = self.read(prefix + "shared_expert_gate.weight", (1, self.config.hidden_size))
        return SharedExpert(linear(gate_up), linear(down), gate_1M[0])
