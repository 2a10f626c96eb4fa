"""Whether both sides answered the same prompts, which comes before any gate: a missing prompt is never a pass."""

from __future__ import annotations

from collections.abc import Iterator

from spdbench.judge.comparison.pairing import Pair
from spdbench.judge.gate.verdict import Finding, Gate, Verdict, count_runs, name_of
from spdbench.judge.loaded import LoadedResult
from spdbench.judge.results.schema import RunKey


def complete(pair: Pair, gate: Gate, *, of_all: bool = True) -> Iterator[Finding]:
    """Two findings: did runs fail, and does each run have its counterpart. With `of_all` also whether each side has all
    conversations that it was asked for, which cannot be known of a part."""
    yield _failures(pair, gate)
    yield _partners(pair, gate, of_all=of_all)


def unfinished(result: LoadedResult) -> str | None:
    """Why not all conversations that were asked for are in a result; None if they are."""
    begun, asked = result.num_begun, result.head.suite.num_prompts
    if begun >= asked:
        return None
    return f"{result.file} has {begun} of the {asked} conversations asked for; `spdbench run --resume` finishes it"


def _failures(pair: Pair, gate: Gate) -> Finding:
    runs = pair.candidate.runs
    failed, before = _failed(pair.candidate), _failed(pair.baseline)
    verdict: Verdict = "regression" if failed else "pass"
    reason = "no run failed"
    if failed:
        error = runs.errors[runs.row_of[failed[0]]] or "no tokens"
        reason = f"{len(failed)} of {count_runs(len(runs.keys))} failed; {name_of(failed[0])}: {error}"
    return Finding(gate, "failed_runs", verdict, reason, len(before), len(failed))


def _failed(result: LoadedResult) -> list[RunKey]:
    return [key for key, failed in zip(result.runs.keys, result.runs.failed, strict=True) if failed]


def _partners(pair: Pair, gate: Gate, *, of_all: bool) -> Finding:
    faults = [*(filter(None, map(unfinished, (pair.baseline, pair.candidate))) if of_all else ()), *_faults(pair)]
    verdict: Verdict = "not comparable" if faults or not pair.keys else "pass"
    reason = "; ".join(faults) or ("every run has its counterpart" if pair.keys else "there is no run on both sides")
    if verdict == "pass" and (later := _other_contexts(pair)):
        reason = f"{len(later)} later turns follow on other answers and are left out, such as {name_of(later[0])}"
    return Finding(gate, "paired_runs", verdict, reason, len(pair.baseline.runs.keys), len(pair.keys))


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
            yield f"{count_runs(len(keys))} {what}, such as {name_of(keys[0])}"


def _other_prompts(pair: Pair) -> list[RunKey]:
    """Runs on both sides whose prompt is not the same."""
    old, new = pair.baseline.runs, pair.candidate.runs
    return [key for key in new.keys if key in old.row_of and old.prompt_of(key) != new.prompt_of(key)]


def _other_contexts(pair: Pair) -> list[RunKey]:
    """Later turns whose conversation began the same and whose context differs, as answers before them did."""
    paired = set(pair.keys)
    return [key for key in _other_prompts(pair) if key[1] and (key[0], 0, key[2]) in paired]
