"""`spdbench run`: parses and checks all that can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench.cli.model_options import (
    FiniteRange,
    ModelOptions,
    check_name,
    model_options,
    parse_backend_options,
    parse_drafters,
    parse_labels,
)
from spdbench.errors import InputError, NotRunError

if TYPE_CHECKING:
    from spdbench.cli.session import BackendSpec
    from spdbench.judge.score import Scorer
    from spdbench.measure.runner import Workload
    from spdbench.models.target import Target
    from spdbench.prompts.chat import ChatFormat, PlainText
    from spdbench.prompts.suite import Suite

DEFAULT_BACKENDS = ("vanilla", "spd")
COLDEST = 1e-3


@click.command("run", short_help="Measure backends on a suite and compare them.")
@click.argument("suite_name", metavar="SUITE")
@click.option(
    "-b",
    "--backend",
    "backends",
    metavar="[LABEL=]BACKEND",
    multiple=True,
    help="What to measure; the first is the baseline. [default: vanilla, spd]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Only N conversations, round-robin over categories."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    metavar="R",
    show_default=True,
    help="Measure every prompt R times.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    metavar="W",
    show_default=True,
    help="Short untimed requests a backend beforehand.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results"),
    metavar="DIR",
    show_default=True,
    help="Where result files go.",
)
@click.option("--name", metavar="NAME", help="Added to the files' names, to tell runs apart.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Limit of each answer. [default: the suite's]"
)
@click.option("--temperature", type=FiniteRange(min=0), metavar="T", help="0 is greedy. [default: the suite's]")
@click.option(
    "--top-p", type=FiniteRange(min=0, max=1, min_open=True), metavar="P", help="Nucleus. [default: the suite's]"
)
@click.option("--top-k", type=click.IntRange(min=0), metavar="K", help="0: all tokens. [default: the suite's]")
@click.option("--seed", type=click.IntRange(min=0), metavar="S", help="[default: the suite's, else 0]")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Where the suite's files lie.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests that a server has to answer at once. [default: 1]",
)
@click.option("--allow-code-execution", is_flag=True, help="Run code that a model wrote, in a sandbox, to score it.")
@model_options
@click.pass_context
def command(
    context: click.Context,
    /,
    suite_name: str,
    backends: tuple[str, ...],
    limit: int | None,
    repeats: int,
    warmup: int,
    results: Path,
    name: str | None,
    resume: bool,
    data: Path | None,
    concurrency: int | None,
    allow_code_execution: bool,
    chosen: ModelOptions,
    **decoding: Any,
) -> None:
    """Measure backends on a suite, interleaved prompt by prompt, and compare them.

    SUITE is the name of a shipped suite or a YAML file. Several -b are measured in one run on the same prompts; each
    gets a result file.
    """
    from spdbench.cli.session import Session
    from spdbench.measure.runner import Workload
    from spdbench.prompts.suite import limit_prompts, load_suite

    labels = parse_labels(backends or DEFAULT_BACKENDS)
    check_name(name)
    specs = find_backends(labels, chosen, concurrency)
    suite = load_suite(suite_name, data)
    prompts = limit_prompts(suite.prompts, limit)
    score = _scorer(suite, allow_code_execution)
    devices = find_devices(chosen)
    target = _target(suite, chosen, devices[0], specs)
    chat, sampling, settings = _decoding(suite, target, decoding)
    workload = Workload(
        prompts=prompts,
        max_new_tokens=settings["max_new_tokens"],
        sampling=sampling,
        seed=settings["seed"],
        eos_ids=target.config.eos_ids,
        repeats=repeats,
        warmup=warmup,
        context_limit=target.config.max_positions,
    )
    _check(specs, workload, chat)
    session = Session(suite, workload, chat, target, devices, chosen.threads, specs, results, name, score)
    context.exit(session.run(resume=resume))


def _scorer(suite: Suite, allow_code_execution: bool) -> Scorer:
    """How the suite's answers are scored, its references being fit for it; says what is left out, or what guards."""
    from spdbench.judge.score import RUNS_CODE, Scorer, check_references, judge_of
    from spdbench.measure.sandbox import require_sandbox

    check_references(suite.name, suite.score, suite.prompts, runs_code=allow_code_execution, missing=suite.missing)
    code = [prompt for prompt in suite.prompts if judge_of(suite.score, prompt.category) in RUNS_CODE]
    if code and allow_code_execution:
        click.echo(f"NOTE: answers that are code are run, each by itself; {require_sandbox()}", err=True)
    elif code:
        kind = "answers" if len(code) == len(suite.prompts) else f"answers to {len(code)} prompts for code"
        click.echo(
            f"NOTE: {kind} are not scored, as that means to run what a model wrote: --allow-code-execution",
            err=True,
        )
    return Scorer(suite.score, _passes if allow_code_execution else None)


