"""Server-sent events: bytes as lines, and lines as events.

Servers differ from the standard in where events end, and in the word that ends a stream, so both are read widely.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spdbench_backends.openai.transport.errors import MALFORMED, BrokenError, LostError

PADDING = re.compile(rb"\A(?:\xef\xbb\xbf|\0)+")
"""Byte order marks and NUL bytes before a line, which belong to no event."""
MAX_LINE_BYTES = 2**24
"""vLLM puts the ids of the whole prompt into the first line."""
LINE_END = re.compile(rb"\r\n|\r|\n")
FIELD = re.compile(rb"(?:data|event|id|retry|error)?:")
"""How lines of a stream begin; `:` alone begins a comment."""
DONE = b"[DONE]"
UNREADABLE = object()
"""Stands for data that is no JSON."""


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream as they come, without their ends, which are CR LF, LF or CR.

    Raises:
        BrokenError: a line does not end.
    """
    parts, size, is_cr_last = list[bytes](), 0, False
    for piece in pieces:
        data = piece.removeprefix(b"\n") if is_cr_last else piece  # the line was yielded at its CR
        is_cr_last = data.endswith(b"\r")
        first, *others = LINE_END.split(data)
        parts.append(first)
        size += len(first)
        if size >= MAX_LINE_BYTES:
            raise BrokenError("the server sends a line without end")
        for other in others:
            yield b"".join(parts)
            parts, size = [other], len(other)
    if size:
        yield b"".join(parts)


def without_padding(lines: Iterable[bytes], notice: Callable[[str, str], None]) -> Iterator[bytes]:
    """`lines` without the byte order marks and NUL bytes around them, which are said."""
    for line in lines:
        bare = PADDING.sub(b"", line.rstrip(b"\0"))
        if len(bare) < len(line):
            notice("NUL bytes or byte order marks stand around lines of its streams, and are ignored", "")
        yield bare


def read_events(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Any, bytes]]:
    """The data of each event, the same as JSON or `UNREADABLE`, and the event's name.

    A line of data is an event at once if it is whole; otherwise it is joined with those up to the next empty line, as
    the standard has it for all. Not all servers send an empty line after each event, and some send lines of JSON
    without the name of a field in front, be it all of them or errors alone.

    Raises:
        BrokenError: an event does not end, or is cut off by the end of the stream.
    """
    name, held, size = b"", list[bytes](), 0
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.strip()
        if not line:
            if held:
                data = b"\n".join(held)
                yield data, parse(data), name
            if name == b"done":
                yield DONE, UNREADABLE, name
            name, held, size = b"", [], 0
        elif field == b"event":
            name = value.lower()
        elif line.startswith(b"{") and isinstance(event := parse(line), dict):
            yield line, event, name
        elif field == line and is_done(line):
            yield DONE, UNREADABLE, name
        elif field == b"error" and value:  # llama.cpp's servers of 2025
            yield b'{"error":' + value + b"}", {"error": parse(value)}, name
        elif field == b"data" and (value := _unwrapped(value)) and not value.startswith(b":"):
            event = UNREADABLE if held or is_done(value) else parse(value)
            if held or (event is UNREADABLE and value.startswith((b"{", b"[")) and not is_done(value)):
                held.append(value)
                size += len(value)
                if size > MAX_LINE_BYTES:
                    raise BrokenError("the server sends an event without end")
            else:
                yield value, event, name
    if held:
        data = b"\n".join(held)
        if (event := parse(data)) is UNREADABLE:
            raise LostError("the server ended in the middle of its answer")
        yield data, event, name


def _unwrapped(value: bytes) -> bytes:
    """Data without the name of the field, which a proxy may have written once more."""
    while value.startswith(b"data:"):
        value = value.removeprefix(b"data:").strip()
    return value


def parse(data: bytes) -> Any:
    """The data as JSON; `UNREADABLE` if it is none."""
    try:
        return json.loads(data.decode(errors="replace"), strict=False)  # some leave tabs as they are
    except MALFORMED:
        return UNREADABLE


def is_event(line: bytes, *, in_lines: bool) -> bool:
    """True if the line is a JSON object which is a part of an answer, and not all of it; `in_lines` if the stream says
    that it comes in lines of JSON."""
    event = parse(line)
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list):
        return in_lines and isinstance(event, dict)
    return in_lines or any(isinstance(choice, dict) and "delta" in choice for choice in choices)


def is_done(data: bytes) -> bool:
    return len(data) <= 2 * len(DONE) and data.strip(b"\"'[] ").upper() == b"DONE"
