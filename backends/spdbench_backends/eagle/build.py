"""From an EAGLE head as read to weights that fit a target: every shape checked, no tensor left over.

Source: METHODS.md A.1 and A.7. Must not know of files' layouts but for what only our own may leave out.

Shapes: T target width, M draft width, A aux features, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spdbench.models.cpu.linear import Linear, linear
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import HeadNorms, NormWeight
from spdbench.models.layers import LayerWeights
from spdbench_backends.eagle.checkpoint_layouts import (
    AuxConvention,
    NormOutput,
    aux_states,
    default_aux,
    feeds_back_normed,
    rotary_of,
)
from spdbench_backends.eagle.formats import EagleConfig, EagleFile
from spdbench_backends.eagle.head import EagleWeights
from spdbench_backends.eagle.sizes import sizes_of


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
    builder = _Builder(file, target)
    return builder.build(aux_convention, rope_theta, norm_output)


class _Builder:
    """Takes a file's tensors once each."""

    def __init__(self, file: EagleFile, target: Decoder) -> None:
        self._file, self._target, self._config, self._base = file, target, file.config, target.config
        self._left = dict(file.tensors)
        self._sizes = sizes_of(file)
        self._check_target()

    def build(self, aux_convention: AuxConvention, rope_theta: float | None, norm_output: NormOutput) -> EagleWeights:
        file, sizes, target, eagle3 = self._file, self._sizes, self._target, self._file.is_eagle3
        width, num_aux = sizes.width, self._num_aux()
        token_ids = self._draft_vocabulary()
        weights = EagleWeights(
            geometry=sizes.geometry,
            rotary=rotary_of(file, sizes.geometry.head_dim, rope_theta, target),
            width=width,
            dtype=target.dtype,
            device=target.device,
            embeddings=self._embeddings(),
            aux=aux_states(file, num_aux, self._base.num_layers, aux_convention) if eagle3 else (),
            fc=linear(self._take("fc.weight", width, sizes.fused), self._optional("fc.bias", width)),
            fc_norms=self._fc_norms(num_aux) if eagle3 else (),
            layers=tuple(self._layer(index) for index in range(sizes.num_layers)),
            feature_norm=self._norm("layers.0.hidden_norm.weight", width) if eagle3 else None,
            norm=self._norm("norm.weight", width) if eagle3 else None,
            head=self._head(token_ids),
            token_ids_U=token_ids,
            residual_normed=eagle3 and self._config.norm_before_residual,
            feed_normed=eagle3 and feeds_back_normed(file, norm_output),
        )
        if self._left:
            raise file.error(f"unknown tensor {min(self._left)} ({len(self._left)} in all)")
        return weights

    def _check_target(self) -> None:
        config, base, width = self._config, self._base, self._sizes.width
        wide = config.target_hidden_size if self._file.is_eagle3 else None
        for what, found, expected in (
            ("config.target_hidden_size" if wide else "the hidden size of fc.weight", wide or width, base.hidden_size),
            ("config.vocab_size", config.vocab_size or base.vocab_size, base.vocab_size),
            ("config's target family", config.target_family or base.family, base.family),
        ):
            if found != expected:
                raise self._file.error(f"{what} is {found}, but here it is {expected}: it was made for another model")

    def _num_aux(self) -> int:
        """How many of the target's features `fc` reads."""
        fused, width = self._sizes.fused, self._base.hidden_size
        if self._file.is_eagle3:
            if fused % width:
                raise self._file.error(f"tensor fc.weight has {fused} columns, expected a multiple of {width}")
            return fused // width
        if fused != 2 * width:
            raise self._file.error(f"tensor fc.weight has {fused} columns, expected {2 * width}")
        return 0

    def _fc_norms(self, num_aux: int) -> tuple[NormWeight, ...]:
        width = self._base.hidden_size
        if "input_norm.weight" in self._left:
            return (self._norm("input_norm.weight", num_aux * width),)
        if not any(name.startswith("fc_norm.") for name in self._left):
            return ()
        return tuple(self._norm(f"fc_norm.{index}.weight", width) for index in range(num_aux))

    def _layer(self, index: int) -> LayerWeights:
        eagle3, geometry, width, ffn = self._file.is_eagle3, self._sizes.geometry, self._sizes.width, self._sizes.ffn
        prefix, attention = f"layers.{index}.", f"layers.{index}.self_attn."
        inputs = 2 * width if eagle3 and index == 0 else width
        queries, kv = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
        return LayerWeights(
            input_norm=self._norm(prefix + "input_layernorm.weight", width) if eagle3 or index else None,
            qkv=self._fused(attention, {"q_proj": queries, "k_proj": kv, "v_proj": kv}, inputs),
            head_norms=self._head_norms(attention, geometry.head_dim),
            out=self._fused(attention, {"o_proj": width}, queries),
            post_norm=self._norm(prefix + "post_attention_layernorm.weight", width),
            gate_up=self._fused(prefix + "mlp.", {"gate_proj": ffn, "up_proj": ffn}, width),
            down=self._fused(prefix + "mlp.", {"down_proj": width}, ffn),
            experts=None,
            window=self._config.sliding_window,
        )

    def _fused(self, prefix: str, rows: dict[str, int], columns: int) -> Linear:
        """Some projections as one, with their biases: all of them or none."""
        weights = [self._take(f"{prefix}{name}.weight", size, columns) for name, size in rows.items()]
        if not any(f"{prefix}{name}.bias" in self._left for name in rows):
            return linear(torch.cat(weights))
        return linear(
            torch.cat(weights), torch.cat([self._take(f"{prefix}{name}.bias", n) for name, n in rows.items()])
        )

    def _head_norms(self, attention: str, head_dim: int) -> HeadNorms | None:
        query, key = (f"{attention}{name}_norm.weight" for name in "qk")
        if query not in self._left and key not in self._left:
            return None
        return HeadNorms(self._norm(query, head_dim), self._norm(key, head_dim))

    def _draft_vocabulary(self) -> Tensor | None:
        """Token ids of the draft vocabulary, from ids that the config lists or from the published pair of buffers."""
        file, stated, vocab = self._file, self._config.draft_vocab_size, self._base.vocab_size
        found = self._listed_vocabulary() if self._config.draft_token_ids else self._paired_vocabulary()
        size = vocab if found is None else len(found)
        if stated is not None and stated != size:
            without = " and d2t and t2d are missing" if found is None else f", but its draft tokens are {size}"
            raise file.error(f"config.draft_vocab_size is {stated}{without}")
        return None if found is None else found.to(self._target.device)

    def _listed_vocabulary(self) -> Tensor:
        ids, vocab = self._config.draft_token_ids, self._base.vocab_size
        assert ids
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= vocab:
            raise self._file.error(f"config.draft_token_ids must be ascending ids below {vocab}")
        return torch.tensor(ids)

    def _paired_vocabulary(self) -> Tensor | None:
        offsets, member = self._left.pop("d2t", None), self._left.pop("t2d", None)
        if offsets is None and member is None:
            return None
        if offsets is None or member is None:
            raise self._file.error(
                f"tensor {'d2t' if offsets is None else 't2d'} is missing, though the other one is there"
            )
        if not self._file.is_eagle3:
            raise self._file.error("has a draft vocabulary (tensor d2t), which EAGLE-1 does not know")
        for name, tensor, wanted in (("t2d", member, [self._base.vocab_size]), ("d2t", offsets, [offsets.numel()])):
            if list(tensor.shape) != wanted:
                raise self._file.error(f"tensor {name} has shape {list(tensor.shape)}, expected {wanted}")
        if not len(offsets):
            raise self._file.error("tensor d2t names no draft token")
        found = offsets.long() + torch.arange(len(offsets))
        known = member.bool().nonzero()[:, 0]
        if not torch.equal(found, known):
            raise self._file.error(
                f"d2t does not match t2d: the one names {len(found)} draft tokens, the other {len(known)}, and not "
                "the same ones"
            )
        return found

    def _head(self, token_ids: Tensor | None) -> Linear:
        """The head's own rows, or the target's where the file has none."""
        width, base = self._sizes.width, self._base
        own = self._optional("lm_head.weight", base.vocab_size if token_ids is None else len(token_ids), width)
        if own is not None:
            return linear(own)
        if self._file.is_eagle3 and self._file.layout != "spdbench":
            raise self._file.error("tensor lm_head.weight is missing")
        if width != base.hidden_size:
            raise self._file.error("tensor lm_head.weight is missing, and the target's head is of another width")
        assert self._target.head is not None
        return self._target.head if token_ids is None else linear(self._target.head.plain()[token_ids])

    def _embeddings(self) -> Tensor:
        width, base = self._sizes.width, self._base
        own = self._optional("embed_tokens.weight", base.vocab_size, width)
        if own is not None:
            return own
        if width != base.hidden_size:
            raise self._file.error(
                "tensor embed_tokens.weight is missing, and the target's embedding is of another width"
            )
        assert self._target.embeddings_VM is not None
        return self._target.embeddings_VM

    def _norm(self, name: str, size: int) -> NormWeight:
        return NormWeight(self._take(name, size))

    def _optional(self, name: str, *shape: int) -> Tensor | None:
        return self._take(name, *shape) if name in self._left else None

    def _take(self, name: str, *shape: int) -> Tensor:
        found = self._left.pop(name, None)
        if found is None:
            raise self._file.error(f"tensor {name} is missing")
        if tuple(found.shape) != shape:
            raise self._file.error(f"tensor {name} has shape {list(found.shape)}, expected {list(shape)}")
        return found.to(self._target.device, self._target.dtype)


def random_eagle(target: Decoder, seed: int, version: Literal[1, 3] = 3) -> EagleFile:
    """An untrained head of the target's sizes: matrices drawn from N(0, 0.02²), norms of ones, the target's head."""
    base = target.config
    width, ffn = base.hidden_size, base.intermediate_size
    queries, kv = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * width if version == 3 else width
    aux = tuple(min(max(index, 0), base.num_layers) for index in default_aux(base.num_layers))
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
        aux_ids=aux if version == 3 else None,
        trained_tokens=0,
    )
    return EagleFile(Path("random"), "spdbench", config, tensors, "")
