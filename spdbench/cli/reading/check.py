"""`spdbench check`: result files in, a verdict and an exit code out. Only parses the command line, reads and writes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import CALIBRATION, file_identity, read_calibration, result_paths, write_file, write_stdout
from spdbench.cli.options import OUTPUT, PERCENT, argument, complete_files, flag, option, takes
from spdbench.cli.parameters import FILES
from spdbench.cli.terminal import start_quickly
from spdbench.console import say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.judge.gate.verdict import Judgement
    from spdbench.judge.loaded import LoadedResult
MARKS = {
    "junit": b'<testsuites name="spdbench check"',
    "summary": b"### spdbench check",
    "json_file": b'"spdbench.check/',
    "benchmark_json": b'[\n  {\n    "name": ',
}
"""What is near the beginning of each file that is written."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is judged, by what limits, and what is written."""

    results: tuple[str, ...] = argument("NEW...", nargs=-1, required=True, shell_complete=complete_files)
    baseline: str = option("--baseline", FILES, "FILE|DIR", "The results that NEW must not fall behind.", required=True)
    gate: str = option(
        "--gate",
        click.Choice(["exact", "timing", "all"]),
        None,
        "exact: ids, steps, acceptance, on any machine; timing: speed, on the baseline's machine.",
        "all",
    )
    max_slowdown: float | None = option(
        "--max-slowdown", PERCENT, "5%", "How much slower it may be. [default: what --calibrate found, else 5%]"
    )
    max_acceptance_drop: float | None = option(
        "--max-acceptance-drop",
        PERCENT,
        "0.5%",
        "How far acceptance may fall; in greedy float32 not at all. [default: 0.5%]",
    )
    by: str | None = option("--by", click.Choice(["category"]), None, "What each category shows as well.")
    calibrate: bool = flag(
        "--calibrate",
        "NEW are runs of the same code, at least 5: find the slowdown that is noise, and keep it with the baseline.",
    )
    junit: Path | None = option("--junit", OUTPUT, "FILE", "Write JUnit XML as well.")
    summary: Path | None = option("--summary", OUTPUT, "FILE", "Write Markdown as well, for a CI job's page.")
    json_file: Path | None = option("--json", OUTPUT, "FILE", "Write every finding as JSON as well.")
    benchmark_json: Path | None = option(
        "--benchmark-json", OUTPUT, "FILE", "Write what github-action-benchmark reads, bigger is better."
    )

    @property
    def outputs(self) -> dict[str, Path | None]:
        """The files to write, by the field that names each."""
        return {name: getattr(self, name) for name in ("junit", "summary", "json_file", "benchmark_json")}


@click.command("check", short_help="Judge results against a baseline, for CI.")
@takes(CheckOptions)
def command(options: CheckOptions) -> None:
    """Judge results against a baseline, label by label. Needs no model.

    NEW is a result file, a pattern, or a folder of result files. Exit codes: 0 fine; 1 regression, divergence or
    failed prompt; 2 wrong usage or input; 3 inconclusive; 4 not comparable. Where several hold: 2, then 1, 4, 3.
    """
    start_quickly()
    from spdbench.judge.gate.check import GATES, MAX_ACCEPTANCE_DROP, Limits, check
    from spdbench.judge.gate.verdict import EXIT_CODES, verdict_of
    from spdbench.judge.loaded import read_results

    baseline, max_drop = Path(options.baseline), options.max_acceptance_drop
    folder = baseline if os.path.isdir(baseline) else baseline.parent
    new = list(result_paths(options.results))
    if options.calibrate:
        judging = {"max_slowdown": options.max_slowdown, "max_acceptance_drop": max_drop, "by": options.by}
        _refuse_with_calibrate({**judging, **options.outputs})
        _calibrate(read_results(new, keep_ids=True), baseline, folder)
        return
    old = list(result_paths([options.baseline]))
    _refuse_to_overwrite(options.outputs, [*new, *old], folder / CALIBRATION)
    candidates, baselines = read_results(new, keep_ids=True), read_results(old, keep_ids=True)
    limits = Limits(
        options.max_slowdown,
        MAX_ACCEPTANCE_DROP if max_drop is None else max_drop,
        read_calibration(folder / CALIBRATION) if "timing" in GATES[options.gate] else None,
    )
    judgements = check(candidates, baselines, GATES[options.gate], limits, by_category=options.by == "category")
    _show(judgements, **options.outputs)
    _tell_not_covered(candidates, baselines)
    click.get_current_context().exit(EXIT_CODES[verdict_of(judgements)])


