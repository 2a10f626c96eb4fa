"""Drafters with a given acceptance: `oracle:P` and `forced:P` (docs/metrics.md, "Synthetic drafters").

Decisions depend on the seed, the prompt and the position alone, so that every backend meets the same ones. Where the
acceptance differs by position, they depend on the draft's depth as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.drafter_choice import DrafterChoice
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree, lone_root
from spdbench.decoding.tree_builder import Candidates, TreeBuilder
from spdbench.decoding.verify import Draft
from spdbench.errors import InputError
from spdbench.models.attention_context import TreeRows
from spdbench.models.interface import TargetDecoder
from spdbench.types import GenerationRequest, Sampling


@dataclass(frozen=True)
class SyntheticDrafts:
    """The drafts of one request. Index t counts new tokens, t = 0 being the one that prefill gives.

    `reference` is what plain decoding emits (empty for `forced`). `oracle` drafts the reference's token with
    probability P and another one otherwise; `forced` drafts arbitrary tokens and forces the verdicts.
    """

    choice: DrafterChoice
    seed: int
    digest: bytes
    reference: tuple[int, ...]
    vocab_size: int
    eos_ids: frozenset[int]
    _positions: list[int] = field(default_factory=lambda: [1, 1], compare=False, repr=False)
    """In a pipeline by index, as far as they were needed."""

    def token(self, index: int, position: int = 1) -> int:
        """The draft for new token `index`, at `position` of its draft."""
        if self.choice.kind == "forced":
            return self._ordinary(int.from_bytes(self._hash(index, b"token")[:4], "little"))
        if index >= len(self.reference):  # after a wrong draft, where no draft can be right
            return self._ordinary(index)
        right = self.reference[index]
        return right if self.favourable(index, position) else (right + 1) % self.vocab_size

    def draft(self, index: int) -> Draft:
        """A pipeline's draft for new token `index`, with its forced verdict, None where verification decides. Its
        position is the number of verdicts since the last rejection."""
        position = self._position(index) if len(self.choice.rates) > 1 else 1
        verdict = self.favourable(index, position) if self.choice.kind == "forced" else None
        return Draft(self.token(index, position), forced_verdict=verdict)

    def drafts(self, index: int, count: int) -> list[Draft]:
        """`count` different drafts of a pipeline for new token `index`: `draft`'s first, then `siblings`."""
        position = self._position(index) if len(self.choice.rates) > 1 else 1
        return [self.draft(index), *map(Draft, self.siblings(index, count, position)[1:])]

    def siblings(self, index: int, count: int, position: int = 1) -> list[int]:
        """`count` different drafts for new token `index`: `token`'s first, then tokens that are wrong for certain."""
        first = self.token(index, position)
        right = self.reference[index] if index < len(self.reference) else first
        others = (token % self.vocab_size for token in range(first + 1, first + count + 1))
        return [first, *[token for token in others if token != right][: count - 1]]

    def favourable(self, index: int, position: int = 1) -> bool:
        """The decision for new token `index`: true with the probability that holds at `position`."""
        draw = int.from_bytes(self._hash(index, b"verdict")[:8], "little") / 2**64
        rates = self.choice.rates
        return draw < rates[min(position, len(rates)) - 1]

    def forced_verdicts(self, index: int, count: int) -> list[bool] | None:
        """The verdicts on a draft of `count` new tokens from `index` on, or None where verification decides."""
        forced = self.choice.kind == "forced"
        return [self.favourable(index + at, at + 1) for at in range(count)] if forced else None

    def _position(self, index: int) -> int:
        """Of the verdict on new token `index` since the last rejection. Index 1 gets the first verdict."""
        positions = self._positions
        while len(positions) <= index:
            last = len(positions) - 1
            positions.append(positions[-1] + 1 if self.favourable(last, positions[-1]) else 1)
        return positions[index]

    def _hash(self, index: int, purpose: bytes) -> bytes:
        words = b"%d:%d:" % (self.seed, index)
        return hashlib.blake2b(words + purpose + self.digest, digest_size=8).digest()

    def _ordinary(self, number: int) -> int:
        """A token id that does not end the sequence."""
        token = number % self.vocab_size
        while token in self.eos_ids and len(self.eos_ids) < self.vocab_size:
            token = (token + 1) % self.vocab_size
        return token


