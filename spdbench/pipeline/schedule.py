"""The pipeline's schedule as a pure state machine: which node is in which stage, cycle by cycle.

A node is a token at a position with its parent. One enters stage 0, moves one stage a cycle, and leaves the last stage
with the target's verdict on its child. No tensors, clocks, processes, drafters or stop rules are involved.

A cycle: read `cycle()`; draft a child of the node in stage 0 if one is needed; run every stage's node; then end it with
exactly one of `fill` (nothing completed), `accept` (the completed node's child was right) or `restart` (it was wrong or
missing: everything in flight is dropped and the target's own token enters).

Source of the rules: SPD, arXiv 2605.30852, section on pipelined decoding; SPD.md section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A token at a position. `parent` is the id of the node before it; None for one that the target itself emitted."""

    id: int
    parent: int | None
    token_id: int
    position: int


@dataclass(frozen=True)
class Cycle:
    """What the stages do at the same time: `stages[s]` is stage s's node, None where the stage idles.

    `completing` leaves the last stage at the end of this cycle; `child` is the node in flight that its logits verify.
    """

    stages: tuple[Node | None, ...]
    completing: Node | None
    child: Node | None

    def work(self) -> Iterator[tuple[int, Node]]:
        """Busy stages with their nodes, the last stage first: each reads what its predecessor wrote a cycle ago."""
        for stage in reversed(range(len(self.stages))):
            node = self.stages[stage]
            if node is not None:
                yield stage, node


class PipelineSchedule:
    """The nodes in flight of one sequence."""

    def __init__(self, num_stages: int) -> None:
        if num_stages < 1:
            raise ValueError(f"a pipeline needs a stage, not {num_stages}")
        self.num_stages = num_stages
        self._stages: list[Node | None] = [None] * num_stages
        self._num_nodes = 0

    def start(self, token_id: int, position: int) -> Node:
        """Empties the pipeline and puts a token that the target emitted into stage 0."""
        self._stages = [None] * self.num_stages
        return self._enter(token_id, position, None)

    def cycle(self) -> Cycle:
        """This cycle's work."""
        completing = self._stages[-1]
        child = None
        if completing is not None:
            child = next((node for node in self._stages if node and node.parent == completing.id), None)
        return Cycle(tuple(self._stages), completing, child)

    def fill(self, draft: int | None) -> Node | None:
        """Ends a cycle that completed nothing; `draft` enters as stage 0's node's child, None leaves stage 0 empty."""
        if self._stages[-1] is not None:
            raise ValueError("a node completed: accept its child or restart")
        return self._shift(draft)

    def accept(self, draft: int | None) -> Node | None:
        """Ends a cycle whose completed node's child was right; that child is now the oldest."""
        if self._stages[-1] is None:
            raise ValueError("no node completed: there is nothing to accept")
        return self._shift(draft)

    def restart(self, token_id: int) -> Node:
        """Ends a cycle whose completed node's child was wrong or missing; `token_id` is the target's own."""
        completing = self._stages[-1]
        if completing is None:
            raise ValueError("no node completed: there is nothing to correct")
        return self.start(token_id, completing.position + 1)

    def _shift(self, draft: int | None) -> Node | None:
        parent = self._stages[0]
        self._stages = [None, *self._stages[:-1]]
        if draft is None:
            return None
        if parent is None:
            raise ValueError("a draft needs a parent in stage 0")
        return self._enter(draft, parent.position + 1, parent.id)

    def _enter(self, token_id: int, position: int, parent: int | None) -> Node:
        node = Node(self._num_nodes, parent, token_id, position)
        self._num_nodes += 1
        self._stages[0] = node
        return node
