"""Prompts of given lengths, cut from one local text."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import Field

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.input_files import read_input
from spdbench.prompts.rows import SourceUnavailable, Text
from spdbench.prompts.source import Loaded, Place, RelativePath, Source, no_such_file
from spdbench.types import Prompt


class TextSource(Source):
    """Prompts of given lengths, cut from one local text: what long contexts cost. Lengths are in tokens of
    `chars_per_token` characters each; how many tokens a model makes of them is in its results."""

    kind = "text"
    text: RelativePath
    tokens: list[Annotated[int, Field(ge=16, le=2**24)]] = Field(min_length=1)
    each: int = Field(2, ge=1, le=10_000, description="prompts of each length, from evenly spaced places in the text")
    chars_per_token: float = Field(4.0, ge=0.25, le=64, allow_inf_nan=False, description="about 4 for English")
    origin: Text | None = Field(None, description="what text is meant, for messages")

    @property
    def title(self) -> str:
        return f"text {self.text}"

    def load(self, place: Place) -> Loaded:
        file = place.base / self.text
        if not os.path.exists(file):
            hint = "" if self.origin is None else f"; {self.origin}"
            command = f"spdbench run {place.suite} --data DIR, where DIR/{self.text} is the file{hint}"
            raise SourceUnavailable(no_such_file(place.base, self.text), command)
        try:
            text = read_input(file).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise InputError(f"{file}: not UTF-8") from None
        sizes = {count: int(count * self.chars_per_token) for count in self.tokens}
        fit = [count for count, size in sizes.items() if size <= len(text)]
        if not fit:
            smallest = min(sizes, key=lambda count: sizes[count])
            raise InputError(
                f"{file}: holds {len(text):,} characters, and {smallest:,} tokens take about {sizes[smallest]:,}; give "
                "a longer text, or shorter lengths under `tokens`"
            )
        if len(fit) < len(sizes):
            omitted = ", ".join(f"{count:,}" for count in sizes if count not in fit)
            say(f"NOTE: {file}: its {len(text):,} characters are too few for {omitted} tokens, which are omitted.")
        prompts = [
            Prompt(f"{count}-{number}", f"{count} tokens", (_piece(text, sizes[count], number / self.each),))
            for count in fit
            for number in range(self.each)
        ]
        return Loaded(tuple(prompts), self.title)


SPACE = re.compile(r"\s")
LONGEST_WORD = 100
"""Characters in which a word that is cut ends; text without spaces so near has no words to keep whole."""


def _piece(text: str, size: int, place: float) -> str:
    """About `size` characters of `text`, of whole words, from that part of the text on; 0 is its beginning."""
    start = int((len(text) - size) * place)
    piece = text[start : start + size]
    if start and not text[start - 1].isspace() and (end := SPACE.search(piece, 0, min(LONGEST_WORD, size // 4))):
        piece = piece[end.end() :]  # the first word is cut
    return piece.strip() or piece
