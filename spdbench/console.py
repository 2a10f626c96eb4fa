"""What reaches the terminal: notes on stderr, and text from outside with nothing in it that a terminal obeys."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import fill
from typing import TextIO

CLEAR = "\r\033[K"
"""Removes what is in the terminal's current line, such as a progress bar."""
MAX_CHARS = 8000
HARMLESS = "\t\u200c\u200d"
"""A tab, and the joiners that some scripts and emoji need."""


def printable(text: str, *, one_line: bool = False) -> str:
    """`text` with escapes such as `\\x1b` for control characters, halves of surrogate pairs, and marks that change the
    direction of text. Line breaks stay, unless it has to be `one_line`. Text over `MAX_CHARS` is cut.

    Labels, names, keys, file names, and messages of servers and libraries hold what others wrote. Escape sequences in
    them would be obeyed by a terminal, and line breaks would leave a table's row or a comment.
    """
    if len(text) > MAX_CHARS:
        text = f"{text[:MAX_CHARS]}... ({len(text):,} characters)"
    kept = HARMLESS if one_line else HARMLESS + "\n"
    if text.isprintable():
        return text
    return "".join(char if char in kept or not _is_obeyed(char) else _escape(char) for char in text)


def wrapped(text: str, width: int, indent: str) -> str:
    """`text` with its own lines and their indentation kept, as code and lists need them; long lines go on below."""
    found = []
    for line in text.split("\n"):
        words = line.lstrip(" \t")
        whole = (indent + line[: len(line) - len(words)])[: width // 2]
        fits = len(whole) + len(words) <= width
        found.append(
            (whole + words).rstrip() if fits else fill(words, width, initial_indent=whole, subsequent_indent=whole)
        )
    return "\n".join(found)


def counted(number: int, what: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_obeyed(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp")  # controls, and separators of lines and paragraphs


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def can_redraw(stream: TextIO) -> bool:
    """True if lines on `stream` can be drawn again: it is a terminal that obeys escape sequences, and no CI job's log.

    CI services set `CI`; some of them give a job a terminal, and keep everything that is written to it.
    """
    term = os.environ.get("TERM", "dumb").lower()
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return stream.isatty() and term not in ("", "dumb", "unknown") and not in_ci


_notes_hidden = False


@contextmanager
def hide_notes(hidden: bool) -> Iterator[None]:
    """Inside, notes are `hidden`, in all threads; errors are shown."""
    global _notes_hidden
    before, _notes_hidden = _notes_hidden, hidden
    try:
        yield
    finally:
        _notes_hidden = before


def say(line: str, *, error: bool = False) -> None:
    """A note or an `error` as a line on stderr, in place of a progress bar."""
    if _notes_hidden and not error:
        return
    shown = printable(line)
    print(f"{CLEAR}{shown}" if can_redraw(sys.stderr) else shown, file=sys.stderr, flush=True)
