"""`spdbench results`: the result files of a folder, listed, filtered, deleted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import result_paths, write_stdout
from spdbench.cli.options import argument, complete_files, flag, option, takes
from spdbench.cli.terminal import start_quickly
from spdbench.console import counted, say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "results"
DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M"])


@dataclass(frozen=True, kw_only=True)
class ResultsOptions:
    """Which results, and what becomes of them."""

    results: tuple[str, ...] = argument("[RESULT]...", nargs=-1, shell_complete=complete_files)
    suite: str | None = option("--suite", None, "NAME", "Only of suites of this name or pattern, such as 'mt*'.")
    model: str | None = option("--model", None, "NAME", "Only of models of this name or pattern.")
    backend: str | None = option("--backend", None, "NAME", "Only of backends or labels of this name or pattern.")
    since: datetime | None = option("--since", DATE, "DATE", "Only from this day (2026-11-29, UTC) on.")
    before: datetime | None = option("--before", DATE, "DATE", "Only from before this day.")
    delete: bool = flag("--delete", "Delete the files that are listed, after a question.")
    yes: bool = flag("--yes", "Delete without a question.")
    as_json: bool = flag("--json", "Print JSON.")


@dataclass(frozen=True)
class Listing:
    """One file. With an `error` it cannot be read, and nothing else is known of it. `created` is ISO 8601, UTC."""

    file: str
    error: str | None = None
    created: str | None = None
    suite: str | None = None
    label: str | None = None
    backend: str | None = None
    model: str | None = None
    num_requests: int = 0
    num_failed: int = 0
    decode_tokens_per_s: float | None = None

    def fits(self, options: ResultsOptions) -> bool:
        """True if every filter lets it pass; a file that cannot be read passes only where there is none."""
        patterns = (
            (options.suite, (self.suite,)),
            (options.model, (self.model,)),
            (options.backend, (self.backend, self.label)),
        )
        for pattern, names in patterns:
            if pattern is not None and not any(name is not None and fnmatchcase(name, pattern) for name in names):
                return False
        if options.since is None and options.before is None:
            return True
        created = _moment(self.created)
        return created is not None and not (
            (options.since is not None and created < options.since.replace(tzinfo=UTC))
            or (options.before is not None and created >= options.before.replace(tzinfo=UTC))
        )


@click.command("results", short_help="List result files, filter them, delete them.")
@takes(ResultsOptions)
def command(options: ResultsOptions) -> None:
    """List the result files in the folder `results`, or those of RESULT: a file, a pattern or a folder.

    Filters take names, or patterns with * and ?. With --delete the files that the filters let pass are deleted, after a
    question; files that are no results never are.
    """
    start_quickly()
    if options.yes and not options.delete:
        raise InputError("--yes: answers the question of --delete, which is not given")
    if options.delete and options.as_json:
        raise InputError("--json: goes without --delete")
    from rich.console import Console

    from spdbench.judge.loaded import share_out

    paths = list(result_paths(options.results or [FOLDER]))
    if gone := next((path for path in paths if not os.path.lexists(path)), None):
        raise InputError(f"{gone}: no such file or folder")
    listed = share_out(_listing, paths)
    found = sorted((each for each in listed if each.fits(options)), key=lambda each: (_age(each), each.file))
    if options.as_json:
        write_stdout(json.dumps([vars(each) for each in found], indent=2) + "\n")
        return
    if not found:
        say(f"No result fits, of {counted(len(listed), 'file')}.")
        return
    write_stdout(_table(found, Console(file=sys.stdout)))
    if options.delete:
        _delete([each for each in found if each.error is None], sure=options.yes)


def _listing(path: Path) -> Listing:
    from spdbench.judge.loaded import LoadedResult
    from spdbench.judge.results.reader import read_runs

    try:
        result = LoadedResult(str(path), *read_runs(path))
    except InputError as error:
        return Listing(str(path), str(error).removeprefix(f"{path}: "))
    head, metrics = result.head, result.metrics
    return Listing(
        str(path),
        None,
        head.created,
        head.suite.name,
        result.label,
        head.backend.name,
        head.model.id,
        len(result.runs.keys),
        metrics["num_failed"],
        metrics["decode_tokens_per_s"],
    )


def _moment(text: str | None) -> datetime | None:
    """The moment that a file names, in UTC; None where it names none."""
    try:
        found = datetime.fromisoformat(text or "")
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _age(listing: Listing) -> datetime:
    return _moment(listing.created) or datetime.min.replace(tzinfo=UTC)


def _table(found: Sequence[Listing], console: Console) -> str:
    from rich.text import Text

    from spdbench.render.columns import EMPTY, capture, harmless, plain_grid

    headers = ("created (UTC)", "suite", "label", "model", "requests", "tok/s", "file")
    grid = plain_grid([(header, header in ("requests", "tok/s")) for header in headers])
    grid.columns[0].no_wrap = True
    folders = {str(Path(each.file).parent) for each in found}
    heading = harmless(f"{folders.pop()}:") + "\n" if len(folders) == 1 else ""
    for each in found:
        file = Path(each.file).name if heading else each.file
        if each.error is not None:
            cells = [EMPTY, "unreadable", *[""] * 4, file]
        else:
            moment, speed = _moment(each.created), each.decode_tokens_per_s
            cells = [
                moment.strftime("%Y-%m-%d %H:%M") if moment else each.created or EMPTY,
                *(text or EMPTY for text in (each.suite, each.label, each.model)),
                f"{each.num_requests}" + (f" ({each.num_failed} failed)" if each.num_failed else ""),
                EMPTY if speed is None else f"{speed:.1f}",
                file,
            ]
        grid.add_row(*(Text(harmless(cell), overflow="fold") for cell in cells))
    errors = [f"{harmless(each.file)}: {harmless(each.error)}" for each in found if each.error is not None]
    return heading + capture(console, grid) + "".join(f"{line}\n" for line in errors)


def _delete(found: Sequence[Listing], *, sure: bool) -> None:
    """Deletes the files of `found`, once the user has agreed.

    Raises:
        InputError: nobody can be asked, or a file cannot be deleted.
    """
    if not found:
        raise InputError("--delete: none of these files is a result that can be read; delete others by hand")
    if not sure:
        if not sys.stdin.isatty():
            raise InputError(
                "--delete: asks first, and there is no terminal to ask at; add --yes to delete these files"
            )
        if not click.confirm(f"Delete {len(found)} files?", err=True):
            say("Nothing is deleted.")
            return
    for each in found:
        try:
            Path(each.file).unlink()
        except OSError as error:
            raise InputError(f"{each.file}: cannot be deleted ({error.strerror})") from None
    say(f"Deleted {counted(len(found), 'file')}.")
