"""Reads result files in a fraction of the time and memory that their model takes, and believes no more than it does.

Nearly all of a result file is columns of plain numbers. They are cut out of the text and become arrays at once, under
the bounds that `result.py` sets; what is left, a few hundred bytes a run, goes through the model as ever. A file as
spdbench writes it, a run a line, is never in memory as a whole. Where anything is not as expected, be it fine or
damaged, `NotPlain` says so, and the model must read the whole file: it finds the words for what is wrong.

Must not know metrics, nor how results are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import TypeAdapter
from pydantic_core import from_json

from spdbench.judge.results.batch import MAX_RUNS, Batch, batch_of
from spdbench.judge.results.json_columns import NotPlain, floats, integers, require_plain_integers
from spdbench.judge.results.schema import (
    INT64,
    MAX_CHUNK,
    MAX_DEPTH,
    MAX_FORWARDS,
    Result,
    Run,
    RunKey,
    Steps,
    read_result,
)

BUFFER_BYTES = MAX_BATCH_BYTES = 2**20
NAMES = ("output_ids", *Steps.model_fields)
"""A run's columns, in the order in which they are written."""
TIGHT, SPACED = (tuple(f'"{name}":{space}['.encode() for name in NAMES) for space in ("", " "))
FIRST_LINE, RUNS_BEGIN, RUNS_END = b"{\n", b'"runs":[\n', b"],\n"
NOT_JUDGED: dict[str, Any] = {"divergence": None, "summary": {"overall": {}, "by_category": {}}, "flags": []}

_RUNS = TypeAdapter(list[Run])


@dataclass(frozen=True)
class Reading:
    """A result file that is being read: go through `batches`, once, then ask for the `head`, all but the runs.

    Of `start` only what stands before the runs counts. `has_lines` if each run has a line of its own.
    """

    start: Result
    batches: Iterator[Batch]
    head: Callable[[], Result]
    has_lines: bool


@contextmanager
def reading(path: Path) -> Iterator[Reading]:
    """The result in `path`, to be gone through inside.

    Raises:
        NotPlain: now, or from what it yields. `read_result` has to read the file, or to say why it cannot.
    """
    with _unless_plain():
        file = path.open("rb", buffering=BUFFER_BYTES)
    with file:
        yield _by_lines(file) if file.readline(len(FIRST_LINE)) == FIRST_LINE else _as_one(file)


@contextmanager
def _unless_plain() -> Iterator[None]:
    """Whatever may come of a file that is not plainly a result becomes `NotPlain`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError):
        raise NotPlain from None


def _by_lines(file: IO[bytes]) -> Reading:
    """A file as `measure.assemble` writes it: a line for each member of the object, and for each run."""
    before = FIRST_LINE + b"".join(_lines_until(RUNS_BEGIN, file))
    with _unless_plain():
        members = from_json(before + b'"runs":[]}')  # complete, so these are the outermost object's runs
        start = Result.model_validate(members | NOT_JUDGED)

    def head() -> Result:
        with _unless_plain():
            after = file.read()
            if b'"runs"' in after:
                raise NotPlain
            return Result.model_validate_json(before + b'"runs":[],' + after)

    return Reading(start, _batches(_lines_until(RUNS_END, file)), head, has_lines=True)


def _lines_until(last: bytes, file: IO[bytes]) -> Iterator[bytes]:
    while (line := file.readline()) != last:
        if not line:
            raise NotPlain
        yield line


def _batches(lines: Iterable[bytes]) -> Iterator[Batch]:
    """Runs from the `lines` of a result's array, no two of them of one key."""
    keys: set[RunKey] = set()
    num_runs = 0
    for chosen in in_batches(lines):
        chosen[-1] = chosen[-1].removesuffix(b"\n").removesuffix(b",")
        with _unless_plain():
            batch = _read_array(b"".join(chosen))
        keys.update(run.key for run in batch.runs)
        num_runs += len(batch.runs)
        if len(keys) < num_runs:
            raise NotPlain
        yield batch


