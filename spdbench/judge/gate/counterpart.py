"""Which results a gate holds against each other, and which of their runs.

Must not know verdicts, metrics or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from spdbench.judge.comparison.workload import differences, workload
from spdbench.judge.results.recording import Recording
from spdbench.judge.results.schema import RunKey


@dataclass(frozen=True, eq=False)
class Pair:
    """One label on both sides. `keys` are the runs that answered the same prompt in both, in the candidate's order."""

    baseline: Recording
    candidate: Recording
    keys: tuple[RunKey, ...]

    @property
    def categories(self) -> list[str]:
        return list(
            dict.fromkeys(run.category for side in (self.candidate, self.baseline) for run in side.runs.values())
        )

    @property
    def knows_ids(self) -> bool:
        """False if an engine on either side gave text alone."""
        return all("ids" not in side.head.backend.unknown for side in (self.baseline, self.candidate))

    @property
    def is_strict(self) -> bool:
        """True where nothing excuses a difference: greedy in float32, by the model itself."""
        head = self.candidate.head
        own = self.knows_ids and head.backend.other_model is None
        return own and head.model.dtype == "float32" and head.decoding.temperature == 0

    def part(self, category: str) -> Pair:
        """The runs of one category."""
        return pair(_part(self.baseline, category), _part(self.candidate, category))


def pair(baseline: Recording, candidate: Recording) -> Pair:
    """Pairs runs that did not fail, with the same prompt id, turn and repeat, whose `prompt_sha256` agree."""
    old = baseline.runs
    keys = (
        key
        for key, run in candidate.runs.items()
        if key in old and not (run.failed or old[key].failed) and run.prompt_sha256 == old[key].prompt_sha256
    )
    return Pair(baseline, candidate, tuple(keys))


def _part(recording: Recording, category: str) -> Recording:
    return replace(recording, runs={key: run for key, run in recording.runs.items() if run.category == category})


def counterparts(candidate: Recording, baselines: Sequence[Recording]) -> list[Recording] | str:
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


def forgotten(candidates: Sequence[Recording], baselines: Sequence[Recording]) -> Iterator[Recording]:
    """The baseline's results that should have a new one: their label is missing among those of the same work."""
    done: dict[str, set[str]] = {}
    for each in candidates:
        done.setdefault(workload(each.head), set()).add(each.label)
    for each in baselines:
        labels = done.get(workload(each.head))
        if labels is not None and each.label not in labels:
            yield each


def unasked(candidates: Sequence[Recording], baselines: Sequence[Recording]) -> list[Recording]:
    """The baseline's results of work that none of the new ones did: of another suite, model, dtype or decoding."""
    done = {workload(each.head) for each in candidates}
    return [each for each in baselines if workload(each.head) not in done]


def reference(recording: Recording, others: Sequence[Recording]) -> Recording | None:
    """The plain decoding that took turns with `recording` in one run, itself perhaps; None if there was none.

    A run measures its machine once, so that the environments of its results are equal to the last byte of read
    bandwidth. Where that still leaves several of a label, the one counts that was begun at the same time.
    """
    made_together = [
        each
        for each in (recording, *others)
        if each.head.backend.kind == "autoregressive"
        and workload(each.head) == workload(recording.head)
        and each.head.environment == recording.head.environment
    ]
    return min(made_together, key=lambda each: _distance(recording, each), default=None)


def _distance(recording: Recording, other: Recording) -> tuple[bool, str, float]:
    """Small for the reference: `vanilla` comes before other plain decoding, then one label before the next."""
    return other.head.backend.name != "vanilla", other.label, _seconds_apart(recording, other)


def _seconds_apart(recording: Recording, other: Recording) -> float:
    try:
        began, other_began = (datetime.fromisoformat(each.head.created) for each in (recording, other))
        return abs((began - other_began).total_seconds())
    except (ValueError, TypeError):
        return 0.0 if recording.head.created == other.head.created else float("inf")
