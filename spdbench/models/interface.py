"""The interface of a target's layers and of their cache.

Implemented by our own `decoder.Decoder`, by `cuda.captured_decoder.CapturedDecoder` on a GPU, and by
`hf.decoder.HFDecoder` for models that our own layers do not compute.

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
    """What a range of layers remembers: `length` of `capacity` tokens are valid."""

    @property
    def length(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def rollback(self, mark: int) -> None:
        """Forgets every slot from `mark`, an earlier `length`, on; does nothing where fewer are valid.

        Raises:
            IndexError: recurrent layers have no snapshot as old as that; see `TargetDecoder.new_cache`.
        """

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Keeps of the slots from `mark` on those at the rising offsets `chosen`, and forgets the others."""


class CancelledForwardError(Exception):
    """A forward pass was stopped because its result is no longer needed."""


class TargetDecoder(Protocol):
    """Layers of a target model, with its embedding and its head where they were loaded."""

    def __hash__(self) -> int:
        """By identity: a decoder is equal only to itself."""

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
        """The name of the kernels, as in results."""

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
        """Rows at positions `start`, `start` + 1, ... through `layers` (all by default), to which `cache` must belong;
        or a tree's rows from `start` on.

        Returns the last layer's output `[S, M]` and the hidden states asked for in `hidden_indices`, by index.

        Raises:
            CancelledForwardError: `cancelled`, which is called between layers, returned true; the cache is unchanged.
        """

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Next-token logits `[S, V]` of the last layer's output."""

    def ids(self, token_ids: Collection[int]) -> Tensor:
        """Token ids as a tensor where the embedding lives: `[S]`."""

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> TargetCache:
        """An empty cache for `layers` (all by default) with room for `capacity` tokens. It can go back to its
        beginning, and by at least `num_snapshots` tokens; by any number if no layer is recurrent."""

    def snapshot_bytes(self, layers: range) -> int:
        """Bytes of one snapshot of `layers`: of the states of recurrent ones; 0 where there are none."""

    def bytes_per_token(self, layers: range, head: bool) -> int:
        """Bytes of weights that one token's forward through `layers` reads; with `head`, what follows them too."""