def _as_one(file: IO[bytes]) -> Reading:
    """A file of any other layout, as a whole."""
    with _unless_plain():
        file.seek(0)
        text = file.read()
        marks = TIGHT if TIGHT[0] in text else SPACED
        rest, columns = _cut(text, marks)
        if marks is SPACED:
            columns = [[column.replace(b", ", b",") for column in named] for named in columns]
        found = Result.model_validate_json(rest)
        batch = _batch(found.runs, columns)
    head = found.model_copy(update={"runs": []})
    return Reading(head, iter([batch]), lambda: head, has_lines=False)


def reread(path: Path) -> tuple[Result, Iterator[tuple[RunKey, bytes]]]:
    """All of a result but its runs, and each run's key and JSON, not all of them at once if it has a line each.

    Raises:
        InputError: the file cannot be read, or is not a result.
    """
    keys: list[RunKey] = []
    try:
        with reading(path) as file:
            for batch in file.batches:
                keys += [run.key for run in batch.runs]
            if file.has_lines:
                return file.head(), zip(keys, _run_lines(path), strict=True)
    except NotPlain:
        pass
    found = read_result(path)
    texts = (json.dumps(run.model_dump(mode="json"), separators=(",", ":")).encode() for run in found.runs)
    return found.model_copy(update={"runs": []}), zip([run.key for run in found.runs], texts, strict=True)


def _run_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for _ in _lines_until(RUNS_BEGIN, file):
            pass
        for line in _lines_until(RUNS_END, file):
            yield line.removesuffix(b"\n").removesuffix(b",")


def read_lines(lines: Sequence[bytes]) -> Batch:
    """Runs, each given as JSON.

    Raises:
        ValidationError: one of them is no run.
    """
    try:
        with _unless_plain():
            return _read_array(b",".join(lines))
    except NotPlain:
        return batch_of([Run.model_validate_json(line) for line in lines])


def in_batches(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """`lines`, as many at a time as a batch holds."""
    chosen: list[bytes] = []
    num_bytes = 0
    for line in lines:
        chosen.append(line)
        num_bytes += len(line)
        if len(chosen) == MAX_RUNS or num_bytes > MAX_BATCH_BYTES:
            yield chosen
            chosen, num_bytes = [], 0
    if chosen:
        yield chosen


def _read_array(text: bytes) -> Batch:
    """The runs of an array, whose brackets `text` lacks."""
    rest, columns = _cut(text, TIGHT)
    return _batch(_RUNS.validate_json(b"[" + rest + b"]"), columns)


def _cut(text: bytes, marks: Sequence[bytes]) -> tuple[bytes, list[list[bytes]]]:
    """`text` with `[k]` for every column of its k-th run, and the columns' own texts: by name, then by run.

    `marks` are what columns begin with. No string can hold one: the quotation marks in it would end that string.
    """
    columns: list[list[bytes]] = [[] for _ in marks]
    rest: list[bytes] = []
    done = num_runs = 0
    while text.find(marks[0], done) >= 0:
        stand_in = b"%d" % num_runs
        for mark, named in zip(marks, columns, strict=True):
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


def _batch(runs: Sequence[Run], columns: Sequence[Sequence[bytes]]) -> Batch:
    """`runs` with the `columns` cut out of their text: checks what `Steps` does, and whose column is whose."""
    if len(columns[0]) != len(runs):
        raise NotPlain
    for number, run in enumerate(runs):
        steps = run.steps
        if not (
            [number] == run.output_ids == steps.t_ns == steps.emitted
            and [number] == steps.drafted == steps.judged == steps.accepted == steps.forwards
        ):
            raise NotPlain
    outputs, *steps_columns = columns
    require_plain_integers(b",".join(filter(None, outputs)))
    (t_ns, num_steps), *others = (
        integers(steps_columns[0], INT64),
        integers(steps_columns[1], MAX_CHUNK),
        *(integers(column, MAX_DEPTH) for column in steps_columns[2:5]),
        floats(steps_columns[5], MAX_FORWARDS),
    )
    (emitted, drafted, judged, accepted, forwards), counts = zip(*others, strict=True)
    if any((count != num_steps).any() for count in counts):
        raise NotPlain
    batch = Batch(runs, outputs, num_steps, t_ns, emitted, drafted, judged, accepted, forwards)
    if not ((accepted <= judged).all() and (judged <= drafted).all() and (np.diff(t_ns)[batch.decodes[1:]] >= 0).all()):
        raise NotPlain
    return batch
