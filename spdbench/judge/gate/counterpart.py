"""Which results a gate compares: a label's baselines, what is missing, and the plain decoding of the same run.

Whether both sides answered the same prompts comes before any gate: a missing prompt is never a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from spdbench.console import counted
from spdbench.judge.comparison.pairing import Pair, differences, workload
from spdbench.judge.gate.verdict import Finding, Gate, GateVerdict, name_of
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.schema import RunKey


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
    bandwidth. Where that still leaves several of a label, the one counts that was begun at the same time. For a server
    that drafts it is one without drafts; one of which nothing is known counts as such if it is the run's baseline, or
    where no other is left.
    """
    if result.is_served and result.drafts is False:
        return result
    made_together = [
        each
        for each in (result, *others)
        if is_plain(each, result)
        and workload(each.head) == workload(result.head)
        and each.head.environment == result.head.environment
    ]
    return min(made_together, key=lambda each: _distance(result, each), default=None)


def is_plain(each: LoadedResult, result: LoadedResult) -> bool:
    """True if `each` is the plain decoding with which `result` is compared: of the same model, that of servers."""
    if each.is_served and result.is_served:
        may_be = each is result or result.drafts or each.label == each.head.baseline
        return each.drafts is False or (each.drafts is None and bool(may_be))
    return each.head.backend.kind == "autoregressive"


def _distance(result: LoadedResult, other: LoadedResult) -> tuple[bool, bool, bool, str, float]:
    """Small for the reference: `vanilla` comes before other plain decoding, a server that is known to draft nothing
    before one of which nothing is known, the run's baseline before others, then one label before the next."""
    is_unknown, is_other = other.is_served and other.drafts is None, other.label != other.head.baseline
    rank = other.head.backend.name != "vanilla", is_unknown, is_unknown and is_other
    return *rank, other.label, _seconds_apart(result, other)


def _seconds_apart(result: LoadedResult, other: LoadedResult) -> float:
    try:
        began, other_began = (datetime.fromisoformat(each.head.created) for each in (result, other))
        return abs((began - other_began).total_seconds())
    except (ValueError, TypeError):
        return 0.0 if result.head.created == other.head.created else float("inf")


def complete(pair: Pair, gate: Gate, *, of_all: bool = True) -> Iterator[Finding]:
    """Two findings: did runs fail, and does each run have its counterpart. With `of_all` also whether each side has all
    conversations that it was asked for, which cannot be known of a part."""
    runs = pair.candidate.runs
    failed, before = _failed(pair.candidate), _failed(pair.baseline)
    verdict: GateVerdict = "regression" if failed else "pass"
    reason = "no run failed"
    if failed:
        error = runs.errors[runs.row_of[failed[0]]] or "no tokens"
        reason = f"{len(failed)} of {counted(len(runs.keys), 'run')} failed; {name_of(failed[0])}: {error}"
    yield Finding(gate, "failed_runs", verdict, reason, len(before), len(failed))
    faults = [*(_unfinished(pair) if of_all else ()), *_faults(pair)]
    verdict = "not comparable" if faults or not pair.keys else "pass"
    reason = "; ".join(faults) or ("every run has its counterpart" if pair.keys else "there is no run on both sides")
    if verdict == "pass" and (later := _other_contexts(pair)):
        reason = f"{len(later)} later turns follow on other answers and are omitted, such as {name_of(later[0])}"
    yield Finding(gate, "paired_runs", verdict, reason, len(pair.baseline.runs.keys), len(pair.keys))


def _unfinished(pair: Pair) -> Iterator[str]:
    """Which of the two lacks conversations that it was asked for."""
    for each in (pair.baseline, pair.candidate):
        begun, asked = each.num_begun, each.head.suite.num_prompts
        if begun < asked:
            yield f"{each.file} has {begun} of the {asked} conversations asked for; `spdbench run --resume` finishes it"


def _failed(result: LoadedResult) -> list[RunKey]:
    return [key for key, failed in zip(result.runs.keys, result.runs.failed, strict=True) if failed]


def _faults(pair: Pair) -> Iterator[str]:
    old, new = pair.baseline.runs, pair.candidate.runs
    failed_before, excused = set(_failed(pair.baseline)), set() if pair.is_strict else set(_other_contexts(pair))
    for what, keys in (
        ("only in the baseline", [key for key in old.keys if key not in new.row_of]),
        ("not in the baseline", [key for key in new.keys if key not in old.row_of]),
        ("that failed in the baseline", [key for key in new.keys if key in failed_before]),
        ("with another prompt than in the baseline", [key for key in _other_prompts(pair) if key not in excused]),
    ):
        if keys:
            yield f"{counted(len(keys), 'run')} {what}, such as {name_of(keys[0])}"


def _other_prompts(pair: Pair) -> list[RunKey]:
    """Runs on both sides whose prompt is not the same."""
    old, new = pair.baseline.runs, pair.candidate.runs
    return [key for key in new.keys if key in old.row_of and old.prompt_of(key) != new.prompt_of(key)]


def _other_contexts(pair: Pair) -> list[RunKey]:
    """Later turns whose conversation began the same and whose context differs, as answers before them did."""
    paired = set(pair.keys)
    return [key for key in _other_prompts(pair) if key[1] and (key[0], 0, key[2]) in paired]
