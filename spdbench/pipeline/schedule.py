"""The pipeline's schedule as a pure state machine: which nodes are in which stage, cycle by cycle.

A node is a token at a position with its parent. Nodes in flight form a tree: its root is the newest token that is known
to be right, every other node is a draft, and a node lives as long as the root is among its ancestors. Nodes that enter
together are a batch. A batch enters stage 0, moves one stage a cycle, and leaves the last stage; of a chain of drafts
every batch has one node. A draft may follow any node in flight, so that a branch can begin late. When the root leaves
the last stage, the target's token after it is known: the child with that token is the new root, and what does not
descend from it is dropped. No tensors, clocks, processes, drafters or stop rules are involved.

A cycle: read `cycle()`; `draft` the nodes that enter next, if any; run every stage's batch; then end it with exactly
one of `fill` (the root did not complete), `accept` (a child of the completed root was right) or `restart` (all were
wrong, or there was none: everything in flight is dropped and the target's own token enters).

Source of the rules: SPD, arXiv 2605.30852, section on pipelined decoding. Of a chain they are the same;
branches are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A token at a position. `parent` is the id of the node before it, None for the first one of a sequence. Ids rise
    in the order of entry."""

    id: int
    parent: int | None
    token_id: int
    position: int


Batch = tuple[Node, ...]
"""Nodes that move together, one a row; empty where a stage idles."""


@dataclass(frozen=True)
class Cycle:
    """What the stages do at the same time: `stages[s]` is stage s's batch. `root` is the newest token known to be
    right."""

    stages: tuple[Batch, ...]
    root: Node

    @property
    def completing(self) -> Node | None:
        """The root, if it leaves the last stage at the end of this cycle. Nothing else can, as it entered later."""
        return self.root if self.stages[-1] else None

    @property
    def newest(self) -> Node | None:
        """The first node in stage 0: of a chain, its newest token."""
        return self.stages[0][0] if self.stages[0] else None

    def work(self) -> Iterator[tuple[int, Batch]]:
        """Busy stages with their batches, the last stage first: each reads what its predecessor wrote a cycle ago."""
        for stage in reversed(range(len(self.stages))):
            if self.stages[stage]:
                yield stage, self.stages[stage]


@dataclass(frozen=True)
class Change:
    """How a cycle ended: the `root` from now on, the nodes that were `dropped` (drafts of this cycle included), and
    those `entering` stage 0."""

    root: Node
    dropped: Batch
    entering: Batch


class PipelineSchedule:
    """The nodes in flight of one sequence."""

    def __init__(self, num_stages: int) -> None:
        if num_stages < 1:
            raise ValueError(f"a pipeline needs a stage, not {num_stages}")
        self.num_stages = num_stages
        self._stages: list[Batch] = [()] * num_stages
        self._drafted: Batch = ()
        self._root: Node | None = None
        self._num_nodes = 0

    def start(self, token_id: int, position: int) -> Node:
        """Empties the pipeline and puts a token that the target emitted into stage 0."""
        self._root = self._new_node(token_id, position, None)
        self._stages = [(self._root,), *[()] * (self.num_stages - 1)]
        self._drafted = ()
        return self._root

    def cycle(self) -> Cycle:
        """This cycle's work."""
        return Cycle(tuple(self._stages), self._known_root)

    def draft(self, drafts: Sequence[tuple[Node, int]]) -> Batch:
        """The nodes that enter at the end of this cycle unless it drops them: tokens after nodes in flight."""
        taken = {(node.parent, node.token_id) for node in self._in_flight()}
        living = {node.id for node in self._in_flight()}
        for parent, token_id in drafts:
            if parent.id not in living:
                raise ValueError("a draft needs a parent in flight")
            if (parent.id, token_id) in taken:
                raise ValueError(f"token {token_id} after node {parent.id} was drafted already")
            taken.add((parent.id, token_id))
        self._drafted = tuple(self._new_node(token_id, parent.position + 1, parent.id) for parent, token_id in drafts)
        return self._drafted

    def children(self) -> Batch:
        """The drafts that the completing node's logits verify, the first drafted first."""
        completing = self._completing
        if completing is None:
            return ()
        nodes = [*self._in_flight(), *self._drafted]
        return tuple(sorted((node for node in nodes if node.parent == completing.id), key=lambda node: node.id))

    def fill(self) -> Change:
        """Ends a cycle that completed nothing."""
        if self._completing is not None:
            raise ValueError("a node completed: accept a child or restart")
        return self._end(self._known_root)

    def accept(self, child: Node) -> Change:
        """Ends a cycle whose completed node has `child` as its right successor."""
        if self._completing is None:
            raise ValueError("no node completed: there is nothing to accept")
        if child not in self.children():
            raise ValueError("only a child of the completed node can be accepted")
        return self._end(child)

    def restart(self, token_id: int) -> Change:
        """Ends a cycle whose completed node's children were wrong or missing; `token_id` is the target's own."""
        completing = self._completing
        if completing is None:
            raise ValueError("no node completed: there is nothing to correct")
        own = self._new_node(token_id, completing.position + 1, completing.id)
        dropped = tuple(node for node in (*self._in_flight(), *self._drafted) if node is not completing)
        self._root, self._drafted = own, ()
        self._stages = [(own,), *[()] * (self.num_stages - 1)]
        return Change(own, dropped, (own,))

    @property
    def _known_root(self) -> Node:
        if self._root is None:
            raise ValueError("no sequence was started")
        return self._root

    @property
    def _completing(self) -> Node | None:
        return self._stages[-1][0] if self._stages[-1] else None

    def _in_flight(self) -> Iterator[Node]:
        """All nodes in the stages, parents before children."""
        for batch in reversed(self._stages):
            yield from batch

    def _end(self, root: Node) -> Change:
        """Drops what does not descend from `root`; everything else moves on."""
        completing, living = self._completing, {root.id}
        dropped: list[Node] = []
        for node in (*self._in_flight(), *self._drafted):
            if node.parent in living:
                living.add(node.id)
            elif node.id != root.id and node is not completing:
                dropped.append(node)
        entering, *moving = (
            tuple(node for node in batch if node.id in living) for batch in (self._drafted, *self._stages[:-1])
        )
        self._root, self._drafted = root, ()
        self._stages = [entering, *moving]
        return Change(root, tuple(dropped), entering)

    def _new_node(self, token_id: int, position: int, parent: int | None) -> Node:
        node = Node(self._num_nodes, parent, token_id, position)
        self._num_nodes += 1
        return node
