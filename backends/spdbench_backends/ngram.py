"""`ngram`: prompt lookup. The draft is what followed the last n tokens when they last occurred.

Needs no head, because text repeats itself. Source: Saxena, prompt lookup decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from spdbench.types import GenerationRequest
from spdbench_backends.drafting import Lookup
from spdbench_backends.local import GraphOptions

if TYPE_CHECKING:
    from spdbench.decoding.speculate import Drafter


class Ngram(Lookup):
    """Prompt lookup: drafts what followed the last few tokens when they occurred before."""

    method, drafts_are = "ngram", "prompt lookup"

    class Options(GraphOptions):
        num_tokens: int = Field(8, ge=1, le=64, description="tokens drafted at most")
        max_ngram: int = Field(3, ge=1, le=64, description="longest run of last tokens that is looked up")
        min_ngram: int = Field(2, ge=1, description="shortest run; shorter ones match more and are right less often")

    _options: Options

    def _set_up(self) -> None:
        options = self._options
        if options.min_ngram > options.max_ngram:
            raise self._option_error("min_ngram", f"is more than max_ngram={options.max_ngram}")

    @property
    def _max_nodes(self) -> int:
        return self._options.num_tokens + 1

    def _new_drafter(self, request: GenerationRequest) -> Drafter:  # noqa: ARG002
        return NgramDrafter(self._options.num_tokens, self._options.max_ngram, self._options.min_ngram, self._decoder)


class NgramDrafter:
    """The committed tokens of one request, and the position after the last occurrence of each n-gram among them."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, num_tokens: int, max_ngram: int, min_ngram: int, decoder: Any) -> None:
        self.max_nodes = num_tokens + 1
        self._num_tokens = num_tokens
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._decoder = decoder
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def start(self, prompt_ids: Sequence[int], features: object, root: int) -> None:  # noqa: ARG002
        self._append((*prompt_ids, root))

    def propose(self, max_levels: int, sampler: object) -> Any:  # noqa: ARG002
        from spdbench.decoding.tree import DraftTree, chain

        found = self._lookup()[: max(max_levels, 0)]
        ids_N = self._decoder.ids((self._ids[-1], *found))
        return DraftTree(chain(len(found), ids_N.device), ids_N)

    def accept(self, token_ids: Sequence[int], features: object) -> None:  # noqa: ARG002
        self._append(token_ids)

    def _append(self, token_ids: Sequence[int]) -> None:
        """Adds tokens. An n-gram is indexed once a token follows it, so the last ones are not yet."""
        self._ids += token_ids
        for end in range(self._indexed, len(self._ids) - 1):
            for size in self._sizes:
                if size <= end + 1:
                    self._ends[tuple(self._ids[end + 1 - size : end + 1])] = end + 1
        self._indexed = len(self._ids) - 1

    def _lookup(self) -> list[int]:
        """What followed the latest earlier occurrence of the longest possible run of last tokens."""
        for size in self._sizes:
            end = self._ends.get(tuple(self._ids[-size:])) if size <= len(self._ids) else None
            if end is not None:
                return self._ids[end : end + self._num_tokens]
        return []
