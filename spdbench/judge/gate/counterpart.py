"""Which results a gate compares: a label's baselines, what is missing, and the plain decoding of the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from spdbench.judge.comparison.pairing import differences, workload
from spdbench.judge.loaded import LoadedResult


def counterparts(candidate: LoadedResult, baselines: Sequence[LoadedResult]) -> list[LoadedResult] | str:
    """The baseline's results of the same label and the same work, the newest first; or why there is none."""
    namesakes = [each for each in baselines if each.label == candidate.label]
    if not namesakes:
        known = ", ".join(sorted({each.label for each in baselines}))
        return f"the baseline has no label '{candidate.label}', only {known}"
    fit = [each for each in namesakes if workload(each.head) == workload(candidate.head)]
    if not fit:
        nearest = min(namesakes, key=lambda each: len(differences(each.head, candidate.head)))
        return f"{nearest.file} did other work: {'; '.join(differences(candidate.head, nearest.head))}"
    kinds = [each.head.backend.kind for each in (candidate, fit[0])]
    if kinds[0] != kinds[1]:
        return f"the label is a backend of kind {kinds[0]} now, and was one of kind {kinds[1]}"
    return sorted(fit, key=lambda each: each.head.created, reverse=True)


def missing(candidates: Sequence[LoadedResult], baselines: Sequence[LoadedResult]) -> Iterator[LoadedResult]:
    """The baseline's results that should have a new one: their label is missing among those of the same work."""
    done: dict[str, set[str]] = {}
    for each in candidates:
        done.setdefault(workload(each.head), set()).add(each.label)
    for each in baselines:
        labels = done.get(workload(each.head))
        if labels is not None and each.label not in labels:
            yield each


def not_covered(candidates: Sequence[LoadedResult], baselines: Sequence[LoadedResult]) -> list[LoadedResult]:
    """The baseline's results of work that none of the new ones did: of another suite, model, dtype or decoding."""
    done = {workload(each.head) for each in candidates}
    return [each for each in baselines if workload(each.head) not in done]


def reference(result: LoadedResult, others: Sequence[LoadedResult]) -> LoadedResult | None:
    """The plain decoding that took turns with `result` in one run, itself perhaps; None if there was none.

    A run measures its machine once, so that the environments of its results are equal to the last byte of read
    bandwidth. Where that still leaves several of a label, the one counts that was begun at the same time.
    """
    made_together = [
        each
        for each in (result, *others)
        if each.head.backend.kind == "autoregressive"
        and workload(each.head) == workload(result.head)
        and each.head.environment == result.head.environment
    ]
    return min(made_together, key=lambda each: _distance(result, each), default=None)


def _distance(result: LoadedResult, other: LoadedResult) -> tuple[bool, str, float]:
    """Small for the reference: `vanilla` comes before other plain decoding, then one label before the next."""
    return other.head.backend.name != "vanilla", other.label, _seconds_apart(result, other)


def _seconds_apart(result: LoadedResult, other: LoadedResult) -> float:
    try:
        began, other_began = (datetime.fromisoformat(each.head.created) for each in (result, other))
        return abs((began - other_began).total_seconds())
    except (ValueError, TypeError):
        return 0.0 if result.head.created == other.head.created else float("inf")
