"""What everyone may ask of a target's layers and of their cache, whoever computes them.

Two classes fit: our own `decoder.Decoder`, and `standard_layers.HFDecoder` for models that ours does not know.
This module must know neither.

Shapes: S rows, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spdbench.models.attention_context import TreeRows
from spdbench.models.checkpoints.config import Sizes


class TargetCache(Protocol):
    """What a range of layers remembers of the tokens that it has seen: `length` slots of `capacity`."""

    @property
    def length(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def mark(self) -> int:
        """A place to roll back to."""

    def rollback(self, mark: int) -> None:
        """Forgets every slot from `mark` on; a no-op where fewer are valid."""

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Of the slots from `mark` on keeps those at the rising offsets `chosen` and forgets the others."""


class CancelledForwardError(Exception):
    """A forward pass was given up because nobody wants its result any more."""


class TargetDecoder(Protocol):
    """Layers of a target model, with its embedding and its head where they were loaded."""

    @property
    def config(self) -> Sizes: ...

    @property
    def layers(self) -> range: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> str:
        """What does the arithmetic, as results call it."""

    @property
    def takes_trees(self) -> bool:
        """False if rows can only be a chain."""

    def embed(self, ids_S: Tensor) -> Tensor:
        """Hidden state 0 of the tokens: `[S, M]`."""

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: Any,
        layers: range | None = None,
        hidden_indices: Collection[int] = (),
        tree: TreeRows | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Rows at positions `start`, `start` + 1, ... through `layers` (all by default), whose `cache` it must be; or a
        tree's rows from `start` on.

        Returns the last layer's output `[S, M]` and the hidden states asked for in `hidden_indices`, by index.

        Raises:
            CancelledForwardError: `cancelled`, which may be asked between layers, said so; the cache is as it was.
        """

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Next-token logits `[S, V]` of the last layer's output."""

    def ids(self, token_ids: Collection[int]) -> Tensor:
        """Token ids as a tensor where the embedding lives: `[S]`."""

    def new_cache(self, capacity: int, layers: range | None = None) -> TargetCache:
        """An empty cache for `layers` (all by default) with room for `capacity` tokens."""

    def bytes_per_token(self, layers: range, head: bool) -> int:
        """Bytes of weights that one token's forward through `layers` reads; with `head`, what follows them too."""
