"""Reads result files in a fraction of the time and memory that the models of `schema.py` take, and as strictly.

Nearly all of a result file is columns of plain numbers. They are cut out of the text and become arrays at once, under
the bounds that the schema sets; what is left, a few hundred bytes a run, is validated by the models. A file as
spdbench writes it, a run a line, is never in memory as a whole. Where anything is not as expected, fine or damaged,
`NotPlain` makes the models read the whole file: their messages name what is wrong. (Parsing all numbers with
`pydantic_core.from_json` instead takes twice the time.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic_core import from_json

from spdbench.input_files import json_record, open_input, parse_json
from spdbench.judge.results.schema import (
    INT64,
    MAX_CHUNK,
    MAX_DEPTH,
    MAX_FORWARDS,
    Result,
    Run,
    RunKey,
    read_result,
    times_agree,
)
from spdbench.judge.results.table import RunTable, StepArrays, build_table, join_tables, table_from

BUFFER_BYTES = MAX_BATCH_BYTES = 2**20
MAX_RUNS = 256
"""Runs in a batch: enough that a call of numpy costs next to nothing a run, and few enough to hold at once."""
MARKS = tuple(f'"{name}":['.encode() for name in ("output_ids", *StepArrays._fields))
"""The beginnings of a run's columns, in the order in which they are written."""
MAX_DIGITS = 18
"""What fits into 64 bits whatever the digits are."""
DETAILS = (b'"spans":{', b'"drafted_tokens":{')
"""In the JSON of a run that holds details; no string can hold them, as in `MARKS`."""
COMMA, ZERO = ord(","), ord("0")
FLOAT_CHARACTERS = b"0123456789.,+-eE "
FIRST_LINE, RUNS_BEGIN, RUNS_END = b"{\n", b'"runs":[\n', b"],\n"

_RUNS = TypeAdapter(list[Run])


class NotPlain(Exception):  # noqa: N818 - no error: only not for this reader
    """The text may be fine or damaged; it is not of the plain kind that is read here."""


def read_runs(path: Path, *, keep_ids: bool = False, raw: bytes | None = None) -> tuple[Result, RunTable]:
    """The result in `path`, in one pass: all of it but the runs, and the runs in columns.

    `raw` is the file's content where that is in memory already; `path` is its name in messages then.

    Raises:
        InputError: the file cannot be read, or is not a result.
    """
    try:
        return read_plain(path, keep_ids=keep_ids, raw=raw)
    except NotPlain:
        result = read_result(path, raw)
        return result.model_copy(update={"runs": []}), table_from(result.runs, keep_ids=keep_ids)


def read_plain(path: Path, *, keep_ids: bool = False, raw: bytes | None = None) -> tuple[Result, RunTable]:
    """`read_runs` of a file as `measure.assemble` writes it: a line for each member of the object, and for each run.

    Raises:
        NotPlain: the file is not plainly so; `read_result` has to read it, or to say why it cannot.
    """
    with _not_plain_unless_valid(), open_input(path, BUFFER_BYTES) if raw is None else BytesIO(raw) as file:
        if file.readline(len(FIRST_LINE)) != FIRST_LINE:
            raise NotPlain
        before = FIRST_LINE + b"".join(_lines_until(RUNS_BEGIN, file))
        from_json(before + b'"runs":[]}')  # complete, so these are the outermost object's runs
        table = join_tables(_read_batches(_lines_until(RUNS_END, file), keep_ids=keep_ids))
        after = file.read()
        if b'"runs"' in after or len(table.row_of) < len(table.keys):
            raise NotPlain
        head = before + b'"runs":[],' + after
        return json_record(Result, head), table


@contextmanager
def _not_plain_unless_valid() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError):
        raise NotPlain from None


def _lines_until(last: bytes, file: IO[bytes]) -> Iterator[bytes]:
    while (line := file.readline()) != last:
        if not line:
            raise NotPlain
        yield line


def _read_batches(lines: Iterable[bytes], *, keep_ids: bool) -> Iterator[RunTable]:
    for batch in in_batches(lines):
        batch[-1] = _without_comma(batch[-1])
        yield _read_array(b"".join(batch), keep_ids=keep_ids)


def _without_comma(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b",")


def reread(path: Path, raw: bytes | None = None) -> tuple[Result, Iterator[tuple[RunKey, bytes]]]:
    """All of a result but its runs, and each run's key and JSON; the runs are read one by one where possible.

    `raw` is as in `read_runs`.

    Raises:
        InputError: the file cannot be read, or is not a result.
    """
    try:
        head, table = read_plain(path, raw=raw)
        return head, zip(table.keys, _run_lines(path, raw), strict=True)
    except NotPlain:
        found = read_result(path, raw)
        texts = (json.dumps(run.model_dump(mode="json"), separators=(",", ":")).encode() for run in found.runs)
        return found.model_copy(update={"runs": []}), zip([run.key for run in found.runs], texts, strict=True)


def read_detailed_runs(path: Path, raw: bytes | None = None) -> Iterator[Run]:
    """The runs of a result that hold spans or drafted tokens, one by one; the others are skipped as text.

    Raises:
        InputError: as `reread`.
    """
    for _, line in reread(path, raw)[1]:
        if any(mark in line for mark in DETAILS):
            yield Run.model_validate_json(line)


