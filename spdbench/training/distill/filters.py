"""What is kept out of a data file: repetitive answers, repeated texts, and prompts of a suite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spdbench.types import Message

NGRAM_WORDS = 8
"""A text that shares this many words in a row with an excluded prompt overlaps with it."""
MIN_WORDS = 4
"""An excluded prompt shorter than `NGRAM_WORDS` overlaps where all of it occurs; one shorter than this, only with an
equal text."""
GRAM_TOKENS = 8

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """Lower-cased words without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def is_repetitive(ids: Sequence[int]) -> bool:
    """True if over half of the 8-grams of ids repeat an earlier one: longer cycles than a loop's."""
    grams = [tuple(ids[i : i + GRAM_TOKENS]) for i in range(len(ids) - GRAM_TOKENS + 1)]
    return len(grams) > GRAM_TOKENS and 2 * len(set(grams)) < len(grams)


class Overlap:
    """Tells whether a text holds part of an excluded prompt."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._grams: dict[int, set[tuple[str, ...]]] = {}
        self._whole: set[tuple[str, ...]] = set()
        for prompt in prompts:
            found = words(prompt)
            size = min(NGRAM_WORDS, len(found))
            if size < MIN_WORDS:
                self._whole.add(found)
            else:
                self._grams.setdefault(size, set()).update(_grams(found, size))

    def __contains__(self, text: str) -> bool:
        found = words(text)
        return found in self._whole or any(
            not known.isdisjoint(_grams(found, size)) for size, known in self._grams.items()
        )


def _grams(found: tuple[str, ...], size: int) -> Iterable[tuple[str, ...]]:
    return (found[i : i + size] for i in range(len(found) - size + 1))


@dataclass
class Seen:
    """First user turns and last answers, by their words; shared by all conversations of a run.

    A turn is claimed before it is answered, so that of two equal ones the first gets the answer.
    """

    texts: set[tuple[str, ...]] = field(default_factory=set)

    def claim(self, text: str) -> bool:
        """Adds a text; False if it is known already."""
        key = words(text) or (text,)
        new = key not in self.texts
        self.texts.add(key)
        return new

    def add(self, messages: Sequence[Message]) -> None:
        """Adds a finished conversation."""
        self.claim(next(message["content"] for message in messages if message["role"] == "user"))
        self.claim(messages[-1]["content"])
