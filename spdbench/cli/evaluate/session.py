"""One `spdbench eval` from loading to the table: backends answer lm-eval's tasks, lm-eval scores, files are written.

Importing it needs lm-eval.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import click
from lm_eval.evaluator import simple_evaluate
from tabulate import tabulate

from spdbench import __version__
from spdbench.cli.evaluate.eval import EvalOptions
from spdbench.cli.evaluate.lm_model import SpdbenchLM, with_ids
from spdbench.cli.evaluate.lm_tasks import finite, input_error_in, quiet_git, scores_of
from spdbench.cli.files import require_writable, result_path
from spdbench.cli.setup import (
    drafter_record,
    find_backends,
    find_devices,
    load_model,
    model_record,
)
from spdbench.cli.terminal import sigterm_interrupts
from spdbench.console import printable, say
from spdbench.judge.results.evaluation import SCHEMA, EvalSample, EvalScore, EvalSettings, EvalTask, Evaluation
from spdbench.measure.environment import git_state
from spdbench.measure.journal import Journal
from spdbench.measure.privacy import names_only
from spdbench.prompts.chat import ChatFormat, parse_template_args
from spdbench.prompts.templates import find_template

PACKAGES = ("lm_eval", "torch", "transformers")
MAX_NAME_LENGTH = 60


def evaluate(labels: Mapping[str, str], options: EvalOptions, manager: Any) -> None:
    """Scores backends on tasks, and writes a file for each. `manager` is lm-eval's, and knows all tasks."""
    require_writable(options.results)
    specs = with_ids(find_backends(labels, options))
    devices = find_devices(options)
    target = load_model(options, devices[0])
    given = {name: getattr(options, name) for name in EvalSettings.model_fields}
    args = parse_template_args(options.template_args)
    chat = ChatFormat(target.tokenizer, args, find_template(options.chat_template))
    settings = EvalSettings.model_validate({**given, "template_args": args})
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs its progress, and a warning for every option
    found = []
    with sigterm_interrupts():
        for spec in specs:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            try:
                model = SpdbenchLM(spec, target, devices, options.threads, settings.seed, chat)
                found.append(_evaluation(model, settings, _scored(model, settings, manager), created))
            finally:
                SpdbenchLM.close_all()
            tasks = re.sub(r"[^A-Za-z0-9.+-]+", "-", "+".join(settings.tasks))
            tasks = tasks if len(tasks) <= MAX_NAME_LENGTH else f"{len(settings.tasks)}-tasks"
            path = result_path(options.results, tasks, spec.label, target.files.id, options.name)
            Journal.replace_file(path, f"{found[-1].model_dump_json(by_alias=True, indent=1)}\n".encode())
            say(f"Wrote {path}")
    click.echo(_table(found))


def _scored(model: SpdbenchLM, settings: EvalSettings, manager: Any) -> Mapping[str, Any]:
    """What lm-eval makes of the model's answers."""
    quiet_git()
    try:
        scored: Mapping[str, Any] = simple_evaluate(
            model=model,
            tasks=manager.match_tasks(settings.tasks),
            task_manager=manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
            log_samples=True,
            confirm_run_unsafe_code=settings.allow_code_execution,
        )
    except Exception as error:
        if (mistake := input_error_in(error)) is not None:
            raise mistake from None
        raise
    return scored


def _evaluation(model: SpdbenchLM, settings: EvalSettings, scored: Mapping[str, Any], created: str) -> Evaluation:
    drafter = drafter_record(model.backend)
    return Evaluation(
        schema=SCHEMA,
        created=created,
        spdbench={"version": __version__, "git": git_state()},
        versions={name: version(name) for name in PACKAGES},
        settings=settings,
        backend=names_only(model.spec.record(model.backend).model_dump()),
        model=names_only(model_record(model.target, model.chat).model_dump()),
        drafter=drafter and names_only(drafter.model_dump()),
        tasks={name: _task(name, scored) for name in scored["samples"]},
        samples=[_sample(name, sample) for name, samples in scored["samples"].items() for sample in samples],
    )


def _task(name: str, scored: Mapping[str, Any]) -> EvalTask:
    task_version = scored["versions"].get(name)
    return EvalTask(
        version=None if task_version is None else str(task_version),
        num_fewshot=int(scored["n-shot"].get(name, 0)),
        num_documents=len({sample["doc_id"] for sample in scored["samples"][name]}),
        scores=scores_of(scored["results"][name]),
    )


def _sample(task: str, sample: Mapping[str, Any]) -> EvalSample:
    numbers = {name: finite(sample[name]) for name in sample["metrics"]}
    return EvalSample(
        task=task,
        document=sample["doc_id"],
        filter=sample["filter"],
        prompt_sha256=sample["prompt_hash"],
        answers=_plain(sample["filtered_resps"]),
        scores={name: number for name, number in numbers.items() if number is not None},
    )


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; infinite numbers, which JSON lacks, as text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    return float(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def _table(evaluations: Sequence[Evaluation]) -> str:
    """A line for each score of a task, a column for each label."""
    rows: list[list[object]] = []
    for task, facts in evaluations[0].tasks.items():
        for key in facts.scores:
            metric, _, chosen = key.partition(",")
            cells = [_cell(evaluation.tasks[task].scores.get(key)) for evaluation in evaluations]
            rows.append([task, facts.num_documents, metric, chosen, *cells])
    headers: list[object] = [
        "task",
        "documents",
        "metric",
        "filter",
        *(evaluation.backend.label for evaluation in evaluations),
    ]
    head, *shown = [[printable(str(cell), one_line=True) for cell in row] for row in [headers, *rows]]
    return tabulate(shown, head, disable_numparse=True)


def _cell(score: EvalScore | None) -> str:
    if score is None or score.value is None:
        return "-"
    return f"{score.value:.4f}" if score.stderr is None else f"{score.value:.4f} +- {score.stderr:.4f}"
