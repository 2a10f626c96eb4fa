"""The ends of a transformers model as drafters share them: its embedding, its final norm and its output head, as a
decoder of ours without layers.

A drafter's own layers are ours, whatever computes the target's. Of the target it needs sizes, a table of embeddings,
the norm behind the last layer and the rows of the head. No architecture is known here: the parts are found by their
shapes, and used only if they give the model's own logits.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spdbench.models.checkpoints.config import ModelConfig, Sizes
from spdbench.models.checkpoints.config_checks import require_positive
from spdbench.models.checkpoints.layer_tensors import geometry_of
from spdbench.models.cpu.linear import linear
from spdbench.models.decoder import Decoder
from spdbench.models.hf.decoder import HFDecoder
from spdbench.models.layer_ops import NormWeight
from spdbench.models.rotary import Rotary, plain_frequencies

ROTARY_BASE = 10_000.0
"""Of a drafter's positions, which need not be the target's."""
CHECKED_ROWS = 16


class EndsError(Exception):
    """The ends are of another kind than drafters share; the message says which."""


@torch.no_grad()
def shared_ends(decoder: HFDecoder, directory: Path) -> Decoder:
    """A decoder of ours with no layers, and with the embedding, the final norm and the head of `decoder`.

    Where the model caps its logits (Gemma 2), these are the logits before the cap, which keeps their order.

    Raises:
        EndsError: there is no RMS norm, or no head without a bias, or they do not give the model's logits.
        InputError: the config cannot be that of a model.
    """
    model, dtype, device = decoder.model, decoder.dtype, decoder.device
    text = model.config.get_text_config(decoder=True)
    norm = _final_norm(model, decoder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight.detach()
    shape = (decoder.config.vocab_size, decoder.config.hidden_size)
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None or tuple(head.weight.shape) != shape:
        raise EndsError("its output head is not one matrix without a bias")
    ids_S = torch.arange(min(CHECKED_ROWS, shape[0]), device=device)
    embedded_SM = decoder.embed(ids_S)
    if embedded_SM.shape[-1] != shape[1]:
        raise EndsError(f"its embedding has {embedded_SM.shape[-1]} columns, its layers {shape[1]}")
    plain = torch.equal(embedded_SM, embedding[ids_S])  # else it is scaled, say
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
    tied = plain and head.weight is model.get_input_embeddings().weight
    config = _drafters_config(directory, text, decoder.config, eps, tied)
    ends = Decoder(
        config=config,
        layers=range(0),
        geometry=geometry_of(config),
        rotary=Rotary(plain_frequencies(ROTARY_BASE, config.head_dim), 1.0, dtype, device),
        weights={},
        embeddings_VM=embedding if plain else decoder.embed(torch.arange(shape[0], device=device)),
        final_norm=NormWeight(_weight(norm, eps, shape[1], device).to(dtype)),
        head=linear(head.weight.detach()),
        dtype=dtype,
        device=device,
    )
    _require_own_logits(ends, decoder, getattr(text, "final_logit_softcapping", None))
    return ends


def _final_norm(model: Any, decoder: HFDecoder) -> nn.Module:
    """The one norm outside of the layers that has a weight and nothing else."""
    found = [
        module
        for name, module in model.base_model.named_modules()
        if not name.startswith(f"{decoder.path}.")
        and [(key, tuple(each.shape)) for key, each in module.named_parameters()]
        == [("weight", (decoder.config.hidden_size,))]
        and not list(module.children())
    ]
    if len(found) != 1:
        raise EndsError("it has no RMS norm behind its layers")
    return cast(nn.Module, found[0])


def _weight(norm: nn.Module, eps: float, width: int, device: torch.device) -> Tensor:
    """What the norm multiplies by, however it is stored (Gemma's as its difference from one): `[M]` in float32."""
    ones_1M = torch.ones(1, width, device=device)
    return cast(Tensor, copy.deepcopy(norm).float()(ones_1M))[0] * math.sqrt(1 + eps)


def _drafters_config(directory: Path, text: Any, base: Sizes, eps: float, tied: bool) -> ModelConfig:
    """The sizes of layers of ours as drafters have them: heads and widths are the target's, nothing else is."""
    require_positive(directory, text, ("num_attention_heads",))
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or base.hidden_size // heads
    if heads % kv_heads or head_dim % 2 or head_dim < 2:
        raise EndsError(f"{heads} query heads, {kv_heads} key heads and a head_dim of {head_dim} make no layer of ours")
    ffn = getattr(text, "intermediate_size", None)
    return ModelConfig(
        **vars(base),
        intermediate_size=ffn if isinstance(ffn, int) and ffn > 0 else 4 * base.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=eps,
        tied=tied,
        qk_norm=False,
        windows=(None,) * base.num_layers,
        experts=None,
        rotary_dim=head_dim,
    )


def _require_own_logits(ends: Decoder, decoder: HFDecoder, cap: float | None) -> None:
    """Raises `EndsError` where norm and head do not give the logits that the model gives."""
    rows = torch.randn(CHECKED_ROWS, ends.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows_SM = rows.to(ends.device, ends.dtype)
    expected_SV, found_SV = decoder.logits(rows_SM).float(), ends.logits(rows_SM).float()
    if cap is not None:
        found_SV = cap * torch.tanh(found_SV / cap)
    off_S = (found_SV - expected_SV).norm(dim=-1) / expected_SV.norm(dim=-1).clamp_min(1e-30)
    if not bool(off_S.median() <= torch.finfo(ends.dtype).eps ** 0.5):
        raise EndsError(f"a norm and its output head give other logits than it does, off by {float(off_S.max()):.1%}")
