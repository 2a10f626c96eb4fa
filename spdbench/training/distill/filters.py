"""What is kept out of a data file: loops, junk, repeated texts, and prompts of a suite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NGRAM_WORDS = 8
"""A text that shares this many words in a row with an excluded prompt overlaps with it."""
FEWEST_WORDS = 4
"""An excluded prompt shorter than `NGRAM_WORDS` overlaps where all of it occurs; one shorter than this, only with an
equal text."""
MAX_CYCLE = 8
TAIL_TOKENS = 64
GRAM_TOKENS = 8

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """Lower-cased words without punctuation."""
    return tuple(_WORD.findall(text.lower()))


def is_loop(ids: Sequence[int]) -> bool:
    """True if over half of the last 64 ids lie in one stretch that repeats a cycle of at most 8 ids.

    The test of the flag `degenerate` (METRICS.md, "Flags"), on one answer: a cycle counts from its second round, and
    fewer than two cycles of 8 ids are too few to decide.
    """
    tail = ids[-TAIL_TOKENS:]
    if len(tail) < 2 * MAX_CYCLE:
        return False
    for period in range(1, MAX_CYCLE + 1):
        longest = stretch = 0
        for here, there in zip(tail[period:], tail, strict=False):
            stretch = stretch + 1 if here == there else 0
            longest = max(longest, stretch)
        if longest >= period and 2 * (longest + period) > len(tail):
            return True
    return False


def is_repetitive(ids: Sequence[int]) -> bool:
    """True if over half of the 8-grams of ids repeat an earlier one: longer cycles than a loop's."""
    grams = [tuple(ids[i : i + GRAM_TOKENS]) for i in range(len(ids) - GRAM_TOKENS + 1)]
    return len(grams) > GRAM_TOKENS and 2 * len(set(grams)) < len(grams)


class Overlap:
    """Tells whether a text holds part of an excluded prompt."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self.num_prompts = 0
        self._grams: dict[int, set[tuple[str, ...]]] = {}
        self._whole: set[tuple[str, ...]] = set()
        for prompt in prompts:
            self.num_prompts += 1
            found = words(prompt)
            size = min(NGRAM_WORDS, len(found))
            if size < FEWEST_WORDS:
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
