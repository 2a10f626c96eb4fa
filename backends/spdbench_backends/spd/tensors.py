"""The tensors of small heads made of a target's kind of layer: taken by name, checked, drawn at random.

Serves every head that pipelines draft with. Must not know where files lie or what a head is fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.cpu.linear import linear
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import HeadNorms, NormWeight
from spdbench.models.layers import LayerWeights


class TensorTaker:
    """Hands out a file's tensors once each, checked, where `target` computes.

    Raises:
        InputError: a tensor is missing, misshapen, or not finite; names file and tensor.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], target: Decoder) -> None:
        self._path, self._target = path, target
        self._left = dict(tensors)

    def __call__(self, name: str, *shape: int) -> Tensor:
        found = self._left.pop(name, None)
        if found is None:
            raise InputError(f"{self._path}: tensor {name} is missing")
        if tuple(found.shape) != shape:
            raise InputError(f"{self._path}: tensor {name} has shape {list(found.shape)}, expected {list(shape)}")
        if not bool(found.isfinite().all()):
            raise InputError(f"{self._path}: tensor {name} holds values that are not finite")
        return found.to(self._target.device, self._target.dtype)

    def optional(self, name: str, *shape: int) -> Tensor | None:
        return self(name, *shape) if name in self._left else None

    def refuse_leftovers(self) -> None:
        if self._left:
            raise InputError(f"{self._path}: unknown tensor {sorted(self._left)[0]} ({len(self._left)} in all)")


def dense_layer(take: TensorTaker, target: Decoder, prefix: str, *, head_norms: bool) -> LayerWeights:
    """A dense layer of the target's sizes, whatever its family; its biases are optional."""
    base, attention = target.config, prefix + "self_attn."
    width, queries, kv = base.hidden_size, base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    sizes = (("q_proj", queries), ("k_proj", kv), ("v_proj", kv))
    biases = [take.optional(f"{attention}{name}.bias", size) for name, size in sizes]
    present = [bias for bias in biases if bias is not None]
    weights = [take(f"{attention}{name}.weight", size, width) for name, size in sizes]
    norms = [NormWeight(take(f"{attention}{name}_norm.weight", base.head_dim)) for name in "qk" if head_norms]
    return LayerWeights(
        input_norm=NormWeight(take(prefix + "input_layernorm.weight", width)),
        qkv=linear(torch.cat(weights), torch.cat(present) if len(present) == len(biases) else None),
        head_norms=HeadNorms(*norms) if norms else None,
        out=linear(take(attention + "o_proj.weight", width, queries), take.optional(attention + "o_proj.bias", width)),
        post_norm=NormWeight(take(prefix + "post_attention_layernorm.weight", width)),
        gate_up=linear(
            torch.cat(
                [take(f"{prefix}mlp.{name}_proj.weight", base.intermediate_size, width) for name in ("gate", "up")]
            )
        ),
        down=linear(take(prefix + "mlp.down_proj.weight", width, base.intermediate_size)),
        experts=None,
        window=None,
    )


def layer_shapes(target: Decoder, prefix: str, *, head_norms: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What `dense_layer` has to find, without biases."""
    base = target.config
    width, queries, kv = base.hidden_size, base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    ffn = base.intermediate_size
    yield f"{prefix}self_attn.q_proj.weight", (queries, width)
    yield f"{prefix}self_attn.k_proj.weight", (kv, width)
    yield f"{prefix}self_attn.v_proj.weight", (kv, width)
    yield f"{prefix}self_attn.o_proj.weight", (width, queries)
    if head_norms:
        yield f"{prefix}self_attn.q_norm.weight", (base.head_dim,)
        yield f"{prefix}self_attn.k_norm.weight", (base.head_dim,)
    yield f"{prefix}mlp.gate_proj.weight", (ffn, width)
    yield f"{prefix}mlp.up_proj.weight", (ffn, width)
    yield f"{prefix}mlp.down_proj.weight", (width, ffn)
    yield f"{prefix}input_layernorm.weight", (width,)
    yield f"{prefix}post_attention_layernorm.weight", (width,)


def random_tensors(shapes: Iterator[tuple[str, tuple[int, ...]]], seed: int) -> dict[str, Tensor]:
    """Matrices drawn from N(0, 0.02²), norms of ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if name.endswith("norm.weight") else torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes
    }