class SyntheticDrafter:
    """The drafter behind `oracle:P` and `forced:P` in rounds, and the proposer of its own trees: at every level the
    dialled draft is the first child of the first node, and the candidates of all other ranks are wrong."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, drafts: SyntheticDrafts, builder: TreeBuilder, device: torch.device) -> None:
        require_depth(drafts.choice, builder.num_levels)
        self.max_nodes = builder.max_nodes
        self._drafts = drafts
        self._builder = builder
        self._device = device
        self._index = 0  # of the root among the new tokens
        self._root = 0
        self._level = 0  # of the candidates proposed last

    def start(self, prompt_ids: Sequence[int], features: object, root: int) -> None:  # noqa: ARG002
        self._root = root

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:  # noqa: ARG002
        root_1 = torch.tensor([self._root], device=self._device)
        if (known := self._drafts.choice.max_levels) is not None:
            max_levels = min(max_levels, known)
        draft = self._builder.build_tree(self, root_1, max_levels) if max_levels >= 1 else lone_root(root_1)
        return replace(draft, forced_verdicts=self._drafts.forced_verdicts(self._index + 1, draft.tree.num_levels))

    def accept(self, token_ids: Sequence[int], features: object) -> None:  # noqa: ARG002
        self._index += len(token_ids)
        self._root = token_ids[-1]

    def first(self, count: int) -> Candidates:
        self._level = 0
        return self._candidates(1, count)

    def next(self, parents_S: Tensor, ids_S: Tensor, rows: TreeRows, count: int) -> Candidates:  # noqa: ARG002
        return self._candidates(len(ids_S), count)

    def _candidates(self, num_rows: int, count: int) -> Candidates:
        self._level += 1
        ids = torch.tensor(self._drafts.siblings(self._index + self._level, count, self._level), device=self._device)
        scores = RANK_LOG_PROBABILITY * torch.arange(count, device=self._device)
        return Candidates(scores.expand(num_rows, count), ids.expand(num_rows, count))


RANK_LOG_PROBABILITY = -0.7
"""Each rank is about half as likely as the one before, and the first is certain: no other branch scores more than the
right one, so the right one is as deep as the tree may be."""


def require_depth(choice: DrafterChoice, num_levels: int, deeper: str = "give it more with -o") -> None:
    """`deeper` says how to get deeper drafts than those of `num_levels` tokens.

    Raises:
        InputError: they are too short for the mean length that is asked for.
    """
    if choice.num_levels > num_levels:
        raise InputError(
            f"--drafter {choice.text}: needs drafts of {choice.num_levels} tokens at least, and this backend drafts "
            f"{num_levels}; {deeper}, or ask for a smaller acceptance length"
        )


def require_known_answer(choice: DrafterChoice, sampling: Sampling) -> None:
    """Raises `InputError` for an oracle with a temperature: a sampled answer cannot be known beforehand."""
    if choice.kind == "oracle" and not sampling.greedy:
        raise InputError(
            f"--drafter {choice.text} works with --temperature 0 only (given: {sampling.temperature}): "
            "a sampled answer cannot be known beforehand. Use `random`, a trained drafter, or `forced:P`."
        )


def synthetic_drafts(
    choice: DrafterChoice, seed: int, decoder: TargetDecoder, request: GenerationRequest
) -> SyntheticDrafts:
    """The drafts for `request`. For an oracle this decodes the reference, once for all backends.

    Raises:
        InputError: an oracle with a temperature.
    """
    require_known_answer(choice, request.sampling)
    reference: tuple[int, ...] = ()
    if choice.kind == "oracle":
        reference = _reference(decoder, request.prompt_ids, request.max_new_tokens, request.eos_ids)
    digest = hashlib.sha256(",".join(map(str, request.prompt_ids)).encode()).digest()
    return SyntheticDrafts(choice, seed, digest, reference, decoder.config.vocab_size, request.eos_ids)


@lru_cache(maxsize=64)
def _reference(
    decoder: TargetDecoder, prompt_ids: tuple[int, ...], limit: int, eos_ids: frozenset[int]
) -> tuple[int, ...]:
    """What plain decoding emits. Decoders are equal only to themselves, so that each has results of its own."""
    request = GenerationRequest(prompt_ids, (), limit, Sampling(), 0, eos_ids)
    return tuple(decode(decoder, request))
