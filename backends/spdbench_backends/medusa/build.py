"""From Medusa's heads as read to weights that fit a target."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from spdbench.models.checkpoints.layer_tensors import ExpectedTensors
from spdbench.models.decoder import Decoder
from spdbench_backends.drafter_files.tensors import (
    TargetTensors,
    draft_vocabulary,
    random_tensors,
    require_target,
    target_head,
)
from spdbench_backends.medusa.drafter import MedusaWeights
from spdbench_backends.medusa.formats import NAMES, SHARED, TOKEN_MAP, MedusaConfig, MedusaFile


def build_medusa(file: MedusaFile, target: Decoder) -> MedusaWeights:
    """The heads for `target`.

    Raises:
        InputError: made for another hidden size, vocabulary or family; a tensor is unknown, missing or misshapen.
    """
    base, config = target.config, file.config
    require_target(
        file,
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
        ("config.target_family", config.target_family, base.family),
    )
    source = f"tensor {TOKEN_MAP}" if file.layout == "vllm" else "config.draft_token_ids"
    token_ids_U = draft_vocabulary(file, config.draft_token_ids, target, source=source, ascending=False)
    draft_vocab = base.vocab_size if token_ids_U is None else len(token_ids_U)
    longest = max(map(len, config.head_accuracies), default=0)
    if longest > draft_vocab:
        raise file.error(f"head_accuracies are of {longest} ranks, but {draft_vocab} tokens are drafted")
    blocks = file.block_names(file.layout)
    expected = _expected(blocks, file.layout, target)
    shared = SHARED in file.tensors and file.layout in ("vllm", "spdbench")
    linears = [SHARED] if shared else file.head_names(file.layout)
    expected.add(dict.fromkeys(linears, (draft_vocab, base.hidden_size)), optional=True)
    tensors = TargetTensors(file, expected, target)
    own = tuple(tensors.linear(name.removesuffix("weight")) for name in linears if name in tensors)
    return MedusaWeights(
        blocks=tuple(tuple(tensors.linear(name) for name in head) for head in blocks),
        heads=own or (target_head(target, token_ids_U),),
        token_ids_U=token_ids_U,
    )


def _expected(blocks: list[list[str]], layout: str, target: Decoder) -> ExpectedTensors:
    """The tensors of all residual blocks."""
    width, names = target.config.hidden_size, list(chain.from_iterable(blocks))
    expected = ExpectedTensors({name + "weight": (width, width) for name in names})
    expected.add({name + "bias": (width,) for name in names}, optional=not NAMES[layout].bias)
    return expected


def random_medusa(target: Decoder, num_heads: int, seed: int) -> MedusaFile:
    """Untrained heads of one block each: matrices drawn from N(0, 0.02²), biases of zeros, the target's head."""
    base = target.config
    config = MedusaConfig(
        hidden_size=base.hidden_size, vocab_size=base.vocab_size, target_family=base.family, trained_tokens=0
    )
    names = [[NAMES["v2"].block.format(head=k, block=0)] for k in range(num_heads)]
    shapes = _expected(names, "v2", target).required  # a layout whose blocks all have a bias
    return MedusaFile(Path("random"), "spdbench", config, random_tensors(shapes, seed))
