"""One `spdbench eval` from loading to the table: backends answer lm-eval's tasks, lm-eval scores, files are written.

Importing it needs lm-eval.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import click
from tabulate import tabulate

from spdbench import __version__
from spdbench.cli.evaluate.eval import EvalOptions
from spdbench.cli.evaluate.lm_model import SpdbenchLM, with_ids
from spdbench.cli.evaluate.lm_tasks import input_error_in, scores_of
from spdbench.cli.setup import drafter_record, find_backends, find_devices, load_model, model_record, require_writable
from spdbench.cli.terminal import sigterm_interrupts
from spdbench.console import say
from spdbench.judge.results.evaluation import SCHEMA, EvalSample, EvalScore, EvalSettings, EvalTask, Evaluation
from spdbench.measure.environment import git_state
from spdbench.measure.journal import Journal
from spdbench.measure.privacy import names_only
from spdbench.models.target import Target
from spdbench.prompts.chat import ChatFormat

PACKAGES = ("lm_eval", "torch", "transformers")
LONGEST_NAME = 60


@dataclass(frozen=True)
class EvalSession:
    """Scores backends on tasks and writes a file for each. `manager` is lm-eval's, and knows all tasks."""

    labels: Mapping[str, str]
    options: EvalOptions
    settings: EvalSettings
    manager: Any

    def run(self) -> None:
        require_writable(self.options.results)
        specs = with_ids(find_backends(self.labels, self.options))
        devices = find_devices(self.options)
        target = load_model(self.options, devices[0])
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs its progress, and a warning for every option
        found = []
        with sigterm_interrupts():
            for spec in specs:
                created = datetime.now(UTC).isoformat(timespec="seconds")
                try:
                    model = SpdbenchLM(spec, target, devices, self.options.threads, self.settings.seed)
                    scored = self._scored(model)
                    found.append(self._evaluation(model, target, scored, created))
                finally:
                    SpdbenchLM.close_all()
                self._write(found[-1], target)
        click.echo(_table(found))

    def _scored(self, model: SpdbenchLM) -> Mapping[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        settings = self.settings
        try:
            scored: Mapping[str, Any] = simple_evaluate(
                model=model,
                tasks=self.manager.match_tasks(list(settings.tasks)),
                task_manager=self.manager,
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

    def _evaluation(self, model: SpdbenchLM, target: Target, scored: Mapping[str, Any], created: str) -> Evaluation:
        spec, backend = model.spec, model.backend
        samples = scored["samples"]
        return Evaluation(
            schema=SCHEMA,
            created=created,
            spdbench={"version": __version__, "git": git_state()},
            versions={name: version(name) for name in PACKAGES},
            settings=self.settings,
            backend=_public(spec.record(backend)),
            model=_public(model_record(target, ChatFormat(target.tokenizer))),
            drafter=_public(drafter_record(backend)),
            tasks={name: _task(name, scored) for name in samples},
            samples=[_sample(name, sample) for name, found in samples.items() for sample in found],
        )

    def _write(self, evaluation: Evaluation, target: Target) -> None:
        tasks = re.sub(r"[^A-Za-z0-9.+-]+", "-", "+".join(self.settings.tasks))
        if len(tasks) > LONGEST_NAME:
            tasks = f"{len(self.settings.tasks)}-tasks"
        words = [
            tasks,
            evaluation.backend.label,
            target.files.id.replace("/", "-"),
            self.options.name,
        ]
        path = self.options.results / f"{'__'.join(filter(None, words))}.json"
        content = evaluation.model_dump_json(by_alias=True, indent=1) + "\n"
        Journal.replace_file(path, content.encode())
        say(f"Wrote {path}")


def _public(record: Any) -> Any:
    """`record` with file names instead of paths."""
    return None if record is None else type(record).model_validate(names_only(record.model_dump()))


def _task(name: str, scored: Mapping[str, Any]) -> EvalTask:
    task_version = scored["versions"].get(name)
    scores = scores_of(scored["results"][name])
    return EvalTask(
        version=None if task_version is None else str(task_version),
        num_fewshot=int(scored["n-shot"].get(name, 0)),
        num_documents=len({sample["doc_id"] for sample in scored["samples"][name]}),
        scores={
            key: EvalScore(**{part: _finite(value) for part, value in found.items()}) for key, found in scores.items()
        },
    )


def _sample(task: str, sample: Mapping[str, Any]) -> EvalSample:
    numbers = {name: _finite(sample[name]) for name in sample["metrics"] if isinstance(sample[name], int | float)}
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


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _table(evaluations: Sequence[Evaluation]) -> str:
    """A line for each score of a task, a column for each label."""
    rows = []
    for task, facts in evaluations[0].tasks.items():
        for key in facts.scores:
            metric, _, chosen = key.partition(",")
            cells = [_cell(evaluation.tasks[task].scores.get(key)) for evaluation in evaluations]
            rows.append([task, facts.num_documents, metric, chosen, *cells])
    headers = ["task", "documents", "metric", "filter", *(evaluation.backend.label for evaluation in evaluations)]
    return tabulate(rows, headers, disable_numparse=True)


def _cell(score: EvalScore | None) -> str:
    if score is None or score.value is None:
        return "-"
    return f"{score.value:.4f}" if score.stderr is None else f"{score.value:.4f} +- {score.stderr:.4f}"
