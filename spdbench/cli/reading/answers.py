"""`spdbench answers`: what was answered, prompt by prompt, with all labels side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from spdbench.cli.files import result_paths, show_text, write_stdout
from spdbench.cli.options import argument, complete_files, flag, option, takes
from spdbench.cli.reading.trace import find_text, read_kept
from spdbench.console import printable, wrapped
from spdbench.errors import InputError, did_you_mean

Key = tuple[str, int, int]
WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class AnswersOptions:
    """Which answers are shown, and how."""

    results: tuple[str, ...] = argument("RESULT...", nargs=-1, required=True, shell_complete=complete_files)
    prompt: str | None = option("--prompt", None, "ID", "Only the answers to this prompt.")
    as_json: bool = flag("--json", "Print one line of JSON for each answer.")


@dataclass(frozen=True)
class Answer:
    """One label's answer to a turn. `score` and `error` are None where there is none."""

    label: str
    prompt_id: str
    category: str
    turn: int
    repeat: int
    text: str
    num_new_tokens: int
    finish_reason: str
    score: float | None
    error: str | None

    @property
    def key(self) -> Key:
        return self.prompt_id, self.turn, self.repeat


@click.command("answers", short_help="Show what was answered, label by label.")
@takes(AnswersOptions)
def command(options: AnswersOptions) -> None:
    """Show the answers in results as text, prompt by prompt, with all labels side by side.

    RESULT is a result file, a pattern, or a folder of result files. An answer that is an earlier label's to the letter
    is not repeated. Where no cache holds the model's tokenizer, ids are shown.
    """
    answers = list(_read(options))
    if options.as_json:
        write_stdout("".join(json.dumps(vars(answer)) + "\n" for answer in answers))
        return
    by_key: dict[Key, list[Answer]] = {}
    for answer in answers:
        by_key.setdefault(answer.key, []).append(answer)
    show_text("\n".join(map(_block, by_key.values())))


def _read(options: AnswersOptions) -> Iterator[Answer]:
    known: dict[str, None] = {}
    found = False
    for path in result_paths(options.results):
        head, runs = read_kept(path)
        text = find_text(head)
        for run in runs:
            known[run.prompt_id] = None
            if options.prompt not in (None, run.prompt_id):
                continue
            found = True
            yield Answer(
                head.backend.label,
                run.prompt_id,
                run.category,
                run.turn,
                run.repeat,
                text(run.output_ids) if run.text is None else run.text,
                run.num_new_tokens,
                run.finish_reason,
                run.score,
                run.error,
            )
    if not found:
        wrong = (
            "" if options.prompt is None else f" to the prompt '{options.prompt}'{did_you_mean(options.prompt, known)}"
        )
        raise InputError(f"no answers{wrong}")


def _block(answers: list[Answer]) -> str:
    """The answers of all labels to one turn."""
    first = answers[0]
    repeat = f", repeat {first.repeat}" if first.repeat else ""
    lines = [_line(f"{first.prompt_id} ({first.category}), turn {first.turn}{repeat}")]
    labels: dict[str, str] = {}  # text -> the label that gave it first
    for answer in answers:
        facts: list[Any] = [f"{answer.num_new_tokens} tokens", answer.finish_reason]
        facts += [] if answer.score is None else [f"score {answer.score:g}"]
        lines.append(_line(f"  {answer.label}: {', '.join(facts)}"))
        if answer.error is not None:
            lines.append(_line(f"    failed: {answer.error}"))
        elif answer.text in labels:
            lines.append(_line(f"    as {labels[answer.text]}"))
        else:
            labels[answer.text] = answer.label
            lines.append(wrapped(answer.text or "(empty)", WIDTH, "    "))
    return "".join(printable(line) + "\n" for text in lines for line in text.split("\n"))


def _line(text: str) -> str:
    """`text` as one line, whatever is in the names that others gave."""
    return printable(text, one_line=True)
