"""`recycling`: token recycling. The draft is a tree of the tokens that the target last found likely after each token.

Needs no head: the target's logits, which verification computes anyway, say for each token which others may follow it.
Source: Luo et al., Turning Trash into Treasure, arXiv 2408.08696: a table of each token's last top-k successors, and a
static tree that is filled in from it, level by level. The paper's tree has 80 nodes; here only as many of its nodes are
drafted, the most probable first, as earn their rows. Before the target was asked about a token, the table holds what
follows it in the prompt.

Shapes: N nodes of a tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from spdbench.types import GenerationRequest
from spdbench_backends.drafting import Lookup
from spdbench_backends.weighing import Rates, WeighedOptions, worthwhile

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter
    from spdbench.decoding.tree import Path

PRIOR = 0.35
"""The rate at which the first candidate is right before any was seen."""
PRIOR_DECAY = 0.35
"""That of each further candidate, relative to the one before."""
MARGIN = 7.0
"""Candidates lie within this distance of the best logit: others have less than a thousandth of its probability."""


class Recycling(Lookup):
    """Token recycling: drafts a tree of the tokens that the target last found likely after each token."""

    method, drafts_are, learns = "recycling", "recycled tokens", True

    class Options(WeighedOptions):
        nodes: int = Field(24, ge=1, le=256, description="nodes of the static tree, drafted at most")
        depth: int = Field(6, ge=1, le=16, description="its levels")
        earlier_answers: bool = Field(
            False,
            description="also look at earlier answers of the run, with --repeats those to the same prompt, so that "
            "acceptance says little; results then depend on the order of prompts",
        )
        top_k: int = Field(4, ge=1, le=16, description="successors that are kept of each token")

    _options: Options

    def _set_up(self) -> None:
        from spdbench.decoding.tree_choice import best_paths

        options = self._options
        by_rank = [PRIOR * PRIOR_DECAY**rank for rank in range(options.top_k if self._decoder.takes_trees else 1)]
        self._paths = [path for path, _ in best_paths([by_rank] * options.depth, options.nodes)]
        self._table: dict[int, list[int]] = {}
        self._chosen = {**self._chosen, "drafts_from": options.memory}

    @property
    def _max_nodes(self) -> int:
        return len(self._paths) + 1

    def _new_drafter(self, request: GenerationRequest) -> Drafter:  # noqa: ARG002
        options = self._options
        table = self._table if options.earlier_answers else {}
        return RecyclingDrafter(table, self._paths, options.top_k, options.row_cost, self._decoder)


class RecyclingDrafter:
    """The table, as one request finds and changes it: token -> its candidates, the likeliest first."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(
        self, table: dict[int, list[int]], paths: Sequence[Path], top_k: int, row_cost: float, decoder: Any
    ) -> None:
        self.max_nodes = len(paths) + 1
        self._table, self._paths, self._top_k, self._row_cost = table, paths, top_k, row_cost
        self._decoder = decoder
        self._rates: Rates[int] = Rates(lambda rank: PRIOR * PRIOR_DECAY**rank)
        self._root = 0
        self._observed: list[tuple[int, list[int]]] = []

    def start(self, prompt_ids: Sequence[int], features: object, root: int) -> None:  # noqa: ARG002
        for token, successor in pairwise((*prompt_ids, root)):
            known = self._table.get(token, [])
            self._table[token] = [successor, *(other for other in known if other != successor)][: self._top_k]
        self._root = root

    def propose(self, max_levels: int, sampler: object) -> Any:  # noqa: ARG002
        from spdbench.decoding.tree import DraftTree, Tree, chain

        ids, parents, levels, chances = self._filled(max_levels)
        count = worthwhile(chances[1:], self._row_cost) + 1
        ids_N = self._decoder.ids(ids[:count])
        if all(parent == node - 1 for node, parent in enumerate(parents[:count])):
            return DraftTree(chain(count - 1, ids_N.device), ids_N)
        return DraftTree(Tree(self._decoder.ids(parents[:count]), max(levels[:count])), ids_N)

    def observe(self, accepted_ids: Sequence[int], logits_NV: Any) -> None:
        """Keeps the likeliest tokens for the table, which `accept` changes after it has weighed the old ones."""
        self._observed = list(zip((self._root, *accepted_ids), likeliest(logits_NV, self._top_k), strict=True))

    def accept(self, token_ids: Sequence[int], features: object) -> None:  # noqa: ARG002
        for token, successor in pairwise((self._root, *token_ids)):
            for rank, candidate in enumerate(self._table.get(token, ())):
                self._rates.add(rank, right=candidate == successor)
        self._table.update(self._observed)
        self._root = token_ids[-1]

    def _filled(self, max_levels: int) -> tuple[list[int], list[int], list[int], list[float]]:
        """The static tree filled in from the table, as far as it has candidates: ids, parents, levels and chances by
        node, the root first."""
        ids, parents, levels, chances = [self._root], [-1], [0], [1.0]
        node_of: dict[Path, int] = {(): 0}
        for path in self._paths:
            parent, rank = node_of.get(path[:-1]), path[-1]
            candidates = [] if parent is None else self._table.get(ids[parent], [])
            if parent is not None and len(path) <= max_levels and rank < len(candidates):
                node_of[path] = len(ids)
                ids.append(candidates[rank])
                parents.append(parent)
                levels.append(len(path))
                chances.append(chances[parent] * self._rates[rank])
        return ids, parents, levels, chances


def likeliest(logits_NV: Any, top_k: int) -> list[list[int]]:
    """Up to `top_k` ids of each row, the likeliest first.

    On a CPU by numpy, in one thread: torch's threads, once woken, delay the next forward's kernels (see `argmax`).
    """
    import torch

    if logits_NV.device.type != "cpu":
        found: list[list[int]] = logits_NV.topk(top_k, dim=-1).indices.tolist()
        return found
    rows = []
    for logits_V in logits_NV:
        if logits_V.dtype == torch.bfloat16:  # numpy has none: these are the upper halves of float32 numbers
            bits_V = logits_V.view(torch.uint16).numpy().astype(np.uint32)
            values_V = (bits_V << 16).view(np.float32)
        else:
            values_V = logits_V.numpy()
        near = np.flatnonzero(values_V >= values_V.max() - MARGIN)
        rows.append(near[np.argsort(-values_V[near], kind="stable")[:top_k]].tolist())
    return rows
