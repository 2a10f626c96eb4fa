"""A streamed answer: its chunks to its end, errors inside it, and text that comes twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from spdbench_backends.openai.chunks import FINISHES, OTHER_ANSWERS, Chunk, choice_of, chunk_of
from spdbench_backends.openai.repeats import Repeats
from spdbench_backends.openai.transport.errors import (
    MALFORMED,
    BrokenError,
    LostError,
    RefusedError,
    SilentError,
    error_message,
    one_line,
    only,
)
from spdbench_backends.openai.transport.events import UNREADABLE, is_done, parse, read_events

ERROR = b"error"
ENDS_WITH_USAGE = "its answers end with their usage alone"
"""A habit of servers whose answers have no other end, so that without usage they seem to be cut off."""
WORDS = re.compile(r"(\[[\w\s]+\])?[\w\s.,:;!?/+-]*")
OF_ANSWERS = frozenset({"choices", "usage", "error", "errors", "detail"})
OK = 200
LOST_LATER = "its connections are lost after whole answers, which is ignored"
STAY_OPEN = "its streams stay open after the answers, so each request takes longer than its answer"
Notice = Callable[[str, str], None]
"""Says something odd of a server once, with an example, which may be empty."""


class ReportedError(BrokenError):
    """An error that the server reports inside its stream. `status` is the HTTP status that it names, else that of the
    stream; `message` its explanation, in one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server failed in the middle of its answer: {message}")
        self.status = status
        self.message = message


def read_chunks(
    lines: Iterable[bytes], without_key: Callable[[str], str], notice: Notice, habits: set[str]
) -> Iterator[Chunk]:
    """The events of a stream, to its end, with the server's reasons passed through `without_key`; `habits` are those of
    `Repeats`, and `ENDS_WITH_USAGE`.

    An answer ends with `[DONE]`, behind which only usage counts, with a chunk that has a finish reason, or with the
    only usage, if nothing follows. Some servers have a word in that place from the first chunk on, so a word is no
    reason once text has followed it. What goes wrong after a whole answer is ignored, and said.

    Raises:
        RefusedError: an error came in place of the answer.
        BrokenError: an event cannot be read or is an error, or the stream ends before the answer does.
    """
    word, has_text, not_ends, skipped, repeats = "", False, set[str](), "", Repeats(habits, notice)
    foreign, is_known = b"", False
    has_usage, is_counted, events = False, False, read_events(lines)

    def is_whole() -> bool:
        return has_text and word in FINISHES and word not in not_ends

    try:
        for data, event, name in events:
            if is_done(data):
                if has_text and not has_usage:
                    yield from _behind_the_end(events, without_key, notice)
                return
            if name != ERROR and (words := _words_of_no_answer(data, event)):
                skipped = one_line(without_key(words))
                notice("events that are no part of an answer are skipped", skipped)
                continue
            try:
                chunk = _chunk(data, event, name, without_key, notice)
            except BrokenError as error:
                if is_whole():
                    reason = error.message if isinstance(error, ReportedError) else ""
                    notice("what follows its whole answers is no part of them, and is ignored", reason)
                    continue
                if isinstance(error, ReportedError) and not has_text:
                    raise RefusedError(error.status, error.message, None) from None
                raise
            is_known = is_known or chunk.has_content or "choices" in only(event)
            foreign = foreign or data
            chunk = repeats.without(chunk, is_end=bool(chunk.finish or word) and word not in not_ends)
            at_the_end = bool(chunk.completion_tokens) and has_text and not has_usage
            is_counted = (is_counted or at_the_end) and not chunk.has_text
            has_usage = has_usage or bool(chunk.completion_tokens)
            if chunk.has_text:
                not_ends |= {word} - {""}
                word, has_text = "", True
            word = chunk.finish or word
            yield replace(chunk, finish=None if chunk.finish in not_ends else chunk.finish, ends_answer=is_whole())
    except BrokenError as error:
        if not is_whole():
            raise
        notice(STAY_OPEN if isinstance(error, SilentError) else LOST_LATER, "")
    if is_counted and not word:
        habits.add(ENDS_WITH_USAGE)
    elif not word or word in not_ends - FINISHES.keys():
        raise _lost(b"" if is_known else foreign, skipped, without_key)


