"""Result files inside a report: packed into a script element of the page, and read back from it.

A report holds the files that it was made from, byte for byte, so that whatever reads results reads reports too. The
element is JSON, which browsers do not run: the schema, the files' names and sizes, and the files end to end,
compressed by LZMA (several labels of one run hold much the same ids) and written in base64. Before that, times become
shorter: those of steps the differences between them; starts of spans (`run --trace`) the time since the end of the span
before, and their ends how long they took. Times are most of what does not compress: this takes a twelfth off it.
"""

from __future__ import annotations

import base64
import binascii
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError

from spdbench.errors import InputError, first_problem
from spdbench.input_files import MAX_UNPACKED_BYTES, parse_json, read_input
from spdbench.judge.results.schema import Record

SCHEMA = "spdbench.report/1"
SUFFIXES = (".html", ".htm")
BEGIN, END = '<script type="application/json" id="spdbench-results">', "</script>"
_TIMES = re.compile(rb'("t_ns":\[)([-0-9,]+)\]')
_SPANS = re.compile(rb'("start_ns":\[)([-0-9,]+)\],"end_ns":\[([-0-9,]+)\]')
_ELEMENT = re.compile(re.escape(BEGIN.encode()) + b"(.*?)" + re.escape(END.encode()), re.DOTALL)


class EmbeddedFile(NamedTuple):
    """A result file's name, without folders, and its bytes."""

    name: str
    raw: bytes


class _Entry(Record):
    """`bytes` is the size before compression, of a file whose times are `differences` where that is true, and whose
    spans are `gaps` and durations where that is true."""

    name: str
    bytes: Annotated[int, Field(ge=0, le=MAX_UNPACKED_BYTES)]
    differences: bool
    gaps: bool = False


class _Element(Record):
    schema_: Literal["spdbench.report/1"] = Field(alias="schema")
    files: list[_Entry]
    compression: Literal["xz"]
    base64: str


def is_report(path: Path) -> bool:
    """True for the name of a page; its content is looked at when it is read."""
    return path.suffix.lower() in SUFFIXES


def embed(files: Sequence[EmbeddedFile]) -> str:
    """The script element that holds `files`."""
    raws, entries = [], []
    for file in files:
        raw, differences = _recoded(file.raw, _with_differences, _with_times)
        raw, gaps = _recoded(raw, _with_gaps, _with_spans)
        raws.append(raw)
        entries.append({"name": file.name, "bytes": len(raw), "differences": differences, "gaps": gaps})
    packed = lzma.compress(b"".join(raws), preset=6)
    element = {
        "schema": SCHEMA,
        "files": entries,
        "compression": "xz",
        "base64": base64.b64encode(packed).decode(),
    }
    return BEGIN + json.dumps(element).replace("<", "\\u003c") + END


def read_report(path: Path) -> list[EmbeddedFile]:
    """The result files that the report at `path` holds.

    Raises:
        InputError: the file cannot be read, is no report of ours, is of another version, or is damaged.
    """
    page = read_input(path)
    found = _ELEMENT.search(page)
    if found is None:
        raise InputError(f"{path}: {_why_none(page)}")
    try:
        element = _Element.model_validate_json(found[1])
        parse_json(found[1])  # no key twice; after what says which part is wrong
        raw = _unpack(base64.b64decode(element.base64, validate=True), sum(file.bytes for file in element.files))
        files, start = [], 0
        for file in element.files:
            content = raw[start : start + file.bytes]
            content = _with_spans(content) if file.gaps else content
            content = _with_times(content) if file.differences else content
            files.append(EmbeddedFile(Path(file.name).name, content))
            start += file.bytes
    except ValidationError as error:
        raise InputError(f"{path}: {_why(found[1], error)}") from None
    except (binascii.Error, lzma.LZMAError, EOFError, ValueError):
        raise InputError(f"{path}: its results are damaged; make the report again from the result files") from None
    return files


def _recoded(raw: bytes, encode: Callable[[bytes], bytes], decode: Callable[[bytes], bytes]) -> tuple[bytes, bool]:
    """`raw` as `encode` writes it, and true; as it is, and false, where `decode` could not undo that."""
    try:
        coded = encode(raw)
        same = decode(coded) == raw
    except ValueError:  # no numbers, of thousands of digits, or more starts than ends
        same = False
    return (coded, True) if same else (raw, False)


def _with_differences(raw: bytes) -> bytes:
    return _TIMES.sub(partial(_changed, change=_differences), raw)


def _with_times(coded: bytes) -> bytes:
    return _TIMES.sub(partial(_changed, change=accumulate), coded)


def _changed(found: re.Match[bytes], change: Callable[[list[int]], Iterable[int]]) -> bytes:
    return found[1] + _listed(change(_numbers(found[2]))) + b"]"


def _differences(times: list[int]) -> Iterator[int]:
    return (later - earlier for earlier, later in pairwise([0, *times]))


def _with_gaps(raw: bytes) -> bytes:
    """Starts as the time since the end of the span before, ends as durations."""

    def change(found: re.Match[bytes]) -> bytes:
        starts, ends = _numbers(found[2]), _numbers(found[3])
        gaps = (start - before for start, before in zip(starts, [0, *ends[:-1]], strict=True))
        durations = (end - start for start, end in zip(starts, ends, strict=True))
        return found[1] + _listed(gaps) + b'],"end_ns":[' + _listed(durations) + b"]"

    return _SPANS.sub(change, raw)


def _with_spans(coded: bytes) -> bytes:
    def change(found: re.Match[bytes]) -> bytes:
        starts, ends, end = [], [], 0
        for gap, duration in zip(_numbers(found[2]), _numbers(found[3]), strict=True):
            starts.append(end + gap)
            end = starts[-1] + duration
            ends.append(end)
        return found[1] + _listed(starts) + b'],"end_ns":[' + _listed(ends) + b"]"

    return _SPANS.sub(change, coded)


def _numbers(listed: bytes) -> list[int]:
    return [*map(int, listed.split(b","))]


def _listed(numbers: Iterable[int]) -> bytes:
    return b",".join(b"%d" % number for number in numbers)


def _unpack(packed: bytes, num_bytes: int) -> bytes:
    """Exactly `num_bytes` bytes, and never many more in memory, whatever a damaged file unpacks to."""
    if num_bytes > MAX_UNPACKED_BYTES:
        raise ValueError("more than is read")
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    raw = decompressor.decompress(packed, max_length=num_bytes + 1)
    if len(raw) != num_bytes:
        raise ValueError("not as long as it says")
    return raw


def _why_none(page: bytes) -> str:
    """Why there are no results in `page`."""
    if BEGIN.encode() in page or not page.rstrip().endswith(b"</html>"):
        return "is no report, or is cut off: its end is missing; copy it again, or make it again from the result files"
    return "is no report of spdbench: it holds no results"


def _why(raw: bytes, error: ValidationError) -> str:
    try:
        schema = json.loads(raw).get("schema")
    except (ValueError, AttributeError, RecursionError):
        return "its results are not JSON; make the report again from the result files"
    if schema != SCHEMA:
        return f"is a report with schema {str(schema)[:60]}; this spdbench reads {SCHEMA}"
    loc, reason = first_problem(error)
    return f"its results cannot be read: {'.'.join(loc)}: {reason}"
