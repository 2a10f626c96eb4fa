"""Text that a server sends again: the whole answer as a last message, or with each chunk all of the answer so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from spdbench_backends.openai.chunks import Chunk

CUMULATIVE = "each of its chunks repeats the answer so far, of which only what is new counts"
WHOLE_AT_THE_END = "its answers come again as a whole at their end, which does not count"
GROWTHS = 2
"""How often, from the start of an answer, a chunk has to repeat the one before and go on, until that is no chance."""
CHUNKS_BEFORE = 2
"""How many chunks an answer has to have before one more, with just their text and the answer's end, repeats them."""


class Repeats:
    """Takes repeated text out of the chunks of one answer.

    `habits` are what earlier answers of the server showed, and learns from this one: an answer of two chunks is too
    short to tell a repetition from an answer such as "no, no". What it learns goes to `notice`.
    """

    def __init__(self, habits: set[str], notice: Callable[[str, str], None]) -> None:
        self._habits, self._notice = habits, notice
        self._text, self._thought = (_Written(is_cumulative=CUMULATIVE in habits) for _ in range(2))

    def without(self, chunk: Chunk, *, is_end: bool) -> Chunk:
        """`chunk` with what is new of its text; `is_end` if the answer ends with it or has ended before."""
        if not chunk.has_text:
            return chunk
        if chunk.is_message and (self._text.has_deltas or self._thought.has_deltas):
            self._learn(WHOLE_AT_THE_END)
            return replace(chunk, text=self._text.end_of(chunk.text), thought="")
        had = self._text.is_cumulative
        may_repeat = is_end and not had and chunk.ids is None and chunk.listed is None
        if may_repeat and self._text.is_repeated_by(chunk.text) and self._thought.is_repeated_by(chunk.thought):
            self._learn(WHOLE_AT_THE_END)
            return replace(chunk, text="", thought="")
        written = self._text.add(chunk.text, is_delta=not chunk.is_message)
        thought = self._thought.add(chunk.thought, is_delta=not chunk.is_message)
        if self._text.is_cumulative or self._thought.is_cumulative:
            self._learn(CUMULATIVE)
        return replace(chunk, text=written, thought=thought, replaces=self._text.is_cumulative and not had)

    def _learn(self, habit: str) -> None:
        if habit not in self._habits:
            self._habits.add(habit)
            self._notice(habit, "")


class _Written:
    """What a stream has written of one kind, text or thoughts, read as parts, or as a text that each chunk repeats."""

    def __init__(self, *, is_cumulative: bool) -> None:
        self.is_cumulative = is_cumulative
        self.has_deltas = False
        self._parts: list[str] = []
        self._length = 0
        self._last = ""
        self._growths = 0
        self._is_chain = True

    def add(self, text: str, *, is_delta: bool) -> str:
        """What is new in `text`; all of it in the moment that shows that chunks repeat what came before."""
        if not text:
            return text
        last, self._last = self._last, text
        self.has_deltas = self.has_deltas or is_delta
        self._is_chain = self._is_chain and text.startswith(last)
        if not self._is_chain:
            self.is_cumulative = False
            return self._append(text)
        if self.is_cumulative:
            return self._append(text[len(last) :])
        self._growths += bool(last.strip()) and len(text) > len(last)  # ever more spaces are how code begins
        if self._growths < GROWTHS:
            return self._append(text)
        self.is_cumulative = True
        self._parts, self._length = [], 0
        return self._append(text)

    def is_repeated_by(self, text: str) -> bool:
        """True if `text` is all that was written in several chunks, up to spaces around it, or both are nothing."""
        if not text or not self._length:
            return not text
        return len(self._parts) >= CHUNKS_BEFORE and text.strip() == "".join(self._parts).strip()

    def end_of(self, text: str) -> str:
        """What a whole answer has beyond what was written; nothing if it is another text."""
        written = "".join(self._parts)
        return self._append(text[len(written) :]) if text.startswith(written) else ""

    def _append(self, text: str) -> str:
        if text:
            self._parts.append(text)
            self._length += len(text)
        return text
