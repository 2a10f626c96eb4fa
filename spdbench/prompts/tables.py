"""Rows of prompts from local files: JSONL or a JSON array, CSV or TSV, Parquet. The file's name says which.

All but Parquet may be gzipped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spdbench.errors import InputError, brief, did_you_mean, install_command
from spdbench.input_files import json_rows, not_downloaded, other_content, read_input, unpacked
from spdbench.prompts.rows import SourceUnavailable

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 2**28
"""In characters. The csv module's own limit is 128 KiB, which one long document exceeds."""


def file_rows(
    path: Path, required: Sequence[str], optional: Sequence[str], odd: list[str] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pairs of place and row. Of a Parquet file, only the columns that are named are read. With `odd`, entries of JSON
    that are no rows are skipped, and the reason is appended there.

    Raises:
        SourceUnavailable: a Parquet file, and no pyarrow.
        InputError: the file cannot be read, or is not what its name says.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in DELIMITERS:
        yield from _csv_rows(unpacked(read_input(path), str(path)), str(path), DELIMITERS[suffix])
    elif suffix == ".parquet":
        rows = parquet_rows(path, str(path), required, optional)
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))
    else:
        yield from json_rows(read_input(path), str(path), odd)


def parquet_rows(path: Path, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of one Parquet file, with those columns only. `name` is the file's in messages.

    Raises:
        SourceUnavailable: no pyarrow.
        InputError: a required column is missing, or the file is not Parquet.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceUnavailable(f"needs pyarrow ({error})", install_command("spdbench[hub]")) from None
    try:
        known = parquet.read_schema(path).names
        for column in required:
            if column not in known:
                raise InputError(f"{name}: has no column '{column}'{did_you_mean(column, known)}")
        columns = [*required, *(column for column in optional if column in known)]
        table = parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        why = not_downloaded(path)
        raise InputError(f"{path}: {f'is {why}' if why else f'not a readable parquet file ({brief(error)})'}") from None
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
    except Exception as error:  # of text that is not UTF-8, and of times that Python has not
        raise InputError(f"{path}: holds values that cannot be read ({brief(error)})") from None
    return rows


def _csv_rows(raw: bytes, name: str, delimiter: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows by the names in the first line. An empty cell is None: CSV does not tell it from an empty text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name}: is {other_content(raw) or 'not UTF-8'}") from None
    usual = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if repeated := next((column for column in header if header.count(column) > 1), None):
            raise InputError(f"{name} line 1: column {repeated[:60]!r} occurs twice")
        for cells in reader:
            where = f"{name} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(f"{where}: has {len(cells)} cells, and the first line names {len(header)} columns")
            yield where, {column: cell or None for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(usual)
