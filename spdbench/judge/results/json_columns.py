"""Columns of plain numbers, from JSON text to arrays at once: what a result file holds most of.

A column here is the text between the brackets of a JSON array. Only what is plainly such numbers is taken; anything
else raises `NotPlain`, and the models have to read the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

MAX_DIGITS = 18
"""What fits into 64 bits whatever the digits are."""
COMMA, ZERO = ord(","), ord("0")
FLOAT_CHARACTERS = b"0123456789.,+-eE "


class NotPlain(Exception):  # noqa: N818 - no error: only not for this reader
    """The text may be fine or damaged; it is not of the plain kind that is read here."""


def integers(columns: Sequence[bytes], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole numbers from 0 to `most`.

    Returns:
        The numbers of all `columns` end to end, and how many each column has.
    """
    text = b",".join(filter(None, columns))
    sizes = np.array([len(column) for column in columns], dtype=np.int64)
    values = _single_digits(text)
    if values is not None:
        counts = (sizes + 1) // 2
    else:
        commas = require_plain_integers(text)
        ends = np.cumsum(sizes + (sizes > 0))  # behind the comma that follows each column
        counts = np.diff(np.searchsorted(commas, ends), prepend=0)
        counts[np.flatnonzero(sizes)[-1:]] += 1  # no comma follows the last column
        values = np.fromstring(text, dtype=np.int64, sep=",") if text else np.empty(0, np.int64)
    if len(values) and values.max() > most:
        raise NotPlain
    return values, counts


def _single_digits(text: bytes, point: bytes = b"") -> NDArray[np.int64] | None:
    """The numbers in `0,4,1`, or with a `point` of `.0` in `0.0,4.0,1.0`; None if it is not all of this kind."""
    ending = point + b","
    stride = 1 + len(ending)
    if len(text) % stride != stride - 1:
        return None
    characters = np.frombuffer(text, dtype=np.uint8)
    digits = characters[::stride] - ZERO  # what is no digit wraps round to above 9
    if digits.max() > 9 or any((characters[at::stride] != ending[at - 1]).any() for at in range(1, stride)):
        return None
    return digits.astype(np.int64)


def require_plain_integers(text: bytes) -> NDArray[np.int64]:
    """Where the commas are in numbers that are digits and nothing else, as JSON writes them.

    Raises:
        NotPlain: a character that is neither digit nor comma, a number without digits, with a leading zero or too many.
    """
    if not text:
        return np.empty(0, dtype=np.int64)
    characters = np.frombuffer(text, dtype=np.uint8)
    commas = np.flatnonzero(characters == COMMA)
    num_digits = np.count_nonzero(characters - ZERO <= 9)
    starts = np.concatenate(([0], commas + 1))
    lengths = np.concatenate((commas, [len(text)])) - starts
    if num_digits + len(commas) != len(text) or lengths.min() < 1 or lengths.max() > MAX_DIGITS:
        raise NotPlain
    if ((characters[starts] == ZERO) & (lengths > 1)).any():
        raise NotPlain
    return commas


def floats(columns: Sequence[bytes], most: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Numbers from 0 to `most`, most often small whole ones written `4.0`; returned as by `integers`."""
    text = b",".join(filter(None, columns))
    whole = _single_digits(text, b".0")
    if whole is not None:
        values = whole.astype(np.float64)
    elif text.translate(None, FLOAT_CHARACTERS):
        raise NotPlain
    else:
        try:
            values = np.array(from_json(b"[" + text + b"]"), dtype=np.float64)
        except (ValueError, OverflowError):
            raise NotPlain from None
    if not ((values >= 0) & (values <= most)).all():
        raise NotPlain
    return values, np.array([column.count(b",") + bool(column) for column in columns], dtype=np.int64)
