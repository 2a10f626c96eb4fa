"""Medusa's heads, from their file to weights that fit a target, and the drafter that fills a tree with what they say.

Head k (from 0) predicts the token k + 2 positions after the target's last hidden state; the target's own head predicts
the one before. A head is one or more residual blocks x + SiLU(W x + b) and a linear layer of its own, or the target's.
One hidden state so gives candidates for all levels, which do not depend on the tokens between.

Source: arXiv 2401.10774.
Shapes: M model width, K heads, k candidates of each, S rows, U draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from spdbench.decoding.sampling import DraftVocabulary, Sampler
from spdbench.decoding.speculate import Features
from spdbench.decoding.tree import DraftTree, lone_root
from spdbench.decoding.tree_builder import Candidates, StaticTreeBuilder
from spdbench.decoding.verify import Draft
from spdbench.models.attention_context import TreeRows
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors
from spdbench.models.cpu.linear import Linear
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import top_k
from spdbench_backends.drafter_files.tensors import (
    TargetTensors,
    draft_vocabulary,
    random_tensors,
    require_target,
)
from spdbench_backends.medusa.formats import NAMES, SHARED, TOKEN_MAP, MedusaConfig, MedusaFile


@dataclass(frozen=True)
class MedusaWeights:
    """`blocks[k]` are the residual blocks of head k; `heads` holds one linear layer for each, or one that all share.
    `vocabulary` is what they draft from."""

    blocks: tuple[tuple[Linear, ...], ...]
    heads: tuple[Linear, ...]
    vocabulary: DraftVocabulary

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

    @staticmethod
    def _through(state_1M: Tensor, blocks: Sequence[Linear]) -> Tensor:
        for block in blocks:
            state_1M = state_1M + silu(block(state_1M))
        return state_1M


def build_medusa(file: MedusaFile, target: Decoder) -> MedusaWeights:
    """The heads for `target`.

    Raises:
        InputError: made for another hidden size, vocabulary or family; a tensor is unknown, missing or misshapen.
    """
    base, config = target.config, file.config
    require_target(
        file,
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
        ("config.target_family", config.target_family, base.family),
    )
    source = f"tensor {TOKEN_MAP}" if file.layout == "vllm" else "config.draft_token_ids"
    vocabulary = draft_vocabulary(file, config.draft_token_ids, target, source=source, ascending=False)
    longest = max(map(len, config.head_accuracies), default=0)
    if longest > vocabulary.size:
        raise file.error(f"head_accuracies are of {longest} ranks, but {vocabulary.size} tokens are drafted")
    blocks = file.block_names(file.layout)
    expected = _expected(blocks, file.layout, target)
    shared = SHARED in file.tensors and file.layout in ("vllm", "spdbench")
    linears = [SHARED] if shared else file.head_names(file.layout)
    expected.add(dict.fromkeys(linears, (vocabulary.size, base.hidden_size)), optional=True)
    tensors = TargetTensors(file, expected, target)
    own = tuple(tensors.linear(name.removesuffix("weight")) for name in linears if name in tensors)
    return MedusaWeights(
        blocks=tuple(tuple(tensors.linear(name) for name in head) for head in blocks),
        heads=own or (tensors.target_head(vocabulary),),
        vocabulary=vocabulary,
    )


def _expected(blocks: list[list[str]], layout: str, target: Decoder) -> ExpectedTensors:
    """The tensors of all residual blocks."""
    width, names = target.config.hidden_size, list(chain.from_iterable(blocks))
    expected = ExpectedTensors({name + "weight": (width, width) for name in names})
    expected.add({name + "bias": (width,) for name in names}, optional=not NAMES[layout].bias)
    return expected


def random_medusa(target: Decoder, num_heads: int, seed: int) -> MedusaFile:
    """Untrained heads of one block each: matrices drawn from N(0, 0.02²), biases of zeros, the target's head."""
    base = target.config
    config = MedusaConfig(
        hidden_size=base.hidden_size, vocab_size=base.vocab_size, target_family=base.family, trained_tokens=0
    )
    names = [[NAMES["v2"].block.format(head=k, block=0)] for k in range(num_heads)]
    shapes = _expected(names, "v2", target).required  # a layout whose blocks all have a bias
    return MedusaFile(Path("random"), "spdbench", config, random_tensors(shapes, seed))


