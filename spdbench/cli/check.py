"""`spdbench check`: result files in, a verdict and an exit code out. Only parses the command line, reads and writes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import CALIBRATION, file_identity, read_calibration, result_paths, write_file, write_stdout
from spdbench.cli.options import PERCENT
from spdbench.console import say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.judge.gate.verdict import Judgement
    from spdbench.judge.loaded import LoadedResult

OUTPUT = click.Path(path_type=Path, dir_okay=False)


@click.command("check", short_help="Judge results against a baseline, for CI.")
@click.argument("results", metavar="NEW...", nargs=-1, required=True)
@click.option("--baseline", metavar="FILE|DIR", required=True, help="The results that NEW must not fall behind.")
@click.option(
    "--gate",
    type=click.Choice(["exact", "timing", "all"]),
    default="all",
    show_default=True,
    help="exact: ids, steps, acceptance, on any machine; timing: speed, on the baseline's machine.",
)
@click.option(
    "--max-slowdown",
    type=PERCENT,
    metavar="5%",
    help="How much slower it may be. [default: what --calibrate found, else 5%]",
)
@click.option(
    "--max-acceptance-drop",
    type=PERCENT,
    metavar="0.5%",
    help="How far acceptance may fall; in greedy float32 not at all. [default: 0.5%]",
)
@click.option("--by", type=click.Choice(["category"]), help="What each category shows as well.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="NEW are runs of the same code: find the slowdown that is noise, and keep it next to the baseline.",
)
@click.option("--junit", type=OUTPUT, metavar="FILE", help="Write JUnit XML as well.")
@click.option("--summary", type=OUTPUT, metavar="FILE", help="Write Markdown as well, for a CI job's page.")
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write every finding as JSON as well.")
@click.option(
    "--benchmark-json", type=OUTPUT, metavar="FILE", help="Write what github-action-benchmark reads, bigger is better."
)
@click.pass_context
def command(
    context: click.Context,
    /,
    results: tuple[str, ...],
    baseline: str,
    gate: str,
    max_slowdown: float | None,
    max_acceptance_drop: float | None,
    by: str | None,
    calibrate: bool,
    **outputs: Path | None,
) -> None:
    """Judge results against a baseline, label by label. Needs no model.

    NEW is a result file, a pattern, or a folder of result files. Exit codes: 0 fine; 1 regression, divergence or
    failed prompt; 2 wrong usage or input; 3 inconclusive; 4 not comparable. Where several hold: 2, then 1, 4, 3.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads gain nothing here and take a core each
    from spdbench.judge.gate.check import GATES, MAX_ACCEPTANCE_DROP, Limits, check
    from spdbench.judge.gate.verdict import EXIT_CODES, verdict_of
    from spdbench.judge.loaded import read_results

    folder = Path(baseline) if os.path.isdir(baseline) else Path(baseline).parent
    new = list(result_paths(results))
    if calibrate:
        judging = {"max_slowdown": max_slowdown, "max_acceptance_drop": max_acceptance_drop, "by": by}
        _refuse_with_calibrate({**judging, **outputs})
        _calibrate(read_results(new, keep_ids=True), Path(baseline), folder)
        return
    old = list(result_paths([baseline]))
    _refuse_to_overwrite(outputs, [*new, *old], folder / CALIBRATION)
    candidates, baselines = read_results(new, keep_ids=True), read_results(old, keep_ids=True)
    limits = Limits(
        max_slowdown,
        MAX_ACCEPTANCE_DROP if max_acceptance_drop is None else max_acceptance_drop,
        read_calibration(folder / CALIBRATION) if "timing" in GATES[gate] else None,
    )
    judgements = check(candidates, baselines, GATES[gate], limits, by_category=by == "category")
    _show(judgements, **outputs)
    _tell_not_covered(candidates, baselines)
    context.exit(EXIT_CODES[verdict_of(judgements)])


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
    """Every output needs a file of its own, which is none of the results, and not the calibration."""
    taken = {file_identity(path): "is one of the results" for path in inputs}
    taken[file_identity(calibration)] = "is the calibration, which --calibrate writes"
    for name, path in outputs.items():
        if path is not None:
            if (place := file_identity(path)) in taken:
                raise InputError(f"{_option(name)} {path}: {taken[place]}; choose another file")
            taken[place] = f"is what {_option(name)} writes, too"


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
    for option, path, render in (
        ("--junit", junit, to_junit),
        ("--summary", summary, to_markdown),
        ("--json", json_file, to_json),
        ("--benchmark-json", benchmark_json, to_benchmark_json),
    ):
        if path is not None:
            write_file(option, path, render(judgements))
