"""Results in, a judgement of each label out: is it still what the baseline says.

What belongs together is `counterpart.py`'s; what is asked of it stands in `completeness.py`, `exact.py` and
`timing.py`. The line over all prompts decides; those of categories say where it comes from. Must not know files,
printing, or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spdbench.judge.comparison.workload import machine, same_machine, workload
from spdbench.judge.gate.calibration import Calibration, Threshold
from spdbench.judge.gate.completeness import complete
from spdbench.judge.gate.counterpart import Pair, counterparts, forgotten, pair, reference
from spdbench.judge.gate.exact import exact
from spdbench.judge.gate.timing import SPEED, SPEEDUP, Versus, timing
from spdbench.judge.gate.verdict import Finding, Gate, Judgement
from spdbench.judge.results.recording import Recording

MAX_SLOWDOWN = 0.05
MAX_ACCEPTANCE_DROP = 0.005
GATES: Mapping[str, tuple[Gate, ...]] = {"exact": ("exact",), "timing": ("timing",), "all": ("exact", "timing")}


@dataclass(frozen=True)
class Limits:
    """What may be lost. A `max_slowdown` that was given wins over the calibration, and that over the default."""

    max_slowdown: float | None = None
    max_acceptance_drop: float = MAX_ACCEPTANCE_DROP
    calibration: Calibration | None = None

    def slowdown(self, recording: Recording, metric: str, num_new: int, num_baselines: int) -> float:
        if self.max_slowdown is not None:
            return self.max_slowdown
        found = self.calibrated(recording, metric)
        return MAX_SLOWDOWN if found is None else found.slowdown(num_new, num_baselines)

    def calibrated(self, recording: Recording, metric: str) -> Threshold | None:
        """What the calibration holds for this metric of such a result."""
        return self.calibration.find(recording, metric) if self.calibration else None


@dataclass(frozen=True, eq=False)
class _Case:
    """One new result beside its baselines, the newest first; ids and steps are held against that one alone.

    `peers` are the other new results that count together with it, beside theirs, if speed is judged here for all of
    them; None if it is judged with another.
    """

    versus: tuple[Versus, ...]
    peers: tuple[tuple[Versus, ...], ...] | None
    decides_alone: bool

    @property
    def pair(self) -> Pair:
        return self.versus[0].pair

    def part(self, category: str) -> _Case:
        peers = None if self.peers is None else tuple(_part(each, category) for each in self.peers)
        return _Case(_part(self.versus, category), peers, self.decides_alone)


def _part(versus: Sequence[Versus], category: str) -> tuple[Versus, ...]:
    return tuple(Versus(own.part(category), plain and plain.part(category)) for own, plain in versus)


def check(
    candidates: Sequence[Recording],
    baselines: Sequence[Recording],
    gates: Sequence[Gate],
    limits: Limits,
    *,
    by_category: bool = False,
) -> list[Judgement]:
    """A judgement of each of `candidates`, in their order, then of each label that they should have and lack."""
    kind = {each: _kind(each, candidates) for each in candidates}
    together = {each: [other for other in candidates if kind[other] == kind[each]] for each in candidates}
    found = [_judge(each, together[each], candidates, baselines, gates, limits, by_category) for each in candidates]
    missing = {(workload(each.head), each.label): each for each in forgotten(candidates, baselines)}
    return [*found, *(_missing(each, gates[0]) for each in missing.values())]


def _judge(
    candidate: Recording,
    together: Sequence[Recording],
    candidates: Sequence[Recording],
    baselines: Sequence[Recording],
    gates: Sequence[Gate],
    limits: Limits,
    by_category: bool,
) -> Judgement:
    old = counterparts(candidate, baselines)
    if isinstance(old, str):
        finding = Finding(gates[0], "paired_runs", "not comparable", old)
        return Judgement(candidate.label, candidate.file, None, candidate.head, (finding,))
    speaks = candidate is max(together, key=lambda each: each.head.created)
    versus, *peers = (
        tuple(Versus(pair(base, each), _plain(each, base, candidates, baselines)) for base in old)
        for each in (candidate, *(each for each in together if speaks and each is not candidate))
    )
    serves = any(reference(each, candidates) is candidate for each in candidates if each is not candidate)
    case = _Case(versus, tuple(peers) if speaks else None, decides_alone=not serves)
    findings = list(_findings(case, gates, limits))
    if by_category:
        for category in case.pair.categories:
            parts = _findings(case.part(category), gates, limits, of_all=False)
            findings += [replace(each, category=category, decides=False) for each in parts]
    notes = tuple(_notes(case, gates, limits))
    return Judgement(candidate.label, candidate.file, old[0].file, candidate.head, tuple(findings), notes)


def _findings(case: _Case, gates: Sequence[Gate], limits: Limits, *, of_all: bool = True) -> Iterator[Finding]:
    yield from complete(case.pair, gates[0], of_all=of_all)
    if "exact" in gates:
        found = exact(case.pair, limits.max_acceptance_drop)
        yield from (each for each in found if of_all or each.metric != "real_divergences")
    if "timing" in gates and case.peers is not None:
        allowed = partial(limits.slowdown, case.pair.candidate)
        yield from timing([case.versus, *case.peers], allowed, decides_alone=case.decides_alone)


def _kind(recording: Recording, others: Sequence[Recording]) -> tuple[object, ...]:
    """Equal for results whose speeds count together: one label and one work on one machine's devices. One without plain
    decoding beside it can tell no speed-up, and is judged by itself."""
    head = recording.head
    alone = reference(recording, others) is None
    return recording.label, workload(head), machine(head), tuple(head.backend.devices), alone


def _plain(
    candidate: Recording, base: Recording, candidates: Sequence[Recording], baselines: Sequence[Recording]
) -> Pair | None:
    """The plain decoding that took turns with each of the two, if both had it under the same label."""
    new, old = reference(candidate, candidates), reference(base, baselines)
    if new is None or old is None or new is candidate or old is base or new.label != old.label:
        return None
    return pair(old, new)


def _missing(base: Recording, gate: Gate) -> Judgement:
    reason = f"{base.file} has this label and the new results lack it; name single files as --baseline to check fewer"
    finding = Finding(gate, "paired_runs", "not comparable", reason, before=len(base.runs), now=0)
    return Judgement(base.label, None, base.file, base.head, (finding,))


def _notes(case: _Case, gates: Sequence[Gate], limits: Limits) -> Iterator[str]:
    """What a reader should know beside the verdicts."""
    old, new = case.pair.baseline.head, case.pair.candidate.head
    if old.backend.name != new.backend.name:
        yield f"the label is {new.backend.name} now and was {old.backend.name}"
    for name in sorted(old.backend.options.keys() | new.backend.options.keys()):
        values = [head.backend.options.get(name) for head in (old, new)]
        if values[0] != values[1]:
            yield f"option {name} is {values[1]} now and was {values[0]}"
    for name in sorted(old.backend.chosen.keys() & new.backend.chosen.keys()):
        values = [head.backend.chosen[name] for head in (old, new)]
        if values[0] != values[1]:
            yield f"it chose {name} {values[1]} for itself, and {values[0]} before; set what it is to use with -o"
    drafters = [head.drafter and (head.drafter.id, head.drafter.sha256) for head in (old, new)]
    if drafters[0] != drafters[1]:
        yield "it has another drafter than the baseline"
    if new.backend.lossy and not old.backend.lossy:
        yield "it is lossy now, its output not meant to be the model's own, and was not"
    if old.divergence is not None and new.divergence is None:
        yield "its run did not hold its outputs against plain decoding's, as the baseline's did"
    if "timing" not in gates:
        return
    if case.peers is None:
        yield "speed is judged of the new results of this label together, with the newest"
    elif case.peers:
        yield f"{len(case.peers) + 1} new results; their speeds count together"
    if len(case.versus) > 1:
        yield f"the baseline has {len(case.versus)} results; speed is held against all of them on this machine"
    if case.decides_alone and all(each.plain is None for each in case.versus):
        yield (
            "no plain decoding of the same run stands beside it on both sides, so tokens/s decide; measure vanilla in "
            "the same run, and name folders that hold both"
        )
    if case.peers is not None and same_machine(old, new):
        yield from _threshold_notes(case, limits)


def _threshold_notes(case: _Case, limits: Limits) -> Iterator[str]:
    """Where the slowdown that is allowed is nobody's choice and nobody's finding."""
    metric = SPEED if all(each.plain is None for each in case.versus) else SPEEDUP
    decides = metric == SPEEDUP or case.decides_alone
    if not decides or limits.max_slowdown is not None or limits.calibrated(case.pair.candidate, metric) is not None:
        return
    calibration, fingerprint = limits.calibration, case.pair.candidate.head.environment.get("fingerprint")
    if calibration is None:
        why = "there is no calibration.json beside the baseline"
    elif calibration.fingerprint != fingerprint:
        why = "calibration.json is of another machine and was not used"
    else:
        why = "calibration.json holds nothing for a result like this one"
    yield f"a slowdown of {MAX_SLOWDOWN:.0%} is allowed by default, as {why}; --calibrate finds what is noise here"
