"""`spdbench eval`: parses and checks what can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from pathlib import Path

import click

from spdbench.cli.model_options import ModelOptions, check_name, model_options, parse_labels
from spdbench.errors import InputError


@click.command("eval", short_help="Score backends on lm-eval's tasks.")
@click.option(
    "-b",
    "--backend",
    "backends",
    metavar="[LABEL=]BACKEND",
    multiple=True,
    help="What to score. [default: vanilla]",
)
@click.option("--tasks", metavar="NAME,...", multiple=True, required=True, help="lm-eval's tasks, groups or tags.")
@click.option("--include-path", type=click.Path(path_type=Path), metavar="DIR", help="A folder of more task files.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N documents of each task.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before each. [default: the task's]"
)
@click.option("--apply-chat-template", is_flag=True, help="Put the model's chat template around prompts.")
@click.option("--allow-code-execution", is_flag=True, help="Run code that a model wrote, in a sandbox, to score it.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, metavar="S", show_default=True, help="For tasks that sample."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results/eval"),
    metavar="DIR",
    show_default=True,
    help="Where the files with the scores go.",
)
@click.option("--name", metavar="NAME", help="Added to the files' names, to tell runs apart.")
@model_options
def command(
    backends: tuple[str, ...],
    tasks: tuple[str, ...],
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    allow_code_execution: bool,
    seed: int,
    results: Path,
    name: str | None,
    chosen: ModelOptions,
) -> None:
    """Score backends on lm-eval's tasks, one after the other, and keep scores and answers in a file for each.

    For more of lm-eval's options there is its own command line: spdbench lm-eval.
    """
    from spdbench.cli.lm_tasks import find_tasks, require_lm_eval, run_code_in_sandbox

    labels = parse_labels(backends or ("vanilla",))
    check_name(name)
    names = [task for word in tasks for task in word.split(",") if task]
    if not names:
        raise InputError("--tasks: names no task; `spdbench lm-eval ls tasks` lists them")
    require_lm_eval()
    guards = run_code_in_sandbox(allowed=allow_code_execution)
    manager = find_tasks(names, include_path, allow_code=allow_code_execution)
    if guards:
        click.echo(f"NOTE: answers that are code are run, each by itself; {guards}", err=True)

    from spdbench.cli.eval_session import EvalSession
    from spdbench.judge.results.evaluation import EvalSettings

    settings = EvalSettings(
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        allow_code_execution=allow_code_execution,
        seed=seed,
    )
    EvalSession(labels, chosen, settings, manager, results, name).run()
