"""From Medusa's heads as read to weights that fit a target: every shape checked.

Must not know of files' layouts.

Shapes: M model width, U draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.cpu.linear import Linear, linear
from spdbench.models.decoder import Decoder
from spdbench_backends.medusa.drafter import MedusaWeights
from spdbench_backends.medusa.formats import Block, MedusaConfig, MedusaFile


def build_medusa(file: MedusaFile, target: Decoder) -> MedusaWeights:
    """The heads for `target`.

    Raises:
        InputError: made for another hidden size, vocabulary or family, or misshapen.
    """
    base, config = target.config, file.config
    for key, found, expected in (
        ("hidden_size", config.hidden_size, base.hidden_size),
        ("vocab_size", config.vocab_size, base.vocab_size),
        ("target_family", config.target_family, base.family),
    ):
        if found is not None and found != expected:
            raise InputError(
                f"{file.path}: config.{key} is {found}, but here it is {expected}: it was made for another model"
            )
    token_ids_U = _draft_vocabulary(file, target)
    width, draft_vocab = base.hidden_size, base.vocab_size if token_ids_U is None else len(token_ids_U)
    for name, tensor in file.block_names(file.layout):
        _check_shape(file, name, tensor, [width] if name.endswith("bias") else [width, width])
    for name, tensor in file.head_names(file.layout):
        _check_shape(file, name, tensor, [draft_vocab, width])
    longest = max(map(len, file.head_accuracies), default=0)
    if longest > draft_vocab:
        raise InputError(f"{file.path}: head_accuracies are of {longest} ranks, but {draft_vocab} tokens are drafted")
    return MedusaWeights(
        blocks=tuple(tuple(_linear(target, block.weight_MM, block.bias_M) for block in head) for head in file.blocks),
        heads=tuple(_linear(target, head) for head in file.heads) or (_target_head(target, token_ids_U),),
        token_ids_U=token_ids_U,
    )


def _draft_vocabulary(file: MedusaFile, target: Decoder) -> Tensor | None:
    ids, vocab = file.config.draft_token_ids, target.config.vocab_size
    if ids is None:
        return None
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab:
        raise InputError(f"{file.path}: {file.draft_ids_name} must hold ids from 0 to {vocab - 1}, each of them once")
    return torch.tensor(ids, device=target.device)


def _check_shape(file: MedusaFile, name: str, tensor: Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise InputError(f"{file.path}: tensor {name} has shape {list(tensor.shape)}, expected {shape}")


def _linear(target: Decoder, weight: Tensor, bias: Tensor | None = None) -> Linear:
    """In memory of our own: a mapped file's pages could be dropped in the middle of a measurement."""
    own_bias = None if bias is None else bias.to(target.device, target.dtype, copy=True)
    return linear(weight.to(target.device, target.dtype, copy=True), own_bias)


def _target_head(target: Decoder, token_ids_U: Tensor | None) -> Linear:
    assert target.head is not None
    return target.head if token_ids_U is None else linear(target.head.plain()[token_ids_U])


def random_medusa(target: Decoder, num_heads: int, seed: int) -> MedusaFile:
    """Untrained heads of one block each: matrices drawn from N(0, 0.02²), biases of zeros, the target's head."""
    base = target.config
    generator = torch.Generator().manual_seed(seed)
    shape = (base.hidden_size, base.hidden_size)
    blocks = tuple(
        (Block(torch.randn(shape, generator=generator) * 0.02, torch.zeros(base.hidden_size)),)
        for _ in range(num_heads)
    )
    config = MedusaConfig(
        hidden_size=base.hidden_size, vocab_size=base.vocab_size, target_family=base.family, trained_tokens=0
    )
    return MedusaFile(Path("random"), "spdbench", config, blocks, (), "")
