"""Medusa's heads: the target's last hidden state in, logits of the tokens after the next one out.

Head k (from 0) predicts the token k + 2 positions ahead of the hidden state's own; the target's head gives the one
before. A head is one or more residual blocks x + SiLU(W x + b) and a linear layer of its own, or the target's.

Source: arXiv 2401.10774; METHODS.md B. Must not know of trees, files or verdicts.
Shapes: M model width, K heads, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from spdbench.models.cpu.linear import Linear


@dataclass(frozen=True)
class MedusaWeights:
    """`blocks[k]` are the residual blocks of head k; `heads` one linear layer each, or a single one that all share.
    `token_ids_U` names the draft vocabulary, None where it is the target's own."""

    blocks: tuple[tuple[Linear, ...], ...]
    heads: tuple[Linear, ...]
    token_ids_U: Tensor | None

    @property
    def num_heads(self) -> int:
        return len(self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that one draft reads."""
        return sum(block.nbytes for head in self.blocks for block in head) + sum(head.nbytes for head in self.heads)

    def logits(self, normed_1M: Tensor, num_heads: int) -> Tensor:
        """Logits `[K, U]` of the first `num_heads` heads, from the hidden state after the final norm."""
        states = [self._through(normed_1M, blocks) for blocks in self.blocks[:num_heads]]
        if len(self.heads) == 1:
            return self.heads[0](torch.cat(states))
        return torch.cat([head(state) for head, state in zip(self.heads[:num_heads], states, strict=True)])

    def token_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft vocabulary indices as token ids, of the same shape."""
        return draft_ids if self.token_ids_U is None else self.token_ids_U[draft_ids]

    @staticmethod
    def _through(state_1M: Tensor, blocks: Sequence[Linear]) -> Tensor:
        for block in blocks:
            state_1M = state_1M + silu(block(state_1M))
        return state_1M
