"""lm-eval's tasks: found and loaded with one message for what is wrong; code in answers runs in our sandbox.

lm-eval is imported on first use.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from math import comb, isfinite
from pathlib import Path
from typing import Any

from spdbench.errors import InputError, brief, install_command
from spdbench.judge.results.evaluation import EvalScore
from spdbench.measure.environment import git_output
from spdbench.measure.sandbox import passes, require_sandbox

LOCAL = "--include-path DIR names a folder of task files over local JSONL; docs/lm-eval.md shows one"


def require_lm_eval() -> None:
    """Raises `InputError` if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"lm-eval cannot be imported ({error}): {install_command('spdbench[eval]')}") from None


def find_tasks(names: Sequence[str], include_path: Path | None, *, allow_code: bool) -> Any:
    """A task manager that knows all of `names`, each of whose data is there.

    Raises:
        InputError: an unknown task, one whose data cannot be loaded, or one that runs code without permission.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not os.path.isdir(include_path):
        raise InputError(f"--include-path {include_path}: no such folder")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; the last one is reported below
    manager = None
    if include_path is not None:  # lm-eval's own thousands of files are read only where they are needed
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else "."
            raise InputError(
                f"--tasks {name}: lm-eval knows no task, group or tag of that name{hint} `spdbench lm-eval ls tasks` "
                f"lists them, and {LOCAL}."
            )
        _require_data(manager, name, allow_code=allow_code)
    return manager


def _require_data(manager: Any, name: str, *, allow_code: bool) -> None:
    try:
        tasks = manager.load(manager.match_tasks([name]))["tasks"]
    except Exception as error:  # a task's own code and its download may throw anything
        if (found := input_error_in(error)) is not None:
            raise found from None
        raise InputError(
            f"--tasks {name}: its data cannot be loaded ({brief(error)}). It may need the network: run it once where "
            f"there is one, or {LOCAL}."
        ) from None
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise InputError(
                f"--tasks {name}: scores answers by running the code in them; --allow-code-execution lets it, each "
                "answer in a sandbox of its own"
            )


def input_error_in(error: BaseException | None) -> InputError | None:
    """The `InputError` that `error` is or came from."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


class CodeEval:
    """Replaces the metric `code_eval` of the package `evaluate`: runs code in our sandbox, and needs no network."""

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k for each k that has enough answers (Chen et al., arXiv 2107.03374, equation 1), and each verdict.

        Raises:
            InputError: running code is not allowed.
        """
        if not self._allowed:
            raise InputError(
                "this task scores answers by running the code in them; --allow-code-execution (lm-eval's own command "
                "line: --confirm_run_unsafe_code) lets it, each answer in a sandbox of its own"
            )
        verdicts = {
            number: [
                (index, {"task_id": number, "passed": passes(f"{answer}\n{test}"), "completion_id": index})
                for index, answer in enumerate(answers)
            ]
            for number, (test, answers) in enumerate(zip(references, predictions, strict=True))
        }
        counts = [(len(found), sum(verdict["passed"] for _, verdict in found)) for found in verdicts.values()]
        scores = {
            f"pass@{size}": sum(_pass_at(size, total, passed) for total, passed in counts) / len(counts)
            for size in k
            if counts and all(total >= size for total, _ in counts)
        }
        return scores, verdicts


def _pass_at(size: int, total: int, passed: int) -> float:
    """The probability that `size` of `total` answers, drawn without replacement, include one that passes."""
    return 1 - comb(total - passed, size) / comb(total, size)


def run_code_in_sandbox(*, allowed: bool) -> str:
    """Makes lm-eval's code tasks use our sandbox. Returns its protections, or nothing if no code is allowed to run.

    Raises:
        InputError: the sandbox does not work here.
    """
    import evaluate

    original = getattr(evaluate.load, "original", evaluate.load)

    def load(path: str, *arguments: Any, **more: Any) -> Any:
        return CodeEval(allowed=allowed) if path == "code_eval" else original(path, *arguments, **more)

    load.original = original  # type: ignore[attr-defined]
    evaluate.load = load
    return require_sandbox() if allowed else ""


def quiet_git() -> None:
    """lm-eval asks git for the commit of the current folder, which its results name; git prints nothing where that is
    no repository."""
    import lm_eval.evaluator

    lm_eval.evaluator.get_git_commit_hash = lambda: git_output(Path(), "describe", "--always")


def scores_of(metrics: Mapping[str, Any]) -> dict[str, EvalScore]:
    """lm-eval's flat `{"NAME,FILTER": value, "NAME_stderr,FILTER": value}` as NAME,FILTER -> value and stderr."""
    found = {}
    for key, value in metrics.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            found[key] = EvalScore(value=finite(value), stderr=finite(metrics.get(f"{name}_stderr,{chosen}")))
    return found


def finite(value: Any) -> float | None:
    """`value` as a number that JSON can hold; None where it is none."""
    return float(value) if isinstance(value, int | float) and isfinite(value) else None
