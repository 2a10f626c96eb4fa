"""`spdbench show`: one answer of a result in the terminal, with its drafted tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import write_stdout
from spdbench.cli.options import PATH, WHOLE
from spdbench.cli.parameters import Argument
from spdbench.cli.reading.trace import read_kept
from spdbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from spdbench.judge.results.schema import BackendRecord, Run


@click.command("show", short_help="Show an answer token by token, with its drafts.")
@click.argument("result", cls=Argument, metavar="RESULT", type=PATH)
@click.argument("prompt", cls=Argument, metavar="[PROMPT]", required=False)
@click.option("--turn", type=WHOLE, default=0, show_default=True, help="Which turn of the conversation.")
@click.option("--repeat", type=WHOLE, default=0, show_default=True, help="Which repeat.")
def command(result: Path, prompt: str | None, turn: int, repeat: int) -> None:
    """Show an answer step by step: which drafts were accepted, which rejected, and what the target added.

    RESULT is a result of `spdbench run --keep-drafts`. PROMPT is a prompt's id; without it, the first answer with a
    rejected draft is shown. Then come the cycles around a rejection: which token is in which stage of a pipeline, and,
    where the run had `--trace` as well, what each lane did.
    """
    head, runs = read_kept(result)
    if head.backend.kind == "autoregressive":
        raise InputError(f"{result}: {head.backend.label} drafts nothing; show the result of a backend that drafts")
    run = _find_run(result, runs, head.backend, prompt, turn, repeat)
    from rich.console import Console

    from spdbench.models.checkpoints.tokenizer_files import find_decoder
    from spdbench.render.answer import show_answer

    decode = find_decoder(head.model.id, head.model.tokenizer_sha256, head.model.sha256)
    try:
        write_stdout(show_answer(run, head.backend, decode, Console(file=sys.stdout, highlight=False)))
    except ValueError as error:
        raise InputError(f"{result}: prompt {run.prompt_id}: {error}") from None


def _find_run(
    path: Path, runs: Iterable[Run], backend: BackendRecord, prompt: str | None, turn: int, repeat: int
) -> Run:
    """The run that the words name; without a prompt, the first one with a rejected draft, else the first.

    Raises:
        InputError: there is none, it failed, or its drafts were not kept.
    """
    from spdbench.judge.timeline import rejection_to_show

    seen: dict[str, None] = {}
    first: Run | None = None
    for run in runs:
        seen[run.prompt_id] = None
        if prompt is not None and run.key != (prompt, turn, repeat):
            continue
        if run.finish_reason == "error":
            if prompt is not None:
                raise InputError(f"{path}: prompt {prompt} failed: {run.error}")
            continue
        if run.drafted_tokens is None or not any(run.drafted_tokens.ids):
            if run.drafted_tokens is None:
                raise InputError(f"{path}: holds no drafted tokens; measure again with `spdbench run --keep-drafts`")
            if not run.output_ids:
                raise InputError(f"{path}: {backend.label} does not report the ids of its tokens")
        if prompt is not None or rejection_to_show(run, backend) is not None:
            return run
        first = first or run
    if prompt is None and first is not None:
        return first
    if prompt is None:
        raise InputError(f"{path}: holds no answer")
    if prompt in seen:
        raise InputError(f"{path}: prompt {prompt} has no turn {turn} with repeat {repeat}")
    raise InputError(f"{path}: no prompt {prompt}{did_you_mean(prompt, list(seen))}")
