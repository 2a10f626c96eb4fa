"""Small runs of which a gate's tests know everything: prompts, steps, times, ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from spdbench.judge.gate.check import GATES, Limits, check
from spdbench.judge.gate.verdict import Finding, Judgement
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.results.schema import Run
from tests.builders import MS, ORACLE, chunk_steps, make_backend, make_result, make_run, vanilla_steps

CATEGORIES = ("math", "writing")
CHUNKS = (1, 4, 2, 3)


def plain_runs(num_prompts: int = 10, *, step_ns: int = 20 * MS, **more: Any) -> list[Run]:
    return [
        make_run(vanilla_steps(10, step_ns=step_ns), prompt=f"p{i}", category=CATEGORIES[i % 2], **more)
        for i in range(num_prompts)
    ]


def drafted_runs(
    num_prompts: int = 10,
    *,
    chunks: Callable[[int], Sequence[int]] = lambda _: CHUNKS,
    step_ns: Callable[[int], int] = lambda _: 20 * MS,
    ids: Callable[[int], Sequence[int] | None] = lambda _: None,
    **more: Any,
) -> list[Run]:
    """Rounds of draft and verification; what is asked for goes by the prompt's number."""
    return [
        make_run(
            chunk_steps(chunks(i), step_ns=step_ns(i)),
            prompt=f"p{i}",
            category=CATEGORIES[i % 2],
            output_ids=ids(i),
            **more,
        )
        for i in range(num_prompts)
    ]


def plain(runs: Iterable[Run] | None = None, *, file: str = "vanilla.json", **more: Any) -> LoadedResult:
    backend = make_backend(label=more.pop("label", None), name=more.pop("name", "vanilla"))
    return _recording(make_result(plain_runs() if runs is None else runs, backend, **_known(more)), file, more)


def eagle(runs: Iterable[Run] | None = None, *, file: str = "eagle.json", **more: Any) -> LoadedResult:
    names = {name: more.pop(name) for name in BACKEND if name in more}
    backend = make_backend("draft_verify", **names)
    result = make_result(drafted_runs() if runs is None else runs, backend, drafter=ORACLE, **_known(more))
    return _recording(result, file, more)


BACKEND = ("label", "options", "devices", "lossy", "chosen", "unknown", "other_model")
MADE = ("suite", "dtype", "temperature", "machine", "num_prompts", "divergence")


def _known(more: dict[str, Any]) -> dict[str, Any]:
    return {name: more[name] for name in MADE if name in more}


def _recording(result: Any, file: str, more: dict[str, Any]) -> LoadedResult:
    """`result`, with whatever else was asked for put into its head."""
    return load(result.model_copy(update={k: v for k, v in more.items() if k not in MADE}), file)


def judged(
    new: Sequence[LoadedResult] | LoadedResult,
    old: Sequence[LoadedResult] | LoadedResult,
    gate: str = "all",
    **more: Any,
) -> list[Judgement]:
    candidates, baselines = ([side] if isinstance(side, LoadedResult) else list(side) for side in (new, old))
    by_category = more.pop("by_category", False)
    return check(candidates, baselines, GATES[gate], Limits(**more), by_category=by_category)


def only(judgements: Sequence[Judgement]) -> Judgement:
    assert len(judgements) == 1
    return judgements[0]


def finding(judgement: Judgement, metric: str, category: str | None = None) -> Finding:
    [found] = [each for each in judgement.findings if (each.metric, each.category) == (metric, category)]
    return found


def of(judgements: Sequence[Judgement], label: str) -> Judgement:
    return only([each for each in judgements if each.label == label])
