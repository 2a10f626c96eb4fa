"""Reads a decoder's layers from a model's files: by name, checked, in one dtype, and packed.

Shapes: M model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.checkpoints.config import Experts, ModelConfig
from spdbench.models.checkpoints.hybrid_tensors import (
    add_gated_layer,
    add_recurrent_layer,
    gated_layer,
    plain_norm,
    recurrent_layer,
)
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer, geometry_of
from spdbench.models.checkpoints.packed_layers import PackedFile, PackedLayers
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.cpu.linear import can_pack, linear
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import NormWeight
from spdbench.models.layers import ExpertWeights, LayerWeights, SharedExpert
from spdbench.models.rotary import Rotary
from spdbench.models.torch_utils import require_finite, return_freed_memory

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
    packs = can_pack(dtype, device) and config.is_dense and bool(checkpoint.files)
    file = PackedFile(checkpoint, config, dtype) if packs else None
    packed = None if file is None else file.read(layers)
    if packed is None:
        head = linear(reader.read(name if config.tied else HEAD, vocab_by_width)) if last else None
        weights = {layer: reader.layer(layer) for layer in layers}
        packed = PackedLayers(weights, reader.final_norm() if last else None, head)
        if whole:
            reader.taken.add(name)
            reader.refuse_leftovers()
            if file is not None:
                file.write(packed)
    embeddings = None
    if first and config.tied and can_pack(dtype, device):  # else the head's numbers would be held twice
        checkpoint.close()
        embeddings = reader.mapped(name, vocab_by_width)
    elif first:
        head = packed.head if config.tied else None
        embeddings = reader.read(name, vocab_by_width) if head is None else head.plain()
    return_freed_memory()
    return Decoder(
        config=config,
        layers=layers,
        geometry=geometry_of(config),
        rotary=Rotary(*frequencies, dtype, device),
        weights=packed.weights,
        embeddings_VM=embeddings,
        final_norm=packed.norm,
        head=packed.head,
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
