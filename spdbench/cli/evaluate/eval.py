"""`spdbench eval`: checks what can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from spdbench.cli.completion import complete_backends
from spdbench.cli.evaluate.lm_tasks import find_tasks, require_lm_eval, run_code_in_sandbox
from spdbench.cli.options import (
    COUNT,
    FOLDER,
    PATH,
    WHOLE,
    ModelOptions,
    check_name,
    flag,
    option,
    parse_labels,
    takes,
)
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.prompts.chat import parse_template_args


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """What `eval` scores, and how."""

    backends: tuple[str, ...] = option(
        "-b --backend",
        None,
        "[LABEL=]BACKEND",
        "What to score. [default: vanilla]",
        multiple=True,
        shell_complete=complete_backends,
    )
    tasks: tuple[str, ...] = option(
        "--tasks",
        None,
        "NAME,...",
        "lm-eval's tasks, groups or tags.",
        multiple=True,
        required=True,
        callback=lambda _context, _parameter, words: tuple(task for word in words for task in word.split(",") if task),
    )
    include_path: Path | None = option("--include-path", PATH, "DIR", "A folder of more task files.")
    limit: int | None = option("--limit", COUNT, "N", "Only the first N documents of each task.")
    num_fewshot: int | None = option("--num-fewshot", WHOLE, "N", "Examples before each. [default: the task's]")
    apply_chat_template: bool = flag("--apply-chat-template", "Put the model's chat template around prompts.")
    allow_code_execution: bool = flag(
        "--allow-code-execution", "Run code that a model wrote, in a sandbox, to score it."
    )
    seed: int = option("--seed", WHOLE, "S", "For tasks that sample.", 0)
    results: Path = option("--results", FOLDER, "DIR", "Where the files with the scores go.", Path("results/eval"))
    name: str | None = option("--name", None, "NAME", "Added to the files' names, to tell runs apart.")


@click.command("eval", short_help="Score backends on lm-eval's tasks.")
@takes(EvalOptions)
def command(options: EvalOptions) -> None:
    """Score backends on lm-eval's tasks, one after the other, and keep scores and answers in a file for each.

    For more of lm-eval's options there is its own command line: spdbench lm-eval.
    """
    labels = parse_labels(options.backends or ("vanilla",))
    check_name(options.name)
    if not options.tasks:
        raise InputError("--tasks: names no task; `spdbench lm-eval ls tasks` lists them")
    require_lm_eval()
    guards = run_code_in_sandbox(allowed=options.allow_code_execution)
    manager = find_tasks(options.tasks, options.include_path, allow_code=options.allow_code_execution)
    if guards:
        say(f"NOTE: answers that are code are run, each by itself; {guards}")

    from spdbench.cli.evaluate.session import evaluate

    if parse_template_args(options.template_args) and not options.apply_chat_template:
        raise InputError("--template-arg: no chat template is applied; add --apply-chat-template")
    if options.chat_template is not None and not options.apply_chat_template:
        raise InputError("--chat-template: no chat template is applied; add --apply-chat-template")
    evaluate(labels, options, manager)
