"""New results in, a judgement of each label out: is it still what the baseline says.

`counterpart.py` says which results are compared and whether they are complete, `exact.py` and `timing.py` judge them.
The findings over all prompts decide; those of categories say where a difference comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spdbench.judge.comparison.pairing import Pair, machine, pair, same_machine, workload
from spdbench.judge.gate.calibration import WIDE, Calibration, Threshold
from spdbench.judge.gate.counterpart import complete, counterparts, missing, reference
from spdbench.judge.gate.exact import exact
from spdbench.judge.gate.timing import SPEED, SPEEDUP, Allowance, Comparison, timing
from spdbench.judge.gate.verdict import Finding, Gate, Judgement
from spdbench.judge.loaded import LoadedResult

MAX_SLOWDOWN = 0.05
MAX_ACCEPTANCE_DROP = 0.005
NOT_COUNTED = frozenset({"identical_outputs", "real_divergences", "score"})
SAME_FOR_ANY_TREE = frozenset({"identical_outputs", "real_divergences", "num_new_tokens"})
GATES: Mapping[str, tuple[Gate, ...]] = {"exact": ("exact",), "timing": ("timing",), "all": ("exact", "timing")}


@dataclass(frozen=True)
class Limits:
    """What may be lost. A `max_slowdown` that was given wins over the calibration, and that over the default."""

    max_slowdown: float | None = None
    max_acceptance_drop: float = MAX_ACCEPTANCE_DROP
    calibration: Calibration | None = None

    def slowdown(self, result: LoadedResult, metric: str, num_new: int, num_baselines: int) -> Allowance:
        found = self.calibrated(result, metric)
        if self.max_slowdown is not None:
            return Allowance(self.max_slowdown, "given" if found is None else "calibrated")
        if found is None:
            return Allowance(MAX_SLOWDOWN, "default")
        return Allowance(found.slowdown(num_new, num_baselines), "calibrated")

    def calibrated(self, result: LoadedResult, metric: str) -> Threshold | None:
        """What the calibration holds for this metric of such a result."""
        return self.calibration.find(result, metric) if self.calibration else None


@dataclass(frozen=True, eq=False)
class _Case:
    """A new result compared with each of its baselines, the newest first; ids and steps are compared with that alone.

    `peers` are the other new results whose speeds count together with it, each with its baselines, if their speed is
    judged here; None if it is judged with another of them.
    """

    comparisons: tuple[Comparison, ...]
    peers: tuple[tuple[Comparison, ...], ...] | None
    decides_alone: bool

    @property
    def pair(self) -> Pair:
        return self.comparisons[0].pair

    def part(self, category: str) -> _Case:
        peers = None if self.peers is None else tuple(_part(each, category) for each in self.peers)
        return _Case(_part(self.comparisons, category), peers, self.decides_alone)


def _part(comparisons: Sequence[Comparison], category: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(own.part(category), plain and plain.part(category)) for own, plain in comparisons)


def check(
    candidates: Sequence[LoadedResult],
    baselines: Sequence[LoadedResult],
    gates: Sequence[Gate],
    limits: Limits,
    *,
    by_category: bool = False,
) -> list[Judgement]:
    """A judgement of each of `candidates`, in their order, then of each label that they should have and lack."""
    kinds = [_kind(each, candidates) for each in candidates]
    found = []
    for each, kind in zip(candidates, kinds, strict=True):
        together = [other for other, other_kind in zip(candidates, kinds, strict=True) if other_kind == kind]
        found.append(judge(each, together, candidates, baselines, gates, limits, by_category=by_category))
    lacking = {(workload(each.head), each.label): each for each in missing(candidates, baselines)}
    return [*found, *(_missing(each, gates[0]) for each in lacking.values())]


def judge(
    candidate: LoadedResult,
    together: Sequence[LoadedResult],
    candidates: Sequence[LoadedResult],
    baselines: Sequence[LoadedResult],
    gates: Sequence[Gate],
    limits: Limits,
    *,
    by_category: bool = False,
) -> Judgement:
    """The judgement of one of `candidates`; `together` are those whose speeds count together with its own."""
    old = counterparts(candidate, baselines)
    if isinstance(old, str):
        finding = Finding(gates[0], "paired_runs", "not comparable", old)
        return Judgement(candidate.label, candidate.file, None, candidate.head, (finding,))
    case = _case(candidate, together, old, candidates, baselines)
    findings = list(_findings(case, gates, limits))
    for category in case.pair.categories if by_category else ():
        parts = _findings(case.part(category), gates, limits, of=candidate)
        findings += [replace(part, category=category, decides=False) for part in parts]
    notes = tuple(_notes(case, gates, limits))
    return Judgement(candidate.label, candidate.file, old[0].file, candidate.head, tuple(findings), notes)


def _case(
    candidate: LoadedResult,
    together: Sequence[LoadedResult],
    old: Sequence[LoadedResult],
    candidates: Sequence[LoadedResult],
    baselines: Sequence[LoadedResult],
) -> _Case:
    is_newest = candidate is max(together, key=lambda each: each.head.created)
    comparisons, *peers = (
        tuple(Comparison(pair(base, each), _plain(each, base, candidates, baselines)) for base in old)
        for each in (candidate, *(each for each in together if is_newest and each is not candidate))
    )
    is_reference = any(reference(each, candidates) is candidate for each in candidates if each is not candidate)
    return _Case(comparisons, tuple(peers) if is_newest else None, decides_alone=not is_reference)


def _findings(
    case: _Case, gates: Sequence[Gate], limits: Limits, *, of: LoadedResult | None = None
) -> Iterator[Finding]:
    """`of` is the whole candidate, if `case` is a part of it: what was calibrated of the whole goes for its parts."""
    of_all = of is None
    yield from complete(case.pair, gates[0], of_all=of_all)
    found: list[Finding] = []
    if "exact" in gates:
        found += exact(case.pair, limits.max_acceptance_drop)
    if "timing" in gates and case.peers is not None:
        allowed = partial(limits.slowdown, of or case.pair.candidate)
        found += timing([case.comparisons, *case.peers], allowed, decides_alone=case.decides_alone)
    for each in found:
        if of_all or each.metric != "real_divergences":
            yield _unless_contradicted(_unless_another_tree(each, case.pair), case.pair)


def _unless_another_tree(found: Finding, pair: Pair) -> Finding:
    """`found`, but no word of a difference in steps or speed if the backend chose another tree of drafts for itself:
    it chooses by times that it measures, so that the same code may choose differently."""
    trees = [head.backend.chosen.get("tree") for head in pair.heads]
    alike = None in trees or trees[0] == trees[1] or found.metric in SAME_FOR_ANY_TREE
    if alike or found.verdict not in ("regression", "improved"):
        return found
    reason = f"it chose the tree {trees[1]} by its measured costs, and {trees[0]} before; set what it is to use with -o"
    return replace(found, verdict="inconclusive", reason=reason)


def _unless_contradicted(found: Finding, pair: Pair) -> Finding:
    """`found`, but no word of a difference in what is counted if a server's counts contradict each other."""
    sides = (pair.baseline, pair.candidate)
    is_sure = found.metric in NOT_COUNTED or not any(each.metrics["num_contradicted"] for each in sides)
    if is_sure or found.verdict not in ("regression", "improved"):
        return found
    reason = f"{found.reason}; but the server's counts contradict each other, so that it may count otherwise now"
    return replace(found, verdict="inconclusive", reason=reason)


