"""The result files that a command line names, and text written to stdout or to a file."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.input_files import read_input
from spdbench.output_files import replaced_file, write_obstacle

if TYPE_CHECKING:
    from spdbench.judge.gate.calibration import Calibration
    from spdbench.judge.results.schema import Result

CALIBRATION = "calibration.json"
"""What `check --calibrate` leaves in a folder of results; no result itself."""
NOT_IN_FILE_NAMES = r"""[\x00-\x1f"*/:<>?\\|\x7f\ud800-\udfff]"""
"""Characters of a model's name that some file systems and upload steps refuse in a file's name."""
MAX_PART_BYTES = 120
MAX_NAME_BYTES = 255
LONGEST_ENDING = ".journal.jsonl.old.part"


def result_paths(words: Sequence[str]) -> Iterator[Path]:
    """The files that `words` mean: themselves, what a pattern matches, or the `*.json` of a folder.

    Raises:
        InputError: a pattern or a folder gives no file.
    """
    for word in words:
        path = Path(word)
        if os.path.isdir(path):  # `Path.is_dir` raises for names that are too long
            found = _results(path.glob("*.json"))
            if not found:
                raise InputError(f"{word}: no result files (*.json) in this folder")
            yield from found
        elif glob.has_magic(word) and not os.path.exists(path):
            matches = _results(map(Path, glob.glob(_pattern(path), recursive=True)))
            if not matches:
                raise InputError(f"{word}: no file matches this pattern")
            yield from matches
        else:
            yield path


def _pattern(path: Path) -> str:
    """`path` as a pattern in which the folders that exist by their very names, brackets included, mean themselves."""
    known, *parts = Path(path.anchor), *path.relative_to(path.anchor).parts
    while parts and os.path.exists(known / parts[0]):
        known /= parts.pop(0)
    return os.path.join(glob.escape(str(known)), *parts)


def _results(paths: Iterator[Path]) -> list[Path]:
    """The files in `paths` that are meant to be results. Hidden ones are not, such as macOS's `._NAME.json`."""
    shown = (path for path in paths if path.name != CALIBRATION and not path.name.startswith("."))
    return sorted(path for path in shown if not _is_findings(path))


def _is_findings(path: Path) -> bool:
    """True for what `check --json` writes."""
    try:
        with path.open("rb") as file:
            return b'"spdbench.check/' in file.read(64)
    except OSError:  # reading it raises the error
        return False


def read_calibration(path: Path) -> Calibration | None:
    """The calibration at `path`, if there is one.

    Raises:
        InputError: it cannot be read.
    """
    from spdbench.judge.gate.calibration import parse_calibration

    try:
        return parse_calibration(read_input(path)) if os.path.lexists(path) else None
    except ValueError as error:
        raise InputError(f"{path}: is no calibration ({error}); remove it or make it anew with --calibrate") from None


def file_identity(path: Path) -> object:
    """Equal for two names of one file, which may be links; the absolute path of a file that is not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return os.path.abspath(path)
    return found.st_dev, found.st_ino


def require_free_output(out: Path, inputs: Sequence[Path], *, force: bool, option: str = "-o") -> None:
    """Raises `InputError` where `option` names a file that must not be written: without a folder, one of the `inputs`,
    or there already and not to be replaced by `force`."""
    if not out.parent.is_dir():
        raise InputError(f"{option} {out}: the folder {out.parent} does not exist; make it first")
    if file_identity(out) in map(file_identity, inputs):
        raise InputError(f"{option} {out}: is one of the results; choose another file")
    if out.exists() and not force:
        raise InputError(f"{option} {out}: exists already; choose another file, or replace it with --force")


def write_stdout(content: str | bytes) -> None:
    """`content` to stdout, flushed, so that a full disk is noticed here; a closed pipe (`| head`) is no error."""
    try:
        click.echo(encodable(content) if isinstance(content, str) else content, nl=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def encodable(text: str) -> str:
    """`text` with `?` for what the encoding of stdout lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def show_text(text: str, write: Callable[[str], None] = write_stdout) -> None:
    """`text` by `write` to stdout; in the pager (`PAGER`) where a terminal has fewer lines than it."""
    if sys.stdin.isatty() and sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        click.echo_via_pager(text.removesuffix("\n"))  # which ends it with a line break
    else:
        write(text)


def require_replaceable(option: str, path: Path, schema: str) -> None:
    """Raises `InputError` where `write_file` could not write, or would replace a file that is not of `schema`: found
    before the work whose outcome goes there."""
    try:
        if not path.is_file():  # a device or a pipe is opened only once
            with contextlib.nullcontext() if path.exists() else tempfile.TemporaryFile(dir=path.parent):
                return
        with path.open("r+b") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})") from None
    if start and schema.encode() not in start:
        raise InputError(f"{option} {path}: is a file of another kind, which would be lost; choose another name")


def write_file(option: str, path: Path, text: str) -> None:
    """`text` to the file that `option` names; names of files that are not UTF-8 in it get escapes.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})") from None


def write_whole_file(option: str, path: Path, content: bytes) -> None:
    """`content` to the file that `option` names, all of it or none: an older file is replaced at the last moment.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with replaced_file(path) as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})") from None


def require_writable(folder: Path) -> None:
    """Raises `InputError` where no results can be written to `folder`, which is made if it is not there."""
    from spdbench.measure.journal import Journal

    if (error := write_obstacle(folder)) is not None:
        raise Journal.write_error(folder, error)


def result_path(folder: Path, work: str, label: str, model_id: str, name: str | None) -> Path:
    """Where what `label` did of a suite or of tasks goes; `name` tells runs apart.

    Earlier versions replaced nothing but `/` in the model's name; a result or journal of that name is still used.

    Raises:
        InputError: no file can have that name.
    """

    def path(model: str) -> Path:
        return folder / f"{'__'.join(filter(None, [work, label, model, name]))}.json"

    old = path(model_id.replace("/", "-"))
    is_there = os.path.exists(old) or os.path.exists(old.with_name(f"{old.stem}.journal.jsonl"))
    found = old if is_there else path(_shortened(re.sub(NOT_IN_FILE_NAMES, "-", model_id)))
    if (length := len(os.fsencode(found.stem + LONGEST_ENDING))) > MAX_NAME_BYTES:
        raise InputError(
            f"{found.stem[:60]}...: the names of suite, label, model and --name make a file name of {length} bytes, "
            f"and {MAX_NAME_BYTES} are possible; choose a shorter label or --name"
        )
    return found


def _shortened(text: str) -> str:
    """`text`, or as much of it as a file's name has room for, with a hash that tells it from other long ones."""
    if len(text.encode()) <= MAX_PART_BYTES:
        return text
    kept = text.encode()[:MAX_PART_BYTES].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def keep_former(path: Path, new: Result) -> None:
    """Renames a result at `path` that is of other work or other options than the one about to replace it. Only the head
    of `new` counts."""
    from spdbench.judge.comparison.pairing import differences
    from spdbench.judge.loaded import read_results
    from spdbench.measure.privacy import names_only

    if not path.is_file():
        return
    try:
        former = read_results([path])[0].head
    except InputError:  # no result, or a damaged one
        return
    options = names_only(new.backend.options)
    changed = [key for key, value in options.items() if former.backend.options.get(key) != value]
    found = [*differences(new, former), *(f"-o {new.backend.label}.{key}" for key in changed)]
    if found:
        kept = path.with_name(f"{path.name}.old")
        path.replace(kept)
        say(f"NOTE: {path} was of other settings ({'; '.join(found)}); it is kept as {kept.name}. --name keeps both.")