def _run_lines(path: Path, raw: bytes | None) -> Iterator[bytes]:
    with path.open("rb") if raw is None else BytesIO(raw) as file:
        for _ in _lines_until(RUNS_BEGIN, file):
            pass
        yield from map(_without_comma, _lines_until(RUNS_END, file))


def read_lines(lines: Sequence[bytes]) -> RunTable:
    """Runs, each given as JSON.

    Raises:
        ValidationError: one of them is no run.
    """
    try:
        with _not_plain_unless_valid():
            return _read_array(b",".join(lines), keep_ids=False)
    except NotPlain:
        return table_from([Run.model_validate_json(line) for line in lines])


def in_batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """`lines`, as many at a time as a batch holds."""
    batch: list[bytes] = []
    num_bytes = 0
    for line in lines:
        batch.append(line)
        num_bytes += len(line)
        if len(batch) == MAX_RUNS or num_bytes > MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _read_array(text: bytes, *, keep_ids: bool) -> RunTable:
    """The runs of an array, whose brackets `text` lacks."""
    rest, columns = _cut(text)
    array = b"[" + rest + b"]"
    parse_json(array)  # no key twice, which pydantic would pass over
    runs = _RUNS.validate_json(array)
    if len(columns[0]) != len(runs):
        raise NotPlain
    for number, run in enumerate(runs):  # is each column that of its own run
        if not all(column == [number] for column in (run.output_ids, *(values for _, values in run.steps))):
            raise NotPlain
    num_steps, steps = _read_columns(columns)
    require_plain_integers(b",".join(filter(None, columns[0])))
    _require_totals(runs, columns[0], num_steps, steps)
    return build_table(runs, columns[0], num_steps, steps, keep_ids=keep_ids)


def _require_totals(runs: Sequence[Run], outputs: Sequence[bytes], num_steps: Any, steps: StepArrays) -> None:
    """`schema.require_totals` of all `runs`, whose ids and steps are in `outputs` and `steps`; raises `NotPlain`."""
    ends = np.cumsum(num_steps)
    emitted = np.concatenate([[0], np.cumsum(steps.emitted)])
    emitted = emitted[ends] - emitted[ends - num_steps]
    new_tokens = np.array([run.num_new_tokens for run in runs], dtype=np.int64)
    num_ids = np.array([text.count(b",") + 1 if text else 0 for text in outputs], dtype=np.int64)
    if (new_tokens != emitted).any() or ((num_ids > 0) & (num_ids != emitted)).any():
        raise NotPlain
    rows = np.flatnonzero((emitted > 0) & np.array([run.finish_reason != "error" for run in runs], dtype=np.bool_))
    places = np.flatnonzero(steps.emitted)  # of steps with tokens; each of these runs has one
    first = places[np.searchsorted(places, (ends - num_steps)[rows])]
    last = places[np.searchsorted(places, ends[rows]) - 1]
    for row, begin, end in zip(rows.tolist(), steps.t_ns[first].tolist(), steps.t_ns[last].tolist(), strict=True):
        if not (times_agree(runs[row].ttft_s, begin) and times_agree(runs[row].decode_s, end - begin)):
            raise NotPlain


def _cut(text: bytes) -> tuple[bytes, list[list[bytes]]]:
    """`text` with `[k]` for every column of its k-th run, and the columns' own texts: by name, then by run.

    No string can hold the beginning of a column: the quotation marks in it would end that string.
    """
    columns: list[list[bytes]] = [[] for _ in MARKS]
    rest: list[bytes] = []
    done = num_runs = 0
    while text.find(MARKS[0], done) >= 0:
        stand_in = b"%d" % num_runs
        for mark, named in zip(MARKS, columns, strict=True):
            begin = text.find(mark, done) + len(mark)
            end = text.find(b"]", begin)
            if begin < len(mark) or end < 0:
                raise NotPlain
            named.append(text[begin:end])
            rest += (text[done:begin], stand_in)
            done = end
        num_runs += 1
    rest.append(text[done:])
    return b"".join(rest), columns


def _read_columns(columns: Sequence[Sequence[bytes]]) -> tuple[Any, StepArrays]:
    """The number of steps of each run, and all steps, of columns cut out by `_cut`: checks what `Steps` does."""
    (t_ns, num_steps), *others = (
        integers(columns[1], INT64),
        integers(columns[2], MAX_CHUNK),
        *(integers(column, MAX_DEPTH) for column in columns[3:6]),
        floats(columns[6], MAX_FORWARDS),
    )
    if any((count != num_steps).any() for _, count in others):
        raise NotPlain
    steps = StepArrays(t_ns, *(cast("Any", values) for values, _ in others))
    first = np.cumsum(num_steps)[:-1]
    backwards = np.diff(t_ns) < 0
    backwards[first[(first > 0) & (first < len(t_ns))] - 1] = False  # between two runs
    if backwards.any() or (steps.accepted > steps.judged).any() or (steps.judged > steps.drafted).any():
        raise NotPlain
    return num_steps, steps


# Columns: the text between the brackets of a JSON array of numbers


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
