"""Medusa heads of random numbers, by the names of our own layout, and the backend that drafts with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spdbench.backend import BackendContext, parse_options
from spdbench.models.target import Target
from spdbench_backends.medusa.backend import Medusa
from spdbench_backends.medusa.formats import MedusaConfig, MedusaFile

WIDTH, VOCAB = 32, 262


def heads(
    num_heads: int = 3,
    num_blocks: int = 1,
    linears: int = 3,
    ids: tuple[int, ...] | None = None,
    bias: bool = True,
    **config: Any,
) -> MedusaFile:
    """Heads with weights large enough to tell things apart; `linears` is 0, 1 for a shared layer, or one for each."""
    generator = torch.Generator().manual_seed(num_heads + 10 * num_blocks)
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(shape, generator=generator) * 0.5

    for k in range(num_heads):
        for j in range(num_blocks):
            draw(f"{k}.{j}.linear.weight", WIDTH, WIDTH)
            if bias:
                draw(f"{k}.{j}.linear.bias", WIDTH)
    shared = linears == 1 < num_heads
    for k in range(linears):
        draw("lm_head.weight" if shared else f"{k}.{num_blocks}.weight", VOCAB if ids is None else len(ids), WIDTH)
    settings = MedusaConfig(draft_token_ids=ids, **{"vocab_size": VOCAB, **config})
    return MedusaFile(Path("made"), "spdbench", settings, tensors)


def started(target: Target, drafter: Path | str, **options: str) -> Medusa:
    """The backend with its drafter, loaded."""
    context = BackendContext("medusa", target, str(drafter), ("cpu",), 1, seed=0)
    backend = Medusa(parse_options("medusa", Medusa.Options, options), context)
    backend.load()
    return backend
