"""`suffix`: suffix decoding. Drafts what most often followed the longest run of last tokens that occurred before.

Needs no head. Source: Oliaro et al., SuffixDecoding, arXiv 2411.04975: a suffix tree over prompt and answer, and if
asked for over earlier answers, is walked from the node of the longest match along its most frequent children. Here it
is kept as its leaves, the positions of the text by their last two tokens: those that share the last L tokens are the
leaves under the node of these tokens, and the shares of their next tokens are its children's counts. Where the paper
limits a draft to a multiple of the match's length, here it is as long as its tokens are likely enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from spdbench.types import GenerationRequest
from spdbench_backends.drafting import Lookup
from spdbench_backends.weighing import Rates, WeighedOptions, worthwhile

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter

MAX_POSITIONS = 64
"""Earlier positions that are compared with the end of the text, the latest first."""
MAX_MATCH = 8
"""Longer matches count as this long: what follows them is as likely."""
BREAK = -1
"""Between the texts of several requests; no match and no draft goes across it."""
MAX_EARLIER = 200_000
"""Tokens of earlier answers that are kept, the latest ones."""


class Suffix(Lookup):
    """Suffix decoding: drafts what most often followed the longest run of last tokens that occurred before."""

    method, drafts_are, learns = "suffix", "suffixes", True

    class Options(WeighedOptions):
        num_tokens: int = Field(16, ge=1, le=64, description="tokens drafted at most")

    _options: Options

    def _set_up(self) -> None:
        self._earlier: dict[tuple[int, ...], list[int]] = {}
        self._last: tuple[GenerationRequest, SuffixDrafter] | None = None
        self._chosen = {**self._chosen, "drafts_from": self._options.memory}

    @property
    def _max_nodes(self) -> int:
        return self._options.num_tokens + 1

    def _new_drafter(self, request: GenerationRequest) -> Drafter:
        options = self._options
        drafter = SuffixDrafter(options.num_tokens, options.row_cost, self._decoder)
        if options.earlier_answers:
            if self._last is not None and self._last[1].num_new:
                prompt_ids = self._last[0].prompt_ids
                self._earlier[prompt_ids] = self._last[1].ids[-self._last[1].num_new :]
            # An answer to the same prompt would give this one away: that is no draft but a copy.
            others = [answer for prompt_ids, answer in self._earlier.items() if prompt_ids != request.prompt_ids]
            drafter.read([token for answer in others for token in (*answer, BREAK)][-MAX_EARLIER:])
            self._last = request, drafter
        return drafter


class Match(NamedTuple):
    """The longest match of the end of a text: its length, the positions after it, and the tokens there."""

    length: int
    positions: list[int]


class SuffixDrafter:
    """The text of one request, and the positions in it by the two tokens before them."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, num_tokens: int, row_cost: float, decoder: Any) -> None:
        self.max_nodes = num_tokens + 1
        self.ids: list[int] = []
        self.num_new = 0
        self._num_tokens, self._row_cost, self._decoder = num_tokens, row_cost, decoder
        self._after: dict[tuple[int, int], list[int]] = {}
        self._rates: Rates[tuple[int, bool]] = Rates(_prior)
        self._matched: tuple[int, Match | None] = 0, None

    def read(self, token_ids: Sequence[int]) -> None:
        """Adds a text. A position is listed once a token is there."""
        start = len(self.ids)
        self.ids += token_ids
        for position in range(max(start, 2), len(self.ids)):
            self._after.setdefault((self.ids[position - 2], self.ids[position - 1]), []).append(position)

    def start(self, prompt_ids: Sequence[int], features: object, root: int) -> None:  # noqa: ARG002
        self.read(prompt_ids)
        self._learn((root,))

    def propose(self, max_levels: int, sampler: object) -> Any:  # noqa: ARG002
        from spdbench.decoding.tree import DraftTree, chain

        drafts, chances = self._continuation(min(max_levels, self._num_tokens))
        drafts = drafts[: worthwhile(chances, self._row_cost)]
        ids_N = self._decoder.ids((self.ids[-1], *drafts))
        return DraftTree(chain(len(drafts), ids_N.device), ids_N)

    def accept(self, token_ids: Sequence[int], features: object) -> None:  # noqa: ARG002
        self._learn(token_ids)

    def _learn(self, token_ids: Sequence[int]) -> None:
        """Adds new tokens, and notes for each whether it would have been drafted: also where nothing was."""
        for token in token_ids:
            if (match := self._match()) is not None:
                draft, kind = self._next(match)
                self._rates.add(kind, right=draft == token)
            self.read((token,))
        self.num_new += len(token_ids)

    def _continuation(self, limit: int) -> tuple[list[int], list[float]]:
        """What followed, up to `limit` tokens, and the chance of each to be accepted."""
        drafts: list[int] = []
        chances: list[float] = []
        match, chance = self._match(), 1.0
        while match is not None and len(drafts) < limit:
            draft, kind = self._next(match)
            if draft == BREAK:
                break
            chance *= self._rates[kind]
            drafts.append(draft)
            chances.append(chance)
            kept = [at + 1 for at in match.positions if self.ids[at] == draft and at + 1 < len(self.ids)]
            match = Match(match.length + 1, kept) if kept else None
        return drafts, chances

    def _match(self) -> Match | None:
        """The longest run of last tokens, two at least, that occurred before, and where."""
        if self._matched[0] != len(self.ids):
            self._matched = len(self.ids), self._longest_match()
        return self._matched[1]

    def _longest_match(self) -> Match | None:
        ids, size = self.ids, len(self.ids)
        longest, found = 1, list[int]()
        for position in reversed(self._after.get((ids[-2], ids[-1]), ())[-MAX_POSITIONS:] if size > 1 else ()):
            length = 2
            while length < MAX_MATCH and length < position and ids[position - 1 - length] == ids[size - 1 - length]:
                length += 1
            if length > longest:
                longest, found = length, []
            if length == longest:
                found.append(position)
        return Match(longest, found) if found and BREAK not in ids[-2:] else None

    def _next(self, match: Match) -> tuple[int, tuple[int, bool]]:
        """The most frequent next token, of equally frequent ones the latest; the length of the match, and whether all
        of its occurrences agree."""
        counts = Counter(self.ids[position] for position in match.positions)
        [(token, count)] = counts.most_common(1)
        return token, (min(match.length, MAX_MATCH), count == len(match.positions))


def _prior(kind: tuple[int, bool]) -> float:
    """The rate at which a draft is right before any was seen, by length of the match and whether all agree."""
    length, agree = kind
    return (0.3 + 0.08 * (length - 2)) * (1.0 if agree else 0.7)