class MedusaDrafter:
    """The heads' drafts for one request."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(
        self,
        weights: MedusaWeights,
        target: Decoder,
        builder: StaticTreeBuilder,
        captured: CapturedFunction | None = None,
        *,
        draws: bool = False,
    ) -> None:
        """`captured` is what `capture_draft` gave for the same weights, target and builder. `draws`: drafts of a chain
        are drawn; a captured draft picks them all the same."""
        self.max_nodes = builder.max_nodes
        self._weights = weights
        self._target = target
        self._builder = builder
        self._captured = captured
        self._draws = draws
        self._hidden: Tensor | None = None
        self._root = 0

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:  # noqa: ARG002
        self.accept((root,), features)

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        root_1 = self._target.ids((self._root,))
        if max_levels < 1:
            return lone_root(root_1)
        assert self._hidden is not None
        if self._captured is not None:  # all levels, however few will count
            (ids_N,) = self._captured(self._hidden, root_1)
            return DraftTree(self._builder.tree, ids_N)
        if self._draws:
            return draw_chain(self._weights, self._target, self._builder, self._hidden, root_1, max_levels, sampler)
        return draft_tree(self._weights, self._target, self._builder, self._hidden, root_1, max_levels)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        """Keeps the hidden state from which the new root was chosen."""
        self._hidden, self._root = features.hidden[-1:], token_ids[-1]


def draft_tree(
    weights: MedusaWeights,
    target: Decoder,
    builder: StaticTreeBuilder,
    hidden_1M: Tensor,
    root_1: Tensor,
    max_levels: int,
) -> DraftTree:
    """One round: a tree after the token `root_1`, which the target chose from `hidden_1M`."""
    levels = min(max_levels, builder.num_levels)
    logits_KU = weights.logits(target.normed(hidden_1M), levels)
    _, best_Kk = top_k(logits_KU, builder.num_ranks)
    return builder.build_tree(_ByLevel(weights.vocabulary.to_target(best_Kk)), root_1, levels)


def draw_chain(
    weights: MedusaWeights,
    target: Decoder,
    builder: StaticTreeBuilder,
    hidden_1M: Tensor,
    root_1: Tensor,
    max_levels: int,
    sampler: Sampler,
) -> DraftTree:
    """As `draft_tree` for a chain, with a draw from each head. No head knows what the others draw, so a draft has the
    same distribution whichever are before it."""
    tree = builder.tree.cut(max_levels)
    logits_KU = weights.logits(target.normed(hidden_1M), tree.num_levels)
    drafts = [Draft.from_logits(logits_U, sampler).in_target(weights.vocabulary) for logits_U in logits_KU]
    ids_K = torch.tensor([draft.token_id for draft in drafts], device=root_1.device)
    drawn = tuple(draft.probabilities_V for draft in drafts if draft.probabilities_V is not None)
    return DraftTree(tree, torch.cat((root_1, ids_K)), drawn)


def capture_draft(weights: MedusaWeights, target: Decoder, builder: StaticTreeBuilder) -> CapturedFunction:
    """`draft_tree` with all levels: from the hidden state `[1, M]` and the root `[1]` to the ids `[N]`."""

    def draft(_bucket: int, hidden_1M: Tensor, root_1: Tensor) -> tuple[Tensor, ...]:
        return (draft_tree(weights, target, builder, hidden_1M, root_1, builder.num_levels).ids_N,)

    with torch.inference_mode():
        hidden_1M = torch.zeros(1, target.config.hidden_size, dtype=target.dtype, device=target.device)
        root_1 = torch.zeros(1, dtype=torch.long, device=target.device)
        return CapturedFunction(CudaGraphs(target.device), draft, (hidden_1M, root_1))


class _ByLevel:
    """Proposes the same candidates after every row of a level. Static trees ask for no scores."""

    def __init__(self, ids_Kk: Tensor) -> None:
        self._ids_Kk = ids_Kk
        self._level = 0

    def first(self, count: int) -> Candidates:
        ids_1k = self._ids_Kk[self._level : self._level + 1, :count]
        return Candidates(ids_1k, ids_1k)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:  # noqa: ARG002
        self._level += 1
        ids_Sk = self._ids_Kk[self._level, :count].expand(len(ids_S), count)
        return Candidates(ids_Sk, ids_Sk)
