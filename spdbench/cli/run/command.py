"""`spdbench run`: checks all that can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench.cli.completion import complete_backends
from spdbench.cli.options import (
    FOLDER,
    PATH,
    check_name,
    flag,
    levels,
    option,
    parse_labels,
    takes,
)
from spdbench.cli.run.workload import SuiteOptions, choose_target, make_workload
from spdbench.console import counted, hide_notes, say
from spdbench.errors import InputError, NotRunError
from spdbench.judge.score import RUNS_CODE, Scorer, check_references, judge_of
from spdbench.measure.sandbox import passes, require_sandbox
from spdbench.prompts.chat import PlainText, parse_template_args
from spdbench.prompts.suite import Suite, load_suite
from spdbench.types import Prompt

if TYPE_CHECKING:
    from spdbench.cli.run.session import Session

DEFAULT_BACKENDS = ("vanilla", "spd")


@dataclass(frozen=True, kw_only=True)
class RunOptions(SuiteOptions):
    """What `run` measures, and how."""

    backends: tuple[str, ...] = option(
        "-b --backend",
        None,
        "[LABEL=]BACKEND",
        "What to measure; the first is the baseline. [default: vanilla, spd]",
        multiple=True,
        shell_complete=complete_backends,
    )
    repeats: int = option("--repeats", click.IntRange(1, 10_000), "R", "Measure every prompt R times.", 1)
    remeasure: int = option(
        "--remeasure",
        click.IntRange(0, 100),
        "N",
        "Measure a request that other programs disturbed up to N more times; the least disturbed counts.",
        0,
    )
    warmup: int = option("--warmup", click.IntRange(0, 1000), "W", "Short untimed requests a backend beforehand.", 1)
    results: Path = option("--results", FOLDER, "DIR", "Where result files go.", Path("results"))
    name: str | None = option("--name", None, "NAME", "Added to the files' names, to tell runs apart.")
    resume: bool = flag("--resume", "Go on with a run that was interrupted.")
    trace: bool = flag("--trace", "Keep what every lane did, for `spdbench trace`, `show` and `report`.")
    keep_drafts: bool = flag("--keep-drafts", "Keep the drafted tokens, for `spdbench show` and `report`.")
    concurrency: tuple[int, ...] | None = levels(
        "--concurrency",
        "Requests that a server has to answer at once; with several numbers each is measured. [default: 1]",
    )
    log: tuple[str, ...] = option(
        "--log",
        None,
        "NAME",
        "Give the results to an experiment tracker as well: mlflow, wandb, or one that a package offers.",
        multiple=True,
    )
    allow_code_execution: bool = flag(
        "--allow-code-execution",
        "Run code that a model wrote, in a sandbox, to score it, and code in task files that the suite names.",
    )
    quiet: bool = flag("--quiet", "No progress and no notes on stderr, only errors; the comparison is printed.")
    events: Path | None = option(
        "--events",
        PATH,
        "FILE",
        "Append what happens as lines of JSON; with - to stdout, and the comparison to stderr.",
    )


@click.command("run", short_help="Measure backends on a suite and compare them.")
@takes(RunOptions)
def command(options: RunOptions) -> None:
    """Measure backends on a suite, interleaved prompt by prompt, and compare them.

    SUITE is the name of a shipped suite or a YAML file. Several -b are measured in one run on the same prompts; each
    gets a result file.
    """
    from spdbench.cli.run.session import exit_code

    with hide_notes(options.quiet):
        results = prepare(options).run()
    click.get_current_context().exit(exit_code(results))


def prepare(options: RunOptions) -> Session:
    """The run that the options describe, with all checked that can be checked before weights are loaded.

    Raises:
        InputError: something of it cannot be used.
    """
    from spdbench.cli.run.loggers import find_loggers
    from spdbench.cli.run.session import Session
    from spdbench.cli.setup import chat_format, find_devices, find_levels

    loggers = find_loggers(options.log)
    labels = parse_labels(options.backends or DEFAULT_BACKENDS)
    check_name(options.name)
    levels = find_levels(labels, options, options.concurrency)
    specs = levels[0]
    suite = load_suite(options.suite, options.data, may_run_code=options.allow_code_execution)
    score = _scorer(suite, options.allow_code_execution)
    devices = find_devices(options)
    target = choose_target(suite, options, devices[0], specs)
    if target is None and options.chat_template is not None:
        raise InputError("--chat-template: is applied here, which takes the model's tokenizer; name the model with -m")
    chat = PlainText(parse_template_args(options.template_args)) if target is None else chat_format(target, options)
    counts: dict[str, Any] = {"repeats": options.repeats, "warmup": options.warmup, "remeasure": options.remeasure}
    workload = make_workload(
        suite, options, target, chat, specs, **counts, keep_spans=options.trace, keep_drafts=options.keep_drafts
    )
    if not options.allow_code_execution:
        _report_unscored(suite, workload.prompts)
    return Session(options, suite, workload, chat, target, devices, levels, score, loggers)


def _scorer(suite: Suite, allow_code_execution: bool) -> Scorer:
    """How the suite's answers are scored. Reports on stderr what is not scored, or how code is guarded.

    Raises:
        InputError: a reference does not fit its way of scoring, or there is no sandbox.
    """
    check_references(suite.name, suite.score, suite.prompts, runs_code=allow_code_execution, missing=suite.missing)
    code = [prompt for prompt in suite.prompts if judge_of(suite.score, prompt.category) in RUNS_CODE]
    if code and allow_code_execution:
        say(f"NOTE: answers that are code are run, each by itself; {require_sandbox()}")
    return Scorer(suite.score, _passes if allow_code_execution else None)


def _report_unscored(suite: Suite, prompts: Sequence[Prompt]) -> None:
    """Reports how many of the run's prompts ask for code, which is not run."""
    count = sum(judge_of(suite.score, prompt.category) in RUNS_CODE for prompt in prompts)
    if count:
        kind = "answers" if count == len(prompts) else f"answers to {counted(count, 'prompt')} for code"
        say(f"NOTE: {kind} are not scored, as that means to run what a model wrote: --allow-code-execution")


def _passes(program: str) -> bool | None:
    """None, with a note why, where the program could not be run."""
    try:
        return passes(program)
    except NotRunError as error:
        say(f"NOTE: an answer has no score: {error}")
        return None
