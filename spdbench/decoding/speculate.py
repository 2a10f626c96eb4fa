"""Draft and verify: the decoding loop of every method whose drafts the target verifies in one forward.

    prefill, then round by round:
        the drafter proposes a tree after the newest token
        the target forwards the whole tree
        the longest accepted path is emitted, followed by the target's own token
        the cache keeps that path's rows; the drafter receives the path and the target's features on it

Shapes: N nodes, P prompt tokens, M model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree import DraftTree
from spdbench.decoding.verify import AcceptRule, verify
from spdbench.models.interface import TargetDecoder
from spdbench.models.torch_utils import to_device
from spdbench.types import Drafted, GenerationRequest, Span, SpanKind, Step


@dataclass(frozen=True)
class Features:
    """What the target computed for some rows: the last layer's output before the final norm, and the hidden states
    that the drafter reads, by index; `[rows, M]` each."""

    hidden: Tensor
    states: Mapping[int, Tensor]

    def at(self, rows: Sequence[int]) -> Features:
        """The same for some of the rows."""
        if list(rows) == list(range(len(self.hidden))):
            return self
        chosen = to_device(rows, self.hidden.device)
        return Features(self.hidden[chosen], {index: state[chosen] for index, state in self.states.items()})


class Drafter(Protocol):
    """Drafts for one request."""

    @property
    def hidden_indices(self) -> Collection[int]:
        """The target's hidden states that it reads, by index."""

    @property
    def max_nodes(self) -> int:
        """No tree has more nodes, the root included."""

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        """The prompt with the target's features of it, and the first new token."""

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        """A tree after the newest token; a lone root is allowed. Levels deeper than `max_levels` will not count."""

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        """New tokens, the last of which is the new root, and the features of the old root and of all new tokens but
        the last: as many rows as tokens."""


@runtime_checkable
class ObservesLogits(Protocol):
    """A drafter that also reads the target's logits."""

    def observe(self, accepted_ids: Sequence[int], logits_NV: Tensor) -> None:
        """The accepted drafts, and the target's logits `[N, V]` after the old root and after each of them. `accept`
        follows."""


class Speculation:
    """The rounds of one request. `spans` records where the time went."""

    def __init__(
        self,
        decoder: TargetDecoder,
        drafter: Drafter,
        request: GenerationRequest,
        accept_rule: AcceptRule | None = None,
    ) -> None:
        self._decoder = decoder
        self._accept_rule = accept_rule
        self._drafter = drafter
        self._observer = drafter if isinstance(drafter, ObservesLogits) else None
        self._request = request
        self._sampler = Sampler(request.sampling, request.seed)
        # A round keeps at least its root, so recurrent layers go back by one token less than it has nodes.
        capacity = len(request.prompt_ids) + request.max_new_tokens + drafter.max_nodes
        self.cache = decoder.new_cache(capacity, num_snapshots=drafter.max_nodes - 1)
        self.spans: list[Span] = []

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Prefill, then one step a round; ends with the round that emits an end of sequence, or at the limit."""
        request, num_new = self._request, 1
        step = Step((self._prefill(),), 0, 0, 0, float(len(request.prompt_ids)))
        yield step
        while num_new < request.max_new_tokens and not request.eos_ids.intersection(step.token_ids):
            step = self._round(request.max_new_tokens - num_new)
            yield step
            num_new += len(step.token_ids)

    def _prefill(self) -> int:
        prompt_ids = self._request.prompt_ids
        decoder, hidden_indices = self._decoder, self._drafter.hidden_indices
        hidden_PM, states = decoder.forward(
            decoder.embed(decoder.ids(prompt_ids)), 0, self.cache, hidden_indices=hidden_indices
        )
        token = self._sampler.choose(decoder.logits(hidden_PM[-1:])[0])
        self._drafter.start(prompt_ids, Features(hidden_PM, states), token)
        return token

    def _round(self, room: int) -> Step:
        """One round, of at most `room` tokens."""
        decoder, mark = self._decoder, self.cache.length
        began = perf_counter_ns()
        draft = self._drafter.propose(room - 1, self._sampler)
        drafted = perf_counter_ns()
        tree = None if draft.tree.is_chain else draft.tree.rows
        hidden_NM, states = decoder.forward(
            decoder.embed(draft.ids_N), mark, self.cache, hidden_indices=self._drafter.hidden_indices, tree=tree
        )
        logits_NV = decoder.logits(hidden_NM)
        forwarded = perf_counter_ns()
        verdict = verify(logits_NV, draft, self._sampler, self._accept_rule).within(room)
        self.cache.keep(mark, verdict.path)
        verified = perf_counter_ns()
        if self._observer is not None:
            self._observer.observe(verdict.token_ids[:-1], logits_NV[list(verdict.path)])
        self._drafter.accept(verdict.token_ids, Features(hidden_NM, states).at(verdict.path))
        self._record_span("draft", began, drafted, mark)
        self._record_span("target", drafted, forwarded, mark)
        self._record_span("verify", forwarded, verified, mark)
        self._record_span("host", verified, perf_counter_ns(), mark)
        kept = drafted_tokens(draft) if self._request.keep_drafts else None
        counts = verdict.drafted, verdict.judged, verdict.accepted
        return Step(verdict.token_ids, *counts, float(len(draft.tree)), kept)

    def _record_span(self, kind: SpanKind, start_ns: int, end_ns: int, position: int) -> None:
        """Not on a GPU: there the host runs ahead of the device, and its clock does not measure the work."""
        if self._decoder.device.type != "cuda":
            self.spans.append(Span(0, kind, start_ns, end_ns, position, True))


def drafted_tokens(draft: DraftTree) -> Drafted:
    """A tree as results keep it: the root, a known token, is no draft."""
    parents = (parent - 1 for parent in draft.tree.parents_N[1:].tolist())
    return Drafted(tuple(draft.ids_N[1:].tolist()), tuple(parents))