def _passes(program: str) -> bool | None:
    """None, with a note why, where the program could not be run."""
    from spdbench.measure.sandbox import passes

    try:
        return passes(program)
    except NotRunError as error:
        click.echo(f"NOTE: an answer has no score: {error}", err=True)
        return None


def find_backends(labels: Mapping[str, str], chosen: ModelOptions, concurrency: int | None = None) -> list[BackendSpec]:
    """The backends asked for, by label, with their options and drafters; none is loaded. `concurrency` goes to every
    backend that has an option of that name, unless its own -o says otherwise."""
    from spdbench.backend import find_backend, parse_options
    from spdbench.cli.session import BackendSpec

    options = parse_backend_options(chosen.options, list(labels))
    drafters = parse_drafters(chosen.drafters, list(labels))
    specs = []
    classes = {label: find_backend(name) for label, name in labels.items()}
    wide = [label for label, cls in classes.items() if "concurrency" in cls.Options.model_fields]
    if concurrency is not None and not wide:
        raise InputError(
            f"--concurrency {concurrency}: {', '.join(labels)} take one request at a time; of the built-in backends "
            "only openai takes several"
        )
    for label in wide if concurrency is not None else ():
        options[label] = {"concurrency": str(concurrency), **options[label]}
    for label, name in labels.items():
        cls = classes[label]
        specs.append(BackendSpec(label, name, cls, parse_options(label, cls.Options, options[label]), drafters[label]))
    return specs


def find_devices(chosen: ModelOptions) -> tuple[str, ...]:
    """The devices asked for, all checked; by default the first GPU, or the CPU where there is none."""
    import torch

    from spdbench.models.target import find_device

    torch.set_num_threads(chosen.threads)
    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    for device in devices:
        find_device(device)
    return devices


def _target(suite: Suite, chosen: ModelOptions, device: str, specs: Sequence[BackendSpec]) -> Target:
    """What backends share; where none of them needs it and no model is named, no more of it than what they call it."""
    from spdbench.backend import is_text_only
    from spdbench.measure.privacy import names_only
    from spdbench.models.remote_target import RemoteTarget
    from spdbench.models.target import load_target

    named = chosen.model or suite.model
    if named is None and all(is_text_only(spec.cls) for spec in specs):
        names = dict.fromkeys(str(getattr(spec.options, "model", None) or "served") for spec in specs)
        return RemoteTarget("+".join(names_only(list(names))))  # a server may call its model by its folder
    return load_target(named or "smollm2", chosen.dtype, device)


def _decoding(
    suite: Suite, target: Target, given: Mapping[str, Any]
) -> tuple[ChatFormat | PlainText, Any, dict[str, Any]]:
    from spdbench.prompts.chat import ChatFormat, PlainText
    from spdbench.types import Sampling

    settings = suite.decoding.model_dump() | {key: value for key, value in given.items() if value is not None}
    if 0 < settings["temperature"] < COLDEST:
        raise InputError(
            f"--temperature {settings['temperature']}: too small to divide by; 0 is greedy, else at least {COLDEST}"
        )
    sampling = Sampling(settings["temperature"], settings["top_p"], settings["top_k"])
    chat = PlainText() if target.tokenizer is None else ChatFormat(target.tokenizer)
    return chat, sampling, settings


def _check(specs: Sequence[BackendSpec], workload: Workload, chat: ChatFormat | PlainText) -> None:
    """What can be known to be wrong before anything is loaded or written."""
    from spdbench.backend import is_text_only
    from spdbench.decoding.synthetic import parse_drafter, require_known_answer

    for spec in specs:
        if spec.cls.kind != "autoregressive" and not is_text_only(spec.cls):
            require_known_answer(parse_drafter(spec.drafter), workload.sampling)
    for prompt in workload.prompts:
        try:
            length = len(chat.encode([{"role": "user", "content": prompt.turns[0]}]))
        except InputError as error:
            raise InputError(f"prompt {prompt.id}: {error}") from None
        if length >= workload.context_limit:
            raise InputError(
                f"prompt {prompt.id}: {length} tokens leave no room in the model's context of {workload.context_limit}"
            )