def _kind(result: LoadedResult, others: Sequence[LoadedResult]) -> tuple[object, ...]:
    """Equal for results whose speeds count together: one label and one work on one machine's devices. One without plain
    decoding of its own run has no speed-up, and is judged by itself."""
    head = result.head
    alone = reference(result, others) is None
    return result.label, workload(head), machine(head), tuple(head.backend.devices), alone


def _plain(
    candidate: LoadedResult, base: LoadedResult, candidates: Sequence[LoadedResult], baselines: Sequence[LoadedResult]
) -> Pair | None:
    """The plain decoding that took turns with each of the two, if both had it under the same label."""
    new, old = reference(candidate, candidates), reference(base, baselines)
    if new is None or old is None or new is candidate or old is base or new.label != old.label:
        return None
    return pair(old, new)


def _missing(base: LoadedResult, gate: Gate) -> Judgement:
    reason = f"{base.file} has this label and the new results lack it; name single files as --baseline to check fewer"
    finding = Finding(gate, "paired_runs", "not comparable", reason, before=len(base.runs.keys), now=0)
    return Judgement(base.label, None, base.file, base.head, (finding,))


def _notes(case: _Case, gates: Sequence[Gate], limits: Limits) -> Iterator[str]:
    """What a reader should know in addition to the verdicts."""
    old, new = case.pair.baseline.head, case.pair.candidate.head
    if old.backend.name != new.backend.name:
        yield f"the label is {new.backend.name} now and was {old.backend.name}"
    was, options = old.backend.options, new.backend.options
    for name in sorted(was.keys() | options.keys()):
        if was.get(name) != options.get(name):
            yield f"option {name} is {options.get(name)} now and was {was.get(name)}"
    before, chosen = old.backend.chosen, new.backend.chosen
    for name in sorted(before.keys() & chosen.keys()):
        if before[name] != chosen[name]:
            yield f"it chose {name} {chosen[name]} for itself, and {before[name]} before; set what it is to use with -o"
    drafters = [head.drafter and (head.drafter.id, head.drafter.sha256) for head in (old, new)]
    if drafters[0] != drafters[1]:
        yield "it has another drafter than the baseline"
    if new.backend.lossy and not old.backend.lossy:
        yield "it is lossy now, its output not meant to be the model's own, and was not"
    if old.divergence is not None and new.divergence is None:
        yield "its run did not compare its outputs with plain decoding's, as the baseline's did"
    told = {"contradicted", "busy_machine"} if "timing" in gates else {"contradicted"}
    for side, words in ((case.pair.candidate, ""), (case.pair.baseline, "the baseline's run: ")):
        for flag in (each for each in side.flags if each.name in told):
            yield f"{flag.name}: {words}{flag.reason}. {flag.remedy}"
    if "timing" not in gates:
        return
    if case.peers is None:
        yield "speed is judged of the new results of this label together, with the newest"
    elif case.peers:
        yield f"{len(case.peers) + 1} new results; their speeds count together"
    if len(case.comparisons) > 1:
        yield f"the baseline has {len(case.comparisons)} results; speed is compared with all of them on this machine"
    if case.decides_alone and all(each.plain is None for each in case.comparisons):
        yield (
            "plain decoding of the same run is missing on one side or both, so tokens/s decide, where they are "
            "calibrated; measure vanilla in the same run, and name folders that hold both"
        )
    plain = case.comparisons[0].plain
    if plain is not None and plain.candidate.is_served and plain.candidate.drafts is None:
        yield f"{plain.candidate.label} reports nothing of drafts, and is taken for plain decoding"
    if case.peers is not None and same_machine(old, new):
        yield from _threshold_notes(case, limits)


def _threshold_notes(case: _Case, limits: Limits) -> Iterator[str]:
    """Where the slowdown that is allowed was neither chosen nor calibrated, or calibrated to be so wide that it hides
    most slowdowns."""
    metric = SPEED if all(each.plain is None for each in case.comparisons) else SPEEDUP
    decides = metric == SPEEDUP or case.decides_alone
    if not decides or limits.max_slowdown is not None:
        return
    if (found := limits.calibrated(case.pair.candidate, metric)) is not None:
        if found.max_slowdown > WIDE:
            yield (
                f"calibration.json takes a slowdown of one run by up to {found.max_slowdown:.0%} for noise, which "
                "hides most; calibrate again on an idle machine"
            )
        return
    calibration, fingerprint = limits.calibration, case.pair.candidate.head.environment.get("fingerprint")
    if calibration is None:
        why = "there is no calibration.json next to the baseline"
    elif calibration.fingerprint != fingerprint:
        why = "calibration.json is of another machine and was not used"
    else:
        why = "calibration.json holds nothing for a result like this one"
    yield f"a slowdown of {MAX_SLOWDOWN:.0%} is allowed by default, as {why}; --calibrate finds what is noise here"
