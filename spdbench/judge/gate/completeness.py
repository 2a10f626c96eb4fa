"""Whether both sides answered the same prompts, which comes before any gate: a missing prompt is never a pass.

Must not know clocks, files or how findings are shown.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdbench.judge.gate.counterpart import Pair
from spdbench.judge.gate.exact import name_of, runs
from spdbench.judge.gate.verdict import Finding, Gate, Verdict
from spdbench.judge.results.recording import Recording
from spdbench.judge.results.schema import RunKey


def complete(pair: Pair, gate: Gate, *, of_all: bool = True) -> Iterator[Finding]:
    """Two findings: did runs fail, and does each run have its counterpart. With `of_all` also whether each side has all
    conversations that it was asked for, which a part cannot tell."""
    yield _failures(pair, gate)
    yield _partners(pair, gate, of_all=of_all)


def unfinished(recording: Recording) -> str | None:
    """Why not all conversations that were asked for are in a result; None if they are."""
    begun, asked = len({key[0] for key in recording.runs}), recording.head.suite.num_prompts
    if begun >= asked:
        return None
    return f"{recording.file} has {begun} of the {asked} conversations asked for; `spdbench run --resume` finishes it"


def _failures(pair: Pair, gate: Gate) -> Finding:
    failed, before = _failed(pair.candidate), _failed(pair.baseline)
    verdict: Verdict = "regression" if failed else "pass"
    reason = "no run failed"
    if failed:
        error = pair.candidate.runs[failed[0]].error or "no tokens"
        reason = f"{len(failed)} of {runs(len(pair.candidate.runs))} failed; {name_of(failed[0])}: {error}"
    return Finding(gate, "failed_runs", verdict, reason, len(before), len(failed))


def _failed(recording: Recording) -> list[RunKey]:
    return [key for key, run in recording.runs.items() if run.failed]


def _partners(pair: Pair, gate: Gate, *, of_all: bool) -> Finding:
    faults = [*(filter(None, map(unfinished, (pair.baseline, pair.candidate))) if of_all else ()), *_faults(pair)]
    verdict: Verdict = "not comparable" if faults or not pair.keys else "pass"
    reason = "; ".join(faults) or ("every run has its counterpart" if pair.keys else "there is no run on both sides")
    if verdict == "pass" and (later := _other_contexts(pair)):
        reason = f"{len(later)} later turns follow on other answers and are left out, such as {name_of(later[0])}"
    return Finding(gate, "paired_runs", verdict, reason, len(pair.baseline.runs), len(pair.keys))


def _faults(pair: Pair) -> Iterator[str]:
    old, new = pair.baseline.runs, pair.candidate.runs
    yield from _told("only in the baseline", [key for key in old if key not in new])
    yield from _told("not in the baseline", [key for key in new if key not in old])
    both = [key for key in new if key in old]
    yield from _told("that failed in the baseline", [key for key in both if old[key].failed])
    excused = set(_other_contexts(pair)) if not pair.is_strict else set()
    other = [key for key in both if old[key].prompt_sha256 != new[key].prompt_sha256 and key not in excused]
    yield from _told("with another prompt than in the baseline", other)


def _told(what: str, keys: list[RunKey]) -> Iterator[str]:
    if keys:
        yield f"{runs(len(keys))} {what}, such as {name_of(keys[0])}"


def _other_contexts(pair: Pair) -> list[RunKey]:
    """Later turns whose conversation began the same and whose context differs, as answers before them did."""
    old, new, paired = pair.baseline.runs, pair.candidate.runs, set(pair.keys)
    return [
        (prompt, turn, repeat)
        for prompt, turn, repeat in new
        if turn
        and (prompt, 0, repeat) in paired
        and (prompt, turn, repeat) in old
        and old[prompt, turn, repeat].prompt_sha256 != new[prompt, turn, repeat].prompt_sha256
    ]
