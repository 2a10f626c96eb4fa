"""The tensors of a decoder layer by their names in checkpoints, and the layer that is made of them.

Serves the target's layers and those of drafters, which are of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.cpu.linear import Linear, linear
from spdbench.models.layer_ops import Geometry, HeadNorms, NormWeight
from spdbench.models.layers import LayerWeights

Shape = tuple[int, ...]
SCALE = ".scale"
"""Ends the name of the scales of a weight that a drafter's file has in 8 bits."""


def geometry_of(config: ModelConfig) -> Geometry:
    """How a model's layers cut their tensors into heads."""
    return Geometry(config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps)


@dataclass(frozen=True)
class ExpectedTensors:
    """Names and shapes of the tensors that a file must hold, and of groups that it holds whole or not at all."""

    required: dict[str, Shape] = field(default_factory=dict)
    optional: list[dict[str, Shape]] = field(default_factory=list)

    def present(self, names: Container[str]) -> dict[str, Shape]:
        """What to read from a file that holds `names`: all that is required, and each group that it holds a part of."""
        groups = [group for group in self.optional if any(name in names for name in group)]
        return self.required | {name: shape for group in groups for name, shape in group.items()}

    def add(self, shapes: Mapping[str, Shape], *, optional: bool = False) -> None:
        """Tensors that have to be there; if `optional`, all of them or none."""
        if optional:
            self.optional.append(dict(shapes))
        else:
            self.required.update(shapes)

    def add_layer(
        self,
        prefix: str,
        geometry: Geometry,
        width: int,
        ffn: int | None,
        *,
        inputs: int | None = None,
        input_norm: bool = True,
        head_norms: bool | None = None,
    ) -> None:
        """A decoder layer of `width`. Its biases are optional, and so are its head norms if `head_norms` is None.

        `ffn` is the width of its dense feed-forward, if it has one; `inputs` is what its queries, keys and values read,
        if that is not `width`.
        """
        attention, head_dim = prefix + "self_attn.", geometry.head_dim
        queries, kv = geometry.num_heads * head_dim, geometry.num_kv_heads * head_dim
        self._add_projections(attention, {"q_proj": queries, "k_proj": kv, "v_proj": kv}, inputs or width)
        self._add_projections(attention, {"o_proj": width}, queries)
        if ffn is not None:
            self._add_projections(prefix + "mlp.", {"gate_proj": ffn, "up_proj": ffn}, width)
            self._add_projections(prefix + "mlp.", {"down_proj": width}, ffn)
        if input_norm:
            self.add({prefix + "input_layernorm.weight": (width,)})
        self.add({prefix + "post_attention_layernorm.weight": (width,)})
        if head_norms is not False:
            self.add({f"{attention}{name}_norm.weight": (head_dim,) for name in "qk"}, optional=head_norms is None)

    def _add_projections(self, prefix: str, rows: dict[str, int], columns: int) -> None:
        """Projections that are computed as one: all of them have a bias, or none."""
        self.add({f"{prefix}{name}.weight": (size, columns) for name, size in rows.items()})
        self.add({f"{prefix}{name}.bias": (size,) for name, size in rows.items()}, optional=True)


def dense_layer(tensor: Callable[[str], Tensor | None], prefix: str, window: int | None = None) -> LayerWeights:
    """The layer of the tensors named `prefix`..., which `tensor` returns, or None for those that the layer lacks.

    Scales of weights are 1-D as biases are, and count where all parts of a matrix have them.
    """

    def joined(names: tuple[str, ...], part: str) -> Tensor | None:
        parts = [tensor(f"{prefix}{name}_proj.{part}") for name in names]
        found = [each for each in parts if each is not None]
        if len(found) < len(parts):
            return None
        return torch.cat(found) if len(found) > 1 else found[0]

    def fused(*names: str) -> Linear | None:
        weight = joined(names, "weight")
        return None if weight is None else linear(weight, joined(names, "bias"), joined(names, "weight" + SCALE))

    def norm(name: str) -> NormWeight | None:
        weight_M = tensor(f"{prefix}{name}.weight")
        return None if weight_M is None else NormWeight(weight_M)

    qkv, out = fused("self_attn.q", "self_attn.k", "self_attn.v"), fused("self_attn.o")
    query_norm, key_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
    post_norm = norm("post_attention_layernorm")
    assert qkv is not None
    assert out is not None
    assert post_norm is not None
    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=qkv,
        head_norms=None if query_norm is None or key_norm is None else HeadNorms(query_norm, key_norm),
        out=out,
        post_norm=post_norm,
        gate_up=fused("mlp.gate", "mlp.up"),
        down=fused("mlp.down"),
        experts=None,
        window=window,
        output_gate=fused("self_attn.gate"),
    )
