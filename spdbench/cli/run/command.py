"""`spdbench run`: checks all that can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench.backend import is_text_only
from spdbench.cli.options import (
    COUNT,
    FOLDER,
    PATH,
    WHOLE,
    FiniteRange,
    ModelOptions,
    argument,
    check_name,
    flag,
    option,
    parse_labels,
    takes,
)
from spdbench.console import say
from spdbench.errors import InputError, NotRunError
from spdbench.judge.score import RUNS_CODE, Scorer, check_references, judge_of
from spdbench.measure.sandbox import passes, require_sandbox
from spdbench.prompts.chat import ChatFormat, PlainText, RefusedError, parse_template_args
from spdbench.prompts.suite import Suite, limit_prompts, load_suite
from spdbench.types import Sampling

if TYPE_CHECKING:
    from spdbench.cli.setup import BackendSpec
    from spdbench.measure.runner import Workload
    from spdbench.models.target import Target

DEFAULT_BACKENDS = ("vanilla", "spd")
COLDEST = 1e-3
UNLIMITED_CONTEXT = 2**31
"""For a model that only its server has: the server reports when a request does not fit."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """What `run` measures, and how."""

    suite: str = argument("SUITE")
    backends: tuple[str, ...] = option(
        "-b --backend",
        None,
        "[LABEL=]BACKEND",
        "What to measure; the first is the baseline. [default: vanilla, spd]",
        multiple=True,
    )
    limit: int | None = option("--limit", COUNT, "N", "Only N conversations, round-robin over categories.")
    repeats: int = option("--repeats", click.IntRange(1, 10_000), "R", "Measure every prompt R times.", 1)
    warmup: int = option("--warmup", WHOLE, "W", "Short untimed requests a backend beforehand.", 1)
    results: Path = option("--results", FOLDER, "DIR", "Where result files go.", Path("results"))
    name: str | None = option("--name", None, "NAME", "Added to the files' names, to tell runs apart.")
    resume: bool = flag("--resume", "Go on with a run that was interrupted.")
    max_new_tokens: int | None = option("--max-new-tokens", COUNT, "N", "Limit of each answer. [default: the suite's]")
    temperature: float | None = option("--temperature", FiniteRange(min=0), "T", "0 is greedy. [default: the suite's]")
    top_p: float | None = option(
        "--top-p", FiniteRange(min=0, max=1, min_open=True), "P", "Nucleus. [default: the suite's]"
    )
    top_k: int | None = option("--top-k", WHOLE, "K", "0: all tokens. [default: the suite's]")
    seed: int | None = option("--seed", WHOLE, "S", "[default: the suite's, else 0]")
    data: Path | None = option("--data", PATH, "DIR", "Where the suite's files lie.")
    concurrency: int | None = option(
        "--concurrency", COUNT, "N", "Requests that a server has to answer at once. [default: 1]"
    )
    allow_code_execution: bool = flag(
        "--allow-code-execution",
        "Run code that a model wrote, in a sandbox, to score it, and code in task files that the suite names.",
    )
    model: str | None = option(
        "-m --model", None, "MODEL", "Hub id, local folder or GGUF file. [default: the suite's, else smollm2]"
    )


@click.command("run", short_help="Measure backends on a suite and compare them.")
@takes(RunOptions)
def command(options: RunOptions) -> None:
    """Measure backends on a suite, interleaved prompt by prompt, and compare them.

    SUITE is the name of a shipped suite or a YAML file. Several -b are measured in one run on the same prompts; each
    gets a result file.
    """
    from spdbench.cli.run.session import Session
    from spdbench.cli.setup import chat_format, find_backends, find_devices
    from spdbench.measure.runner import Workload

    labels = parse_labels(options.backends or DEFAULT_BACKENDS)
    check_name(options.name)
    specs = find_backends(labels, options, options.concurrency)
    suite = load_suite(options.suite, options.data, may_run_code=options.allow_code_execution)
    prompts = limit_prompts(suite.prompts, options.limit)
    score = _scorer(suite, options.allow_code_execution)
    devices = find_devices(options)
    target = _target(suite, options, devices[0], specs)
    chat = PlainText(parse_template_args(options.template_args)) if target is None else chat_format(target, options)
    settings = _decoding(suite, options)
    workload = Workload(
        prompts=prompts,
        max_new_tokens=settings["max_new_tokens"],
        sampling=Sampling(settings["temperature"], settings["top_p"], settings["top_k"]),
        seed=settings["seed"],
        eos_ids=frozenset() if target is None else target.eos_ids,
        repeats=options.repeats,
        warmup=options.warmup,
        context_limit=UNLIMITED_CONTEXT if target is None else target.config.max_positions,
    )
    _check(specs, workload, chat)
    session = Session(options, suite, workload, chat, target, devices, specs, score)
    click.get_current_context().exit(session.run())


def _scorer(suite: Suite, allow_code_execution: bool) -> Scorer:
    """How the suite's answers are scored. Reports on stderr what is not scored, or how code is guarded.

    Raises:
        InputError: a reference does not fit its way of scoring, or there is no sandbox.
    """
    check_references(suite.name, suite.score, suite.prompts, runs_code=allow_code_execution, missing=suite.missing)
    code = [prompt for prompt in suite.prompts if judge_of(suite.score, prompt.category) in RUNS_CODE]
    if code and allow_code_execution:
        say(f"NOTE: answers that are code are run, each by itself; {require_sandbox()}")
    elif code:
        kind = "answers" if len(code) == len(suite.prompts) else f"answers to {len(code)} prompts for code"
        say(f"NOTE: {kind} are not scored, as that means to run what a model wrote: --allow-code-execution")
    return Scorer(suite.score, _passes if allow_code_execution else None)


def _passes(program: str) -> bool | None:
    """None, with a note why, where the program could not be run."""
    try:
        return passes(program)
    except NotRunError as error:
        say(f"NOTE: an answer has no score: {error}")
        return None


def _target(suite: Suite, options: RunOptions, device: str, specs: Sequence[BackendSpec]) -> Target | None:
    """The model that backends share; None where no model is named and all backends leave it to their servers."""
    from spdbench.cli.setup import load_model

    if (options.model or suite.model) is None and all(is_text_only(spec.cls) for spec in specs):
        return None
    return load_model(options, device, suite.model)


def _decoding(suite: Suite, options: RunOptions) -> dict[str, Any]:
    """The suite's decoding settings, and those of the command line in their place."""
    settings = suite.decoding.model_dump()
    settings |= {key: given for key in settings if (given := getattr(options, key)) is not None}
    if 0 < settings["temperature"] < COLDEST:
        raise InputError(
            f"--temperature {settings['temperature']}: too small to divide by; 0 is greedy, else at least {COLDEST}"
        )
    return settings


def _check(specs: Sequence[BackendSpec], workload: Workload, chat: ChatFormat | PlainText) -> None:
    """Raises `InputError` for what is known to be wrong before anything is loaded or written."""
    from spdbench.decoding.synthetic import parse_drafter, require_known_answer

    for spec in specs:
        if spec.cls.kind != "autoregressive" and not is_text_only(spec.cls):
            require_known_answer(parse_drafter(spec.drafter), workload.sampling)
    obstacles = []
    for prompt in workload.prompts:
        try:
            length = len(chat.encode([{"role": "user", "content": prompt.turns[0]}]))
        except RefusedError as error:
            obstacles.append(f"prompt {prompt.id}: {error}")
        except InputError as error:
            raise InputError(f"prompt {prompt.id}: {error}") from None
        else:
            if length >= (limit := workload.context_limit):
                obstacles.append(f"prompt {prompt.id}: {length} tokens leave no room in the model's context of {limit}")
    if len(obstacles) == len(workload.prompts):
        raise InputError(obstacles[0])
    if obstacles:
        say(
            f"NOTE: {len(obstacles):,} of {len(workload.prompts):,} prompts cannot be given to the model and count as "
            f"failed. The first: {obstacles[0]}"
        )
