"""A stage's layers over batches of nodes: which node lies in which slot of the cache, and which slots a row sees.

Slots hold nodes in the order in which the stage computed them. Those before `committed` belong to tokens known to be
right and are seen by every row; of the others a row sees its ancestors. A node is stale once it does not descend from
the newest root: its rows are not computed, and its slots are given up before the next batch, by moving those that stay
(`keep`). In a chain nothing has to move, and no mask is needed.

Every stage keeps this account by itself, as stages of other processes are ahead or behind.

Shapes: S rows, M model width, W slots of nodes that are not committed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from spdbench.models.attention_context import TreeRows
from spdbench.models.interface import TargetCache, TargetDecoder
from spdbench.pipeline.schedule import Node


class StageCache:
    """The cache of one stage for one sequence, whose first `num_prompt` tokens are computed."""

    def __init__(
        self,
        decoder: TargetDecoder,
        cache: TargetCache,
        layers: range,
        hidden_indices: Collection[int],
        num_prompt: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._layers = layers
        self._hidden_indices = hidden_indices
        self._committed = num_prompt
        self._nodes: list[int] = []  # of the slots behind the committed ones
        self._parents: dict[int, int | None] = {}

    def distance(self, node: Node, root: int) -> int | None:
        """How many tokens `node` is ahead of the root; None where it does not descend from it and so is stale. Ids rise
        from parent to child, so that a walk can end early; it needs the nodes in between to have been computed here, or
        to be in the batch of `node`."""
        self._parents[node.id] = node.parent
        at: int | None = node.id
        count = 0
        while at is not None and at > root:
            at = self._parents.get(at)
            count += 1
        return count if at == root else None

    def forward(
        self, rows_SM: Tensor, nodes: Sequence[Node], root: int, cancelled: Callable[[], bool] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The stage's output for the rows of living nodes, and their hidden states by index, each `[S, M]`.

        Raises:
            CancelledForwardError: `cancelled` returned true; the cache is unchanged.
        """
        self._parents |= {node.id: node.parent for node in nodes}
        self._give_up(root)
        mark, start = self._committed, nodes[0].position
        slot_of = {node: slot for slot, node in enumerate(self._nodes)}
        seen = [self._ancestors(node, slot_of) for node in nodes]
        tree = None
        if len(nodes) == 1 and len(seen[0]) == len(slot_of):
            assert mark + len(slot_of) == start  # a chain
        else:
            visible_SW = torch.zeros(len(nodes), len(slot_of) + len(nodes), dtype=torch.bool)
            for row, slots in enumerate(seen):
                visible_SW[row, [*slots, len(slot_of) + row]] = True
            tree, start = TreeRows(torch.tensor([node.position - mark for node in nodes]), visible_SW), mark
        found = self._decoder.forward(
            rows_SM, start, self._cache, self._layers, self._hidden_indices, tree=tree, cancelled=cancelled
        )
        self._nodes += [node.id for node in nodes]
        return found

    def _ancestors(self, node: Node, slot_of: dict[int, int]) -> list[int]:
        slots, at = [], node.parent
        while at in slot_of:
            slots.append(slot_of[at])
            at = self._parents[at]
        return slots

    def _give_up(self, root: int) -> None:
        """Forgets the slots of stale nodes, and commits those of the root and of its ancestors."""
        path, at = {root}, self._parents.get(root)
        while at is not None:
            path.add(at)
            at = self._parents.get(at)
        kept: list[int] = []
        living = {root}
        for slot, node in enumerate(self._nodes):
            if self._parents[node] in living:
                living.add(node)
            if node in living or node in path:
                kept.append(slot)
        if len(kept) < len(self._nodes):
            self._cache.keep(self._committed, kept)
            self._nodes = [self._nodes[slot] for slot in kept]
        done = sum(node in path for node in self._nodes)
        assert all(node in path for node in self._nodes[:done])  # they are older than what descends from them
        self._committed += done
        del self._nodes[:done]
        known = {*self._nodes, root}
        self._parents = {node: parent for node, parent in self._parents.items() if node in known or node > root}
