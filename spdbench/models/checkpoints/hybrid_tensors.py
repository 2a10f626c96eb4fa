"""The tensors of Qwen3.5's layers by their names in checkpoints, as the layers that are made of them want them.

Three things differ from the llama family's: a query projection holds each head's gate behind its queries; norms are
stored as their weights' difference from one; and only the first numbers of a head are rotated by position. Our kernels
rotate pairs that lie half a head apart. So the numbers of a head are put in another order when queries and keys are
read: the pairs that are rotated come first in either half, and the frequencies of the others are 0. Attention
multiplies queries with keys number by number, so the order changes nothing else.

Source: Qwen3.5's published checkpoints. Shapes: M model width, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer, geometry_of
from spdbench.models.cpu.linear import linear
from spdbench.models.delta_net import DeltaNet
from spdbench.models.layer_ops import NormWeight
from spdbench.models.layers import LayerWeights

Read = Callable[[str], Tensor | None]
"""Gives the tensor of a name, or None where there is none."""

QUERIES, GATES = "self_attn.q_proj.", "self_attn.gate_proj."


def add_gated_layer(expected: ExpectedTensors, prefix: str, config: ModelConfig, ffn: int | None) -> None:
    """A full-attention layer whose query projection holds the gates as well; see `ExpectedTensors.add_layer`."""
    expected.add_layer(prefix, geometry_of(config), config.hidden_size, ffn, head_norms=True)
    doubled = 2 * config.num_heads * config.head_dim
    expected.required[f"{prefix}{QUERIES}weight"] = (doubled, config.hidden_size)
    for group in expected.optional:
        if f"{prefix}{QUERIES}bias" in group:
            group[f"{prefix}{QUERIES}bias"] = (doubled,)


def add_recurrent_layer(expected: ExpectedTensors, prefix: str, config: ModelConfig, ffn: int | None) -> None:
    """A gated delta net with its feed-forward, unless that is a mixture of experts."""
    sizes, width = config.recurrent, config.hidden_size
    assert sizes is not None
    net = prefix + "linear_attn."
    heads = (sizes.num_value_heads,)
    expected.add(
        {
            net + "in_proj_qkv.weight": (sizes.channels, width),
            net + "in_proj_z.weight": (sizes.values, width),
            net + "in_proj_b.weight": (*heads, width),
            net + "in_proj_a.weight": (*heads, width),
            net + "conv1d.weight": (sizes.channels, 1, sizes.window + 1),
            net + "dt_bias": heads,
            net + "A_log": heads,
            net + "norm.weight": (sizes.value_dim,),
            net + "out_proj.weight": (width, sizes.values),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    )
    if ffn is not None:
        gate_up = {f"{prefix}mlp.{part}_proj.weight": (ffn, width) for part in ("gate", "up")}
        expected.add({**gate_up, f"{prefix}mlp.down_proj.weight": (width, ffn)})


def gated_layer(read: Read, prefix: str, config: ModelConfig) -> LayerWeights:
    """The full-attention layer of the tensors named `prefix`..."""
    return dense_layer(_AsLlama(read, config), prefix)


def recurrent_layer(read: Read, prefix: str, config: ModelConfig) -> LayerWeights:
    """The recurrent layer of the tensors named `prefix`..."""
    assert config.recurrent is not None
    llama, net = _AsLlama(read, config), prefix + "linear_attn."

    def present(name: str, convert: Read = read) -> Tensor:
        tensor = convert(name)
        assert tensor is not None
        return tensor

    parts = [present(f"{net}in_proj_{part}.weight") for part in ("qkv", "z", "b", "a")]
    gate, up, down = (llama(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    return LayerWeights(
        input_norm=NormWeight(present(prefix + "input_layernorm.weight", llama)),
        qkv=linear(torch.cat(parts)),
        head_norms=None,
        out=linear(present(net + "out_proj.weight")),
        post_norm=NormWeight(present(prefix + "post_attention_layernorm.weight", llama)),
        gate_up=None if gate is None or up is None else linear(torch.cat((gate, up))),
        down=None if down is None else linear(down),
        experts=None,
        window=None,
        delta_net=DeltaNet(
            sizes=config.recurrent,
            conv_WC=present(net + "conv1d.weight")[:, 0].T.float().contiguous(),
            decay_H=-present(net + "A_log").float().exp(),
            time_bias_H=present(net + "dt_bias").float(),
            norm_E=present(net + "norm.weight").float(),
            norm_eps=config.norm_eps,
        ),
    )


def plain_norm(weight_M: Tensor) -> Tensor:
    """The weight of a norm that is stored as its difference from one; in float32, as the sum would be rounded."""
    return 1.0 + weight_M.float()


def rotary_order(head_dim: int, rotary_dim: int) -> list[int]:
    """The order of a head's numbers in which the pairs that are rotated lie half a head apart, like all others."""
    low, high = list(range(rotary_dim // 2)), list(range(rotary_dim // 2, rotary_dim))
    rest = list(range(rotary_dim, head_dim))
    middle = len(rest) // 2
    return [*low, *rest[:middle], *high, *rest[middle:]]


@dataclass(frozen=True)
class _AsLlama:
    """The tensors that `read` gives, as those of a layer of the llama family; gates under a name of their own."""

    read: Read
    config: ModelConfig

    def __call__(self, name: str) -> Tensor | None:
        gates = GATES in name
        tensor = self.read(name.replace(GATES, QUERIES))
        if tensor is None:
            return None
        if name.endswith("norm.weight"):
            weight_M = plain_norm(tensor)
            return self._reordered(weight_M) if name.endswith(("q_norm.weight", "k_norm.weight")) else weight_M
        if gates or QUERIES in name:
            both = tensor.reshape(self.config.num_heads, 2, self.config.head_dim, *tensor.shape[1:])
            queries, gate = both.unbind(1)
            return gate.flatten(0, 1) if gates else self._reordered(queries.flatten(0, 1))
        return self._reordered(tensor) if "self_attn.k_proj." in name else tensor

    def _reordered(self, rows: Tensor) -> Tensor:
        """The first dimension, head by head, in the order of `rotary_order`."""
        order = rotary_order(self.config.head_dim, self.config.rotary_dim)
        heads = rows.reshape(-1, self.config.head_dim, *rows.shape[1:])
        return heads[:, order].flatten(0, 1)
