"""From an EAGLE head as read to weights that fit a target: every shape checked, every convention settled.

Source: METHODS.md A.1 and A.7. Must not know of files' layouts.

Shapes: T target width, M draft width, A aux features, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench.models.kernels import Linear, linear
from spdbench.models.layers import LayerWeights
from spdbench.models.rotary import Rotary
from spdbench.models.steps import Geometry, HeadNorms, NormWeight
from spdbench_backends.eagle.formats import EagleConfig, EagleFile
from spdbench_backends.eagle.head import EagleWeights

AuxConvention = Literal["auto", "hidden_states", "layer_output"]
NormOutput = Literal["auto", "feed", "ignore"]


def default_aux(num_layers: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads unless a head says otherwise: near the first layer, the middle, the last."""
    return (2, num_layers // 2, num_layers - 3)


def build_eagle(
    file: EagleFile,
    target: Decoder,
    aux_convention: AuxConvention = "auto",
    rope_theta: float | None = None,
    norm_output: NormOutput = "auto",
) -> EagleWeights:
    """The head for `target`.

    Raises:
        InputError: made for another hidden size, vocabulary or family; a tensor is unknown, missing or misshapen; a
            convention that has to be said is not.
    """
    return _Builder(file, target).build(aux_convention, rope_theta, norm_output)


class _Builder:
    def __init__(self, file: EagleFile, target: Decoder) -> None:
        self._file, self._target = file, target
        self._left = dict(file.tensors)
        self._config: EagleConfig = file.config
        self._base = target.config

    def build(self, aux_convention: AuxConvention, rope_theta: float | None, norm_output: NormOutput) -> EagleWeights:
        self._check_config()
        config, eagle3 = self._config, self._file.is_eagle3
        geometry, width = self._geometry(), config.hidden_size
        fc, num_aux = self._fc(eagle3, width)
        layers = self._layers(geometry, eagle3, width)
        token_ids = self._draft_vocabulary(eagle3)
        weights = EagleWeights(
            geometry=geometry,
            rotary=self._rotary(geometry, rope_theta),
            width=width,
            dtype=self._target.dtype,
            device=self._target.device,
            embeddings=self._embeddings(width),
            aux=self._aux(num_aux, aux_convention) if eagle3 else (),
            fc=fc,
            fc_norms=self._fc_norms(num_aux) if eagle3 else (),
            layers=layers,
            feature_norm=NormWeight(self._take("layers.0.hidden_norm.weight", width)) if eagle3 else None,
            norm=NormWeight(self._take("norm.weight", width)) if eagle3 else None,
            head=self._head(width, token_ids),
            token_ids_U=token_ids,
            residual_normed=config.norm_before_residual,
            feed_normed=norm_output == "feed"
            or (norm_output == "auto" and config.norm_output and self._file.layout != "specforge"),
        )
        if self._left:
            raise self._error(f"unknown tensor {min(self._left)} ({len(self._left)} in all)")
        return weights

    def _check_config(self) -> None:
        config, base = self._config, self._base
        target_width = config.target_hidden_size or config.hidden_size
        for key, found, expected in (
            ("target_hidden_size" if config.target_hidden_size else "hidden_size", target_width, base.hidden_size),
            ("vocab_size", config.vocab_size, base.vocab_size),
            ("target_family", config.target_family or base.family, base.family),
        ):
            if found != expected:
                raise self._error(f"config.{key} is {found}, but here it is {expected}: it was made for another model")

    def _geometry(self) -> Geometry:
        config = self._config
        if config.head_dim is None and config.hidden_size % config.num_attention_heads:
            raise self._error(
                "config.hidden_size is no multiple of config.num_attention_heads, and head_dim is missing"
            )
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        if config.num_attention_heads % kv_heads:
            raise self._error("config.num_attention_heads is no multiple of config.num_key_value_heads")
        return Geometry(config.num_attention_heads, kv_heads, head_dim, config.rms_norm_eps)

    def _fc(self, eagle3: bool, width: int) -> tuple[Linear, int]:
        """The fusing projection and how many features it reads."""
        inputs = self._base.hidden_size if eagle3 else 2 * width
        columns = self._columns("fc.weight")
        if columns % inputs or (not eagle3 and columns != inputs):
            wanted = f"a multiple of {inputs}" if eagle3 else str(inputs)
            raise self._error(f"tensor fc.weight has {columns} columns, expected {wanted}")
        bias = None if eagle3 else self._optional("fc.bias", width)
        return linear(self._take("fc.weight", width, columns), bias), columns // inputs

    def _fc_norms(self, num_aux: int) -> tuple[NormWeight, ...]:
        width = self._base.hidden_size
        whole = self._optional("input_norm.weight", num_aux * width)
        if whole is not None:
            return (NormWeight(whole),)
        if "fc_norm.0.weight" not in self._left:
            return ()
        return tuple(NormWeight(self._take(f"fc_norm.{i}.weight", width)) for i in range(num_aux))

    def _layers(self, geometry: Geometry, eagle3: bool, width: int) -> tuple[LayerWeights, ...]:
        count = 1 + max(
            (int(n.split(".")[1]) for n in self._left if n.startswith("layers.") and n[7].isdigit()), default=0
        )
        return tuple(self._layer(index, geometry, eagle3, width) for index in range(count))

    def _layer(self, index: int, geometry: Geometry, eagle3: bool, width: int) -> LayerWeights:
        prefix, attention = f"layers.{index}.", f"layers.{index}.self_attn."
        inputs = 2 * width if eagle3 and index == 0 else width
        queries, kv = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
        sizes = (("q_proj", queries), ("k_proj", kv), ("v_proj", kv))
        weights = [self._take(f"{attention}{name}.weight", size, inputs) for name, size in sizes]
        biases = [self._optional(f"{attention}{name}.bias", size) for name, size in sizes]
        present = [bias for bias in biases if bias is not None]
        if present and len(present) < len(biases):
            raise self._error(f"{attention}: of query, key and value only some have a bias")
        norms = [self._optional(f"{attention}{name}_norm.weight", geometry.head_dim) for name in ("q", "k")]
        head_norms = None
        if norms[0] is not None and norms[1] is not None:
            head_norms = HeadNorms(NormWeight(norms[0]), NormWeight(norms[1]))
        ffn = self._config.intermediate_size
        normed = eagle3 or index > 0
        return LayerWeights(
            input_norm=NormWeight(self._take(prefix + "input_layernorm.weight", width)) if normed else None,
            qkv=linear(torch.cat(weights), torch.cat(present) if present else None),
            head_norms=head_norms,
            out=linear(
                self._take(attention + "o_proj.weight", width, queries),
                self._optional(attention + "o_proj.bias", width),
            ),
            post_norm=NormWeight(self._take(prefix + "post_attention_layernorm.weight", width)),
            gate_up=linear(
                torch.cat([self._take(f"{prefix}mlp.{name}_proj.weight", ffn, width) for name in ("gate", "up")])
            ),
            down=linear(self._take(prefix + "mlp.down_proj.weight", width, ffn)),
            experts=None,
            window=self._config.sliding_window,
        )

    def _draft_vocabulary(self, eagle3: bool) -> Tensor | None:
        """Token ids of the draft vocabulary, from ids that the config lists or from the published pair of buffers."""
        offsets, member = self._left.pop("d2t", None), self._left.pop("t2d", None)
        ids, vocab = self._config.draft_token_ids, self._base.vocab_size
        if ids is not None:
            if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= vocab:
                raise self._error(f"config.draft_token_ids must be ascending ids below {vocab}")
            return torch.tensor(ids, device=self._target.device)
        if (offsets is None) != (member is None):
            raise self._error(f"tensor {'d2t' if offsets is None else 't2d'} is missing, though the other one is there")
        if offsets is None or member is None:
            return None
        if not eagle3:
            raise self._error("has a draft vocabulary, which EAGLE-1 does not know")
        if tuple(member.shape) != (vocab,) or offsets.dim() != 1:
            raise self._error(f"tensor t2d has shape {list(member.shape)}, expected [{vocab}]")
        found = offsets.long() + torch.arange(len(offsets))
        known = member.bool().nonzero()[:, 0]
        if not torch.equal(found, known):
            raise self._error(
                f"d2t does not match t2d: the one names {len(found)} draft tokens, the other {len(known)}, and not "
                "the same ones"
            )
        return found.to(self._target.device)

    def _head(self, width: int, token_ids: Tensor | None) -> Linear:
        """The head's own rows, or the target's where the file has none."""
        size = self._base.vocab_size if token_ids is None else len(token_ids)
        own = self._optional("lm_head.weight", size, width)
        if own is not None:
            return linear(own)
        assert self._target.head is not None
        if width != self._base.hidden_size:
            raise self._error("tensor lm_head.weight is missing, and the target's head is of another width")
        if self._file.is_eagle3 and self._file.layout != "spdbench":
            raise self._error("tensor lm_head.weight is missing")
        return self._target.head if token_ids is None else linear(self._target.head.plain()[token_ids])

    def _embeddings(self, width: int) -> Tensor:
        own = self._optional("embed_tokens.weight", self._base.vocab_size, width)
        if own is not None:
            return own
        if width != self._base.hidden_size:
            raise self._error("tensor embed_tokens.weight is missing, and the target's embedding is of another width")
        assert self._target.embeddings_VM is not None
        return self._target.embeddings_VM

    def _aux(self, num_aux: int, convention: AuxConvention) -> tuple[int, ...]:
        """The target's hidden states that the head reads; METHODS.md A.7 on why their ids are told in two ways."""
        layers, ids = self._base.num_layers, self._config.aux_ids
        standard = default_aux(layers)
        if ids is None:
            if num_aux != len(standard):
                raise self._error(f"reads {num_aux} auxiliary features, and its config does not say which")
            ids, convention = standard, "hidden_states"
        if len(ids) != num_aux:
            raise self._error(f"config names {len(ids)} auxiliary layers, but fc.weight reads {num_aux}")
        if self._file.layout == "spdbench":
            convention = "hidden_states"
        if convention == "auto":
            if tuple(ids) not in (standard, tuple(index - 1 for index in standard)):
                raise self._error(
                    f"config names the auxiliary layers {list(ids)}, which may count hidden states or layers' outputs; "
                    "say -o eagle.aux_convention=hidden_states or layer_output (try both: the right one drafts better)"
                )
            convention = "hidden_states" if tuple(ids) == standard else "layer_output"
        found = tuple(ids) if convention == "hidden_states" else tuple(index + 1 for index in ids)
        if not all(0 <= index <= layers for index in found):
            raise self._error(f"config names the auxiliary layers {list(ids)}, but the target has {layers} layers")
        return found

    def _rotary(self, geometry: Geometry, theta: float | None) -> Rotary:
        if theta is None and self._config.rope_type != "default":
            raise self._error(
                f"config's rotary positions are of type {self._config.rope_type}, of which only default is supported; "
                "-o eagle.rope_theta=BASE takes plain ones"
            )
        exponents = torch.arange(0, geometry.head_dim, 2, dtype=torch.float32) / geometry.head_dim
        base = self._config.rope_theta if theta is None else theta
        return Rotary(1.0 / base**exponents, 1.0, self._target.dtype, self._target.device)

    def _columns(self, name: str) -> int:
        tensor = self._left.get(name)
        if tensor is None:
            raise self._error(f"tensor {name} is missing")
        if tensor.dim() != 2:
            raise self._error(f"tensor {name} has shape {list(tensor.shape)}, expected a matrix")
        return int(tensor.shape[1])

    def _take(self, name: str, *shape: int) -> Tensor:
        found = self._left.pop(name, None)
        if found is None:
            raise self._error(f"tensor {name} is missing")
        if tuple(found.shape) != shape:
            raise self._error(f"tensor {name} has shape {list(found.shape)}, expected {list(shape)}")
        if not found.is_floating_point():
            raise self._error(f"tensor {name} is {found.dtype}; only unquantised weights are supported")
        return found.to(self._target.device, self._target.dtype)

    def _optional(self, name: str, *shape: int) -> Tensor | None:
        return self._take(name, *shape) if name in self._left else None

    def _error(self, text: str) -> InputError:
        return InputError(f"{self._file.path}: {text}")


def random_eagle(target: Decoder, seed: int, version: Literal[1, 3] = 3) -> EagleFile:
    """An untrained head of the target's sizes: matrices drawn from N(0, 0.02²), norms of ones, the target's head."""
    base = target.config
    width, ffn = base.hidden_size, base.intermediate_size
    queries, kv = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * width if version == 3 else width
    shapes = {
        "fc.weight": (width, 3 * width if version == 3 else 2 * width),
        "layers.0.self_attn.q_proj.weight": (queries, inputs),
        "layers.0.self_attn.k_proj.weight": (kv, inputs),
        "layers.0.self_attn.v_proj.weight": (kv, inputs),
        "layers.0.self_attn.o_proj.weight": (width, queries),
        "layers.0.mlp.gate_proj.weight": (ffn, width),
        "layers.0.mlp.up_proj.weight": (ffn, width),
        "layers.0.mlp.down_proj.weight": (width, ffn),
    }
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(width)
    if version == 3:
        norms = ("layers.0.hidden_norm.weight", "layers.0.input_layernorm.weight", "norm.weight")
        tensors |= {name: torch.ones(width) for name in norms}
    config = EagleConfig(
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        hidden_size=width,
        intermediate_size=ffn,
        vocab_size=base.vocab_size,
        rms_norm_eps=base.norm_eps,
        aux_ids=tuple(max(index, 0) for index in default_aux(base.num_layers)) if version == 3 else None,
        trained_tokens=0,
    )
    return EagleFile(Path("random"), "spdbench", config, tensors, "")
