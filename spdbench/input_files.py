"""Reads files that others wrote: whole, within limits, and with one error for everything that can be wrong with them.

A file from outside may be a device without end, a pipe that has no writer, JSON nested so deeply that no parser
survives it, or 400 bytes of YAML that unfold to gigabytes. All readers of such files use these functions.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import select
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from spdbench.errors import InputError

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

Record = TypeVar("Record", bound="BaseModel")

MAX_BYTES = 2**30
"""Of a file that is read whole; data to train on may be larger."""
PIECE_BYTES = 2**24
MAX_UNPACKED_BYTES = 2**28
"""Of a gzipped file, which may be a thousandth of that."""
BOM = b"\xef\xbb\xbf"
"""What Windows' editors write before UTF-8."""
GZIP_MAGIC = b"\x1f\x8b"
NOT_DOWNLOADED = {
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS and not the file, which `git lfs pull` fetches",
    b"<": "a web page",
}
"""How files begin that stand for the one that is meant, and what they are."""
OTHER_CONTENTS = {
    **NOT_DOWNLOADED,
    GZIP_MAGIC: "gzipped twice",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
    b"BZh": "packed by bzip2; unpack it first",
    b"\xfd7zXZ": "packed by xz; unpack it first",
    b"PK\x03\x04": "a ZIP archive; unpack it first",
    b"PAR1": "Parquet, whose name has to end in .parquet",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
"""How files begin that were saved in place of rows of text, and what they are."""
MAX_DEPTH = 100
"""Levels of lists and objects. Python's own code fails at about 1,000, some libraries at 200."""
OTHER_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""What YAML 1.1 takes for a number of base 8 or 60, such as 010 or 1:30, and people for text or a decimal number."""
MAX_YAML_VALUES = 1_000_000
"""With every alias counted as what it stands for."""
PIPE_WAIT_S = 15.0
"""How long the first bytes of a pipe may take."""


def open_input(path: Path, buffer_bytes: int = -1) -> IO[bytes]:
    """The open file or pipe at `path`, for reading.

    Raises:
        InputError: it cannot be read, is a folder or a device, or is a pipe into which nothing is written.
    """
    try:
        # Opening a pipe without a writer would wait for one; the flag has no effect on files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: cannot be read (Is a directory)")
        if stat.S_ISFIFO(mode):
            watch = select.poll()
            watch.register(descriptor, select.POLLIN)
            if not watch.poll(PIPE_WAIT_S * 1000):
                raise InputError(f"{path}: cannot be read (a pipe into which nothing is written)")
        elif not stat.S_ISREG(mode):
            raise InputError(f"{path}: cannot be read (a device, and no regular file)")
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb", buffer_bytes)
    except BaseException:
        os.close(descriptor)
        raise


def read_input(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a file or pipe, at most `limit`.

    Raises:
        InputError: as `open_input`, or there are more.
    """
    pieces: list[bytes] = []
    with open_input(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size  # 0 for a pipe, which is read piece by piece
        at_once = max(num_bytes, PIECE_BYTES)
        try:
            while num_bytes <= limit and (piece := file.read(at_once)):
                pieces.append(piece)
                num_bytes = sum(map(len, pieces))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except MemoryError:
            raise InputError(f"{path}: cannot be read (it does not fit into memory)") from None
    if num_bytes > limit:
        raise InputError(f"{path}: cannot be read (more than {limit:,} bytes)")
    return b"".join(pieces)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: as `read_input`, or it is not JSON that `parse_json` accepts.
    """
    try:
        return parse_json(read_input(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def parse_json(text: bytes | str) -> Any:
    """`text` as JSON, in which no key of an object occurs twice.

    Raises:
        ValueError: it is not JSON, or beyond what can be handled; says which.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _RepeatedKeyError:
        raise
    except ValueError:  # the remaining case: Python does not parse an integer of thousands of digits
        raise ValueError("holds an integer of thousands of digits; write it as text") from None
    raw = text.encode(errors="replace") if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deep(found):
        raise ValueError("nested too deeply")
    return found


def json_record(model: type[Record], text: bytes | str) -> Record:
    """`text` as a record of `model`, a pydantic model, which would take the last of several values of one key.

    Raises:
        ValueError: it is not JSON, has a key twice, or does not fit; pydantic's own error in the last case.
    """
    parse_json(text)
    return model.model_validate_json(text)


def json_rows(raw: bytes, name: str, odd: list[str] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pairs of place (`NAME line 3`) and object: from JSONL, whose blank lines are skipped, or from one JSON array
    (`NAME entry 3`, from 1), both of which may be gzipped. With `odd`, a row that is no object is skipped, and
    the reason is appended there.

    Raises:
        InputError: the file cannot be unpacked, or a line or the array is not UTF-8 or not JSON, or holds anything
            but objects.
    """
    raw = unpacked(raw, name).removeprefix(BOM)
    places: Iterable[tuple[str, Any]]
    if raw.lstrip()[:1] == b"[":
        entries = _parsed(raw, f"{name}: as one JSON array")
        places = ((f"{name} entry {number}", entry) for number, entry in enumerate(entries, start=1))
    else:
        lines = ((f"{name} line {number}", line) for number, line in enumerate(raw.split(b"\n"), start=1))
        places = ((where, _parsed(line, where)) for where, line in lines if line.strip())
        if other := other_content(raw.strip()):
            raise InputError(f"{name}: is {other}; expected one JSON object a line, or one array of them")
    for where, row in places:
        if isinstance(row, dict):
            yield where, row
            continue
        problem = f"{where}: must be a JSON object, not {json.dumps(row)[:40]}"
        if odd is None:
            raise InputError(problem)
        odd.append(problem)


def other_content(raw: bytes) -> str | None:
    """What a file holds that was saved in place of rows of text, as far as its beginning says."""
    if found := next((title for magic, title in OTHER_CONTENTS.items() if raw.startswith(magic)), None):
        return found
    is_object = raw.partition(b"\n")[0].strip() == b"{" and raw.endswith(b"}")
    return "one JSON object over many lines" if is_object else None


def not_downloaded(path: Path) -> str | None:
    """What a file of numbers holds where it is only a text that stands for it; None for anything else."""
    try:
        with open_input(path) as file:
            start = file.read(64)
    except (InputError, OSError):
        return None
    return next((title for magic, title in NOT_DOWNLOADED.items() if start.startswith(magic)), None)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def unpacked(raw: bytes, name: str) -> bytes:
    """`raw` as it was before it was gzipped, if it is; `name` is the file's.

    Raises:
        InputError: it cannot be unpacked, or becomes too large.
    """
    if not raw.startswith(GZIP_MAGIC):
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: broken gzip ({error})") from None
    if len(content) > MAX_UNPACKED_BYTES:
        raise InputError(f"{name}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes; unpack it first")
    return content


class _RepeatedKeyError(ValueError):
    """A key that an object has twice; parsers differ in which of the two they use."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RepeatedKeyError(f"key {repeated[:60]!r} occurs twice")
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level for item in _items(part)]
        if not level:
            return False
    return True


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(raw: bytes | str) -> Any:
    """`raw` as YAML of plain types, in which no key of a mapping occurs twice.

    Raises:
        ValueError: it is not such YAML, a tag does not fit its value, or aliases unfold to more than is sensible; with
            ` line N: ` in front where that is known, else `: `.
    """
    import yaml

    try:
        depth = 0  # counted ahead, since Python's limit of recursion is whatever the process has made it
        for event in yaml.parse(raw, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecursionError
        loader = yaml.SafeLoader(raw)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = str(error.problem)
    except RecursionError:
        line, reason = "", "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        line, reason = "", str(error).partition("\n")[0]
    except (KeyError, TypeError, AttributeError, OverflowError, IndexError):  # of an explicit tag, such as `!!bool x`
        line, reason = "", "a value does not fit its tag, such as !!int; leave the tag out"
    raise ValueError(f"{line}: not YAML that can be read: {reason}") from None


def _is_misread(node: yaml.ScalarNode) -> bool:
    return node.tag.endswith((":int", ":float")) and node.style is None and bool(OTHER_NUMBER.fullmatch(node.value))


def _check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values `node` unfolds to. `sizes` has those of the nodes before it, by identity.

    Raises:
        yaml.MarkedYAMLError: a key occurs twice, a number is not what it looks like, or there are too many values.
    """
    import yaml

    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = 1  # within itself: such an alias is a cycle, and unfolds no further
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.MarkedYAMLError(problem=f"key '{key.value}' occurs twice", problem_mark=key.start_mark)
                seen.add(key.value)
            children += (key, value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.ScalarNode) and _is_misread(node):
        problem = f"{node.value[:40]!r} is another number in YAML, of base 8 or 60; put it into quotes"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    sizes[id(node)] = 1 + sum(_check_node(child, sizes) for child in children)
    if sizes[id(node)] > MAX_YAML_VALUES:
        raise yaml.MarkedYAMLError(problem="aliases unfold to too many values", problem_mark=node.start_mark)
    return sizes[id(node)]