def _lost(foreign: bytes, skipped: str, without_key: Callable[[str], str]) -> LostError:
    """Of a stream that ended before its answer: names the first event of one that has none of OpenAI's protocol, else
    what was said in events that are no part of an answer."""
    if foreign:
        shown = one_line(without_key(foreign.decode(errors="replace")))
        return LostError(f"the server's stream has no event of OpenAI's protocol; it begins with {shown}")
    reason = f"; it said: {skipped}" if skipped else ""
    return LostError(f"the server ended in the middle of its answer{reason}")


def _behind_the_end(
    events: Iterable[tuple[bytes, Any, bytes]], without_key: Callable[[str], str], notice: Notice
) -> Iterator[Chunk]:
    """The usage that some servers send behind `[DONE]`; what else comes there does not count."""
    yield Chunk(ends_answer=True)
    try:
        for data, event, name in events:
            with suppress(BrokenError):
                chunk = _chunk(data, event, name, without_key, notice)
                if chunk.completion_tokens:
                    yield replace(chunk, text="", thought="", finish=None, ends_answer=True)
                    return
    except SilentError:
        notice(STAY_OPEN, "")
    except BrokenError:
        pass


def read_refusal(body: bytes, without_key: Callable[[str], str]) -> RefusedError | None:
    """The refusal in the body of an answer that is not streamed; None if it is none."""
    try:
        _chunk(body, parse(body), b"", without_key, lambda *_: None)
    except ReportedError as error:
        return RefusedError(error.status, error.message, None)
    except BrokenError:
        pass
    return None


def _words_of_no_answer(data: bytes, event: Any) -> str:
    """What an event says that only keeps the connection alive: words, a number, or a message; empty for others."""
    text = data.decode(errors="replace")
    if isinstance(event, Mapping):
        message = event.get("message")
        text = message if isinstance(message, str) and not OF_ANSWERS & event.keys() else ""
        return "" if _status(event) != OK or ERROR.decode() in (event.get("object"), event.get("type")) else text
    is_odd = not WORDS.fullmatch(text) if event is UNREADABLE else isinstance(event, list)
    return "" if is_odd or "error" in text.lower() else text


def _chunk(data: bytes, event: Any, name: bytes, without_key: Callable[[str], str], notice: Notice) -> Chunk:
    """One event of an answer. Raises `ReportedError` if it is an error, `BrokenError` if it cannot be read."""
    text, event = data.decode(errors="replace"), only(event)
    choice: Mapping[str, Any] = {}

    def odd(field: str) -> None:
        why = "is another answer" if field == OTHER_ANSWERS else "cannot be read"
        notice(f"some of its events have a {field} that {why}, and are measured without it", "")

    is_error = name == ERROR or (event is UNREADABLE and "error" in text.lower() and bool(WORDS.fullmatch(text)))
    try:
        if not is_error:
            choice = choice_of(event, odd)
            stated = event.get("message") or event.get("detail")
            bare = not {"choices", "usage"} & event.keys() and isinstance(stated, str | list) and bool(stated)
            is_error = bare or "error" in (event.get("object"), event.get("type"))
        end = choice.get("finish_reason")
        aborted = end if isinstance(end, Mapping) and _says(end.get("message")) else {}  # SGLang's own form
        if not (is_error or aborted or any(map(_says, (event.get("error"), event.get("errors"), choice.get("error"))))):
            return chunk_of(event, choice, without_key, odd)
    except MALFORMED:
        raise BrokenError("the server sent an event that is not a part of an answer") from None
    message = error_message(json.dumps(aborted or choice) if aborted or choice.get("error") else text, without_key)
    raise ReportedError(_status(event, choice, aborted), message)


def _says(error: Any) -> bool:
    """False for an error that is none, such as one with the code 0 and no message."""
    return any(error.values()) if isinstance(error, Mapping) else bool(error)


def _status(*holders: Any) -> int:
    """The HTTP status that an error names; 200, which it came with, if it names none."""
    known = [holder for holder in holders if isinstance(holder, Mapping)]
    known += [holder["error"] for holder in known if isinstance(holder.get("error"), Mapping)]
    codes = [str(holder.get(key)) for holder in known for key in ("code", "status", "status_code")]
    return next((int(code) for code in codes if re.fullmatch(r"[45][0-9]{2}", code, re.ASCII)), OK)
