"""The drafter of a pipeline with branches: several drafts after each of the newest nodes (`draft_top_k`), and new ones
after older nodes (`redraft`).

In every cycle all nodes in flight pass the draft layers again, each as deep as it has come, with the mask of their
tree. So a row of an older node says more of the next token than it did when that token was drafted; with `redraft` the
head is applied to it once more, and where its first choice is none of the drafts after the node, it becomes one. Not in
the last stage, whose own verdict comes at the same time.

Of all candidates those enter that are most likely on the whole way from the root, by the newest row of each node on it,
up to `max_rows` in a cycle. At a temperature they are picked likewise, not drawn: the verdict on picked siblings is
exact, whichever are left out (`decoding.verify.verify_siblings`).

Shapes: S rows, R rows with logits, C candidates, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.models.attention_context import TreeRows
from spdbench.pipeline.schedule import Change, Cycle, Node
from spdbench_backends.spd.drafter import HeadDrafter, Proposal
from spdbench_backends.spd.head import AnchoredModule, HeadWeights
from spdbench_backends.spd.plan import Row

Key = tuple[int, int]
"""A draft as the id of its parent and its token: it has no id of its own before it enters."""


class BranchingDrafter(HeadDrafter):
    """The Pipeline Draft Module over a tree of nodes in flight; for heads that read each row as deep as it has come."""

    def __init__(self, weights: HeadWeights, top_k: int, max_rows: int, *, redraft: bool) -> None:
        super().__init__(weights)
        self.max_rows = max_rows
        self._top_k = top_k
        self._redraft = redraft
        self._full_depth = weights.plan.full_depth
        self._ring_size = (max_rows + 2) * (self._full_depth + 1)
        self._module: AnchoredModule | None = None
        self._root: Node | None = None
        self._completed: list[Node] = []  # since the last cycle
        self._ring_rows: dict[int, int] = {}  # by node, for those with features
        self._log_likely: dict[Key, float] = {}  # after its parent, as its newest row says
        self._columns: dict[Key, int] = {}  # in the draft vocabulary

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        spare = self.max_rows * (self._full_depth + 1)
        module = self._weights.new_module(capacity + spare, self._ring_size)
        assert isinstance(module, AnchoredModule)
        module.start(prompt_length, states, prompt_length)
        self._module = module

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        assert self._module is not None
        if node.id not in self._ring_rows:
            self._ring_rows[node.id] = min(set(range(self._ring_size)).difference(self._ring_rows.values()))
        self._module.observe(self._ring_rows[node.id], states)

    def successors(self, cycle: Cycle, can_continue: Callable[[Node], bool], sampler: Sampler) -> Sequence[Proposal]:  # noqa: ARG002
        if self._root is not None and self._root is not cycle.root:
            self._completed.append(self._root)
        self._root = cycle.root
        in_flight = [(node, stage) for stage, batch in cycle.work() for node in batch]
        asked = [
            (number, node)
            for number, (node, stage) in enumerate(in_flight)
            if can_continue(node) and (stage == 0 or (self._redraft and stage < self._full_depth - 1))
        ]
        if not asked:  # what has completed meanwhile waits for the next row
            return ()
        log_likely_RU = self._logits(in_flight, [number for number, _ in asked]).float().log_softmax(-1)
        candidates = self._candidates([node for _, node in asked], [node for node, _ in in_flight], log_likely_RU)
        chosen = sorted(candidates, key=lambda found: -found[0])[: self.max_rows]
        return [Proposal(parent, Draft(token_id)) for _, parent, token_id in chosen]

    def drop(self, change: Change) -> None:
        for node in change.dropped:
            self._forget(node)

    def _logits(self, in_flight: Sequence[tuple[Node, int]], rows: Sequence[int]) -> Tensor:
        """Draft logits `[R, U]` after some of the nodes in flight. The rows of completed nodes stay in the cache."""
        assert self._module is not None
        num_done = len(self._completed)
        depths = [(node, self._full_depth) for node in self._completed] + list(in_flight)
        found = self._module.logits_of(
            [Row(node.position, depth, self._ring_rows[node.id]) for node, depth in depths],
            [num_done + row for row in rows],
            _tree_rows([node for node, _ in depths]),
        )
        for node in self._completed:
            self._forget(node)
        self._completed.clear()
        return found

    def _candidates(
        self, asked: Sequence[Node], in_flight: Sequence[Node], log_likely_RU: Tensor
    ) -> list[tuple[float, Node, int]]:
        """(log-likelihood on the way from the root, parent, token) of new nodes after those `asked`."""
        row_of = {node.id: row for row, node in enumerate(asked)}
        drafted: dict[int, set[int]] = {node.id: set() for node in asked}
        again = [node for node in in_flight if node.parent in row_of]  # drafts after a node whose row is deeper now
        if again:
            rows = [row_of[node.parent or 0] for node in again]
            found = log_likely_RU[rows, [self._columns[_key(node)] for node in again]]
            for node, log_likely in zip(again, found.tolist(), strict=True):
                self._log_likely[_key(node)] = log_likely
                drafted[node.parent or 0].add(node.token_id)
        root, on_the_way = in_flight[0], {in_flight[0].id: 0.0}
        for node in in_flight:  # parents come first
            if node is not root:
                on_the_way[node.id] = on_the_way[node.parent or 0] + self._log_likely[_key(node)]
        best_RC = log_likely_RU.topk(min(log_likely_RU.shape[1], self._top_k), dim=-1)
        tokens_RC = self._weights.vocabulary.to_target(best_RC.indices)
        parts = (part.tolist() for part in (tokens_RC, best_RC.indices, best_RC.values))
        candidates = []
        for node, *choices in zip(asked, *parts, strict=True):
            count = 1 if drafted[node.id] else self._top_k
            for token_id, column, log_likely in list(zip(*choices, strict=True))[:count]:
                if token_id not in drafted[node.id]:
                    self._log_likely[node.id, token_id], self._columns[node.id, token_id] = log_likely, column
                    candidates.append((on_the_way[node.id] + log_likely, node, token_id))
        return candidates

    def _forget(self, node: Node) -> None:
        self._ring_rows.pop(node.id, None)
        self._log_likely.pop(_key(node), None)
        self._columns.pop(_key(node), None)


def _key(node: Node) -> Key:
    return node.parent or 0, node.token_id


def _tree_rows(nodes: Sequence[Node]) -> TreeRows | None:
    """Which of the rows `nodes` each row sees: its ancestors and itself. None for a chain."""
    row_of = {node.id: row for row, node in enumerate(nodes)}
    visible_SS = torch.eye(len(nodes), dtype=torch.bool)
    for row, node in enumerate(nodes):
        if node.parent in row_of:
            visible_SS[row] |= visible_SS[row_of[node.parent]]
    if int(visible_SS.sum()) == len(nodes) * (len(nodes) + 1) // 2:
        return None
    return TreeRows(visible_SS.sum(dim=1) - 1, visible_SS)
