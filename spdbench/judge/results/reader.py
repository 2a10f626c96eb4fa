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
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from pydantic import TypeAdapter
from pydantic_core import from_json

from spdbench.input_files import open_input
from spdbench.judge.results.json_columns import NotPlain, floats, integers, require_plain_integers
from spdbench.judge.results.schema import INT64, MAX_CHUNK, MAX_DEPTH, MAX_FORWARDS, Result, Run, RunKey, read_result
from spdbench.judge.results.table import RunTable, StepArrays, build_table, join_tables, table_from

BUFFER_BYTES = MAX_BATCH_BYTES = 2**20
MAX_RUNS = 256
"""Runs in a batch: enough that a call of numpy costs next to nothing a run, and few enough to hold at once."""
MARKS = tuple(f'"{name}":['.encode() for name in ("output_ids", *StepArrays._fields))
"""The beginnings of a run's columns, in the order in which they are written."""
FIRST_LINE, RUNS_BEGIN, RUNS_END = b"{\n", b'"runs":[\n', b"],\n"

_RUNS = TypeAdapter(list[Run])


def read_runs(path: Path, *, keep_ids: bool = False) -> tuple[Result, RunTable]:
    """The result in `path`, in one pass: all of it but the runs, and the runs in columns.

    Raises:
        InputError: the file cannot be read, or is not a result.
    """
    try:
        return read_plain(path, keep_ids=keep_ids)
    except NotPlain:
        result = read_result(path)
        return result.model_copy(update={"runs": []}), table_from(result.runs, keep_ids=keep_ids)


def read_plain(path: Path, *, keep_ids: bool = False) -> tuple[Result, RunTable]:
    """`read_runs` of a file as `measure.assemble` writes it: a line for each member of the object, and for each run.

    Raises:
        NotPlain: the file is not plainly so; `read_result` has to read it, or to say why it cannot.
    """
    with _not_plain_unless_valid(), open_input(path, BUFFER_BYTES) as file:
        if file.readline(len(FIRST_LINE)) != FIRST_LINE:
            raise NotPlain
        before = FIRST_LINE + b"".join(_lines_until(RUNS_BEGIN, file))
        from_json(before + b'"runs":[]}')  # complete, so these are the outermost object's runs
        table = join_tables(_read_batches(_lines_until(RUNS_END, file), keep_ids=keep_ids))
        after = file.read()
        if b'"runs"' in after or len(table.row_of) < len(table.keys):
            raise NotPlain
        return Result.model_validate_json(before + b'"runs":[],' + after), table


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


def reread(path: Path) -> tuple[Result, Iterator[tuple[RunKey, bytes]]]:
    """All of a result but its runs, and each run's key and JSON; the runs are read one by one where possible.

    Raises:
        InputError: the file cannot be read, or is not a result.
    """
    try:
        head, table = read_plain(path)
        return head, zip(table.keys, _run_lines(path), strict=True)
    except NotPlain:
        found = read_result(path)
        texts = (json.dumps(run.model_dump(mode="json"), separators=(",", ":")).encode() for run in found.runs)
        return found.model_copy(update={"runs": []}), zip([run.key for run in found.runs], texts, strict=True)


def _run_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
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
    runs = _RUNS.validate_json(b"[" + rest + b"]")
    if len(columns[0]) != len(runs):
        raise NotPlain
    for number, run in enumerate(runs):  # is each column that of its own run
        if not all(column == [number] for column in (run.output_ids, *(values for _, values in run.steps))):
            raise NotPlain
    num_steps, steps = _read_columns(columns)
    require_plain_integers(b",".join(filter(None, columns[0])))
    return build_table(runs, columns[0], num_steps, steps, keep_ids=keep_ids)


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