def _tell_not_covered(candidates: Sequence[LoadedResult], baselines: Sequence[LoadedResult]) -> None:
    """Notes baselines that were not judged: several jobs may share a baseline, each with part of its work."""
    from spdbench.judge.gate.counterpart import not_covered

    if left := not_covered(candidates, baselines):
        work = sorted({f"{each.head.suite.name} in {each.head.model.dtype}" for each in left})
        say(
            f"NOTE: {len(left)} of {len(baselines)} baseline results are of work that NEW holds nothing of, and were "
            f"not judged: {', '.join(work)}, or with other decoding."
        )


def _option(name: str) -> str:
    return "--" + name.removesuffix("_file").replace("_", "-")


def _refuse_with_calibrate(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise click.UsageError(f"{_option(name)} has no effect with --calibrate, which judges nothing")


def _refuse_to_overwrite(outputs: Mapping[str, Path | None], inputs: Sequence[Path], calibration: Path) -> None:
    """Every output needs a file of its own: none of the results, not the calibration, and no file of another kind."""
    taken = {file_identity(path): "is one of the results" for path in inputs}
    taken[file_identity(calibration)] = "is the calibration, which --calibrate writes"
    for name, path in outputs.items():
        if path is not None:
            if (place := file_identity(path)) in taken:
                raise InputError(f"{_option(name)} {path}: {taken[place]}; choose another file")
            taken[place] = f"is what {_option(name)} writes, too"
            if not _is_free(name, path):
                raise InputError(
                    f"{_option(name)} {path}: is there, and no earlier check wrote it; choose another file"
                )


def _is_free(name: str, path: Path) -> bool:
    """True for a file that is not there, is empty, or that an earlier check wrote; a Markdown page may be another's."""
    if not os.path.isfile(path):  # writing it says what is wrong with anything else; a pipe is fine
        return True
    with path.open("rb") as file:
        start = file.read(80)
    if start.strip() in (b"", b"[]") or MARKS[name] in start:
        return True
    return name == "summary" and path.suffix in ("", ".md", ".txt")


def _calibrate(candidates: Sequence[LoadedResult], baseline: Path, folder: Path) -> None:
    from rich.console import Console

    from spdbench.judge.gate.calibration import calibrate
    from spdbench.render.check import calibration_to_terminal

    if not os.path.exists(baseline):
        raise InputError(f"--baseline {baseline}: does not exist, and {CALIBRATION} has to lie next to the baseline")
    found = calibrate(candidates)
    with contextlib.suppress(InputError):  # a damaged one is made anew
        older = read_calibration(folder / CALIBRATION)
        if older is not None and older.fingerprint != found.fingerprint:
            say(f"NOTE: {folder / CALIBRATION} was another machine's, and is replaced.")
        found = found if older is None else found.merged_with(older)
    write_file("--calibrate", folder / CALIBRATION, found.model_dump_json(by_alias=True, indent=2) + "\n")
    write_stdout(calibration_to_terminal(found, Console(file=sys.stdout)))
    say(f"Wrote {folder / CALIBRATION}, which `spdbench check` reads by itself")


def _show(
    judgements: Sequence[Judgement],
    junit: Path | None,
    summary: Path | None,
    json_file: Path | None,
    benchmark_json: Path | None,
) -> None:
    """The table to stdout, then the files that were asked for."""
    from rich.console import Console

    from spdbench.render.check import to_markdown, to_terminal
    from spdbench.render.check_files import to_benchmark_json, to_json, to_junit

    write_stdout(to_terminal(judgements, Console(file=sys.stdout)))
    for name, path, render in (
        ("--junit", junit, to_junit),
        ("--summary", summary, to_markdown),
        ("--json", json_file, to_json),
        ("--benchmark-json", benchmark_json, to_benchmark_json),
    ):
        if path is not None:
            write_file(name, path, render(judgements))
