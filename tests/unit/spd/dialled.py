"""A drafter with branches whose drafts are right where a dice says so, first drafts and those of deeper rows alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from spdbench.pipeline.schedule import Node
from spdbench_backends.spd.branches import BranchingDrafter
from spdbench_backends.spd.head import HeadWeights


class DialledDrafter(BranchingDrafter):
    """The target's next token, of `answer`, is the first choice of a newest row in half of all cases, and the second in
    a quarter; of a deeper row the first choice in a third."""

    def __init__(
        self,
        weights: HeadWeights,
        top_k: int,
        max_rows: int,
        *,
        redraft: bool,
        num_prompt: int,
        answer: Sequence[int],
    ) -> None:
        super().__init__(weights, top_k, max_rows, redraft=redraft)
        self.num_prompt = num_prompt
        self.answer = answer

    def rank(self, index: int, depth: int) -> int | None:
        """Of the right token among the choices of a row of this depth for new token `index`; None: it is the last."""
        dice = random.Random(f"{index}/{depth}").random()
        if depth:
            return 0 if dice < 1 / 3 else None
        return 0 if dice < 0.5 else 1 if dice < 0.75 else None

    def lag(self, index: int) -> int:
        """How many cycles new token `index` enters after the one before it."""
        rank = self.rank(index, 0)
        if rank is not None and rank < self._top_k:
            return 1
        again = range(1, self._full_depth - 1) if self._redraft else range(0)
        return next((depth + 1 for depth in again if self.rank(index, depth) == 0), self._full_depth)

    def is_right_late(self, index: int) -> bool:
        """True where a chain without branches would have been rejected."""
        return self.rank(index, 0) != 0 and self.lag(index) < self._full_depth

    def _logits(self, in_flight: Sequence[tuple[Node, int]], rows: Sequence[int]) -> Tensor:
        logits_RU = super()._logits(in_flight, rows).clone()
        on_path = {in_flight[0][0].id}  # the root is right
        for node, _ in in_flight:
            index = node.position - self.num_prompt
            if node.parent in on_path and index < len(self.answer) and node.token_id == self.answer[index]:
                on_path.add(node.id)
        for row, (node, depth) in zip(logits_RU, (in_flight[at] for at in rows), strict=True):
            index = node.position + 1 - self.num_prompt
            if node.id in on_path and index < len(self.answer):
                self._dial(row, self.answer[index], self.rank(index, depth))
        return logits_RU

    def _dial(self, logits_U: Tensor, token_id: int, rank: int | None) -> None:
        logits_U[token_id] = logits_U.min() - 1
        if rank is not None:
            above = logits_U.topk(rank + 1).values
            logits_U[token_id] = above[0] + 1 if rank == 0 else (above[rank - 1] + above[rank]) / 2
