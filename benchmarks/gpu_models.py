"""Models of Qwen3's shapes with random weights, made where they compute: timing needs sizes, not answers, and no files.

Must not know what is measured with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench.models.cpu.linear import linear
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import Geometry, HeadNorms, NormWeight
from spdbench.models.layers import LayerWeights
from spdbench.models.partition import split_by_cost
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench.models.target import DTYPES, LayerSource, find_device

ROTARY_BASE = 1e6
NORM_EPS = 1e-6
SPREAD = 0.02
POSITIONS = 4096


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Qwen3 family. `tied`: embedding and head are one matrix."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    tied: bool
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            family="qwen3",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=POSITIONS,
            eos_ids=frozenset(),
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_eps=NORM_EPS,
            tied=self.tied,
            qk_norm=True,
            windows=(None,) * self.num_layers,
            experts=None,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.6B", 28, 1024, 3072, 16, tied=True),
        Shape("1.7B", 28, 2048, 6144, 16, tied=True),
        Shape("4B", 36, 2560, 9728, 32, tied=True),
        Shape("8B", 36, 4096, 12288, 32, tied=False),
        Shape("tiny", 8, 64, 96, 4, tied=True, num_kv_heads=2, head_dim=16, vocab_size=300),
    )
}
"""`tiny` is for rehearsals."""


def stages_of(shape: Shape, count: int, head_layers: int = 0) -> tuple[range, ...]:
    """The model in `count` stages that differ by a layer at most, the head standing for so many layers of the last."""
    return split_by_cost(shape.num_layers, [0.0] * (count - 1) + [float(head_layers)])


@torch.inference_mode()
def random_decoder(shape: Shape, dtype: torch.dtype, device: torch.device, layers: range | None = None) -> Decoder:
    """The layers `layers` (all by default) with what of the model goes with them."""
    config = shape.config
    layers = range(config.num_layers) if layers is None else layers
    first, last = layers.start == 0, layers.stop == config.num_layers
    vocab = config.vocab_size, config.hidden_size
    embeddings = _random(vocab, -1, dtype, device) if first or (last and shape.tied) else None
    head = None
    if last:
        head = linear(embeddings if shape.tied and embeddings is not None else _random(vocab, -2, dtype, device))
    return Decoder(
        config=config,
        layers=layers,
        geometry=Geometry(config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps),
        rotary=Rotary(plain_frequencies(ROTARY_BASE, config.head_dim), 1.0, dtype, device),
        weights={layer: _layer(config, layer, dtype, device) for layer in layers},
        embeddings_VM=embeddings if first else None,
        final_norm=_norm(config.hidden_size, dtype, device) if last else None,
        head=head,
        dtype=dtype,
        device=device,
    )


@dataclass(frozen=True)
class RandomSource(LayerSource):
    """Layers of a random model, for stages in processes of their own."""

    shape: Shape

    def load(self, layers: range, device: str) -> Decoder:
        return random_decoder(self.shape, DTYPES[self.dtype], find_device(device), layers)


def random_source(shape: Shape, dtype: str) -> RandomSource:
    return RandomSource(ModelFiles(f"random {shape.name}", Path(), ""), dtype, None, None, shape)


def _layer(config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    width, queries = config.hidden_size, config.num_heads * config.head_dim
    kv, ffn = config.num_kv_heads * config.head_dim, config.intermediate_size

    def product(part: int, outputs: int, inputs: int) -> Tensor:
        return _random((outputs, inputs), 4 * index + part, dtype, device)

    return LayerWeights(
        input_norm=_norm(width, dtype, device),
        qkv=linear(product(0, queries + 2 * kv, width)),
        head_norms=HeadNorms(_norm(config.head_dim, dtype, device), _norm(config.head_dim, dtype, device)),
        out=linear(product(1, width, queries)),
        post_norm=_norm(width, dtype, device),
        gate_up=linear(product(2, 2 * ffn, width)),
        down=linear(product(3, width, ffn)),
        experts=None,
        window=None,
    )


def _norm(size: int, dtype: torch.dtype, device: torch.device) -> NormWeight:
    return NormWeight(torch.ones(size, dtype=dtype, device=device))


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same numbers for the same seed, whichever process draws them on this device."""
    generator = torch.Generator(device).manual_seed(1000 + seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, SPREAD, generator=generator)
