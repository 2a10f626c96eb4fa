"""Results in, tables of rows out: what may be compared, against which baseline, and what casts doubt on it.

One table for each (suite, model, dtype, decoding, environment), the baseline taken within it. `pairing.py` says which
runs pair, `render/` how tables look.
"""

from __future__ import annotations

import os
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from spdbench.errors import InputError, NotComparableError, did_you_mean
from spdbench.judge.comparison.context import length_of
from spdbench.judge.comparison.pairing import Outputs, Pair, differences, machine, pair, workload
from spdbench.judge.loaded import LoadedResult, read_results, real_path
from spdbench.judge.metrics.dialects import metric_name
from spdbench.judge.metrics.flags import (
    disqualifies,
    diverged,
    few_prompts,
    interval_is_noisy,
    make_flag,
    noisy,
)
from spdbench.judge.metrics.goodput import goodput
from spdbench.judge.metrics.goodput import note as goodput_note
from spdbench.judge.results.schema import Flag, Result


@dataclass(frozen=True)
class Row:
    """One label of a table, over all its prompts or one `category` of them.

    `label` is unique in the table. `metrics` has docs/metrics.md's names, `speedup` among them. `outputs` is None where
    ids are not compared: no baseline, sampling, forced verdicts. `result` and `pairing`, its runs paired with the
    baseline's, are what the row was made from, for callers that show single runs.
    """

    label: str
    file: str
    category: str | None
    head: Result
    metrics: Mapping[str, Any]
    outputs: Outputs | None
    flags: tuple[Flag, ...]
    is_baseline: bool
    result: LoadedResult
    pairing: Pair | None
    best: bool = False

    @property
    def disqualified(self) -> bool:
        return disqualifies(self.flags)

    @property
    def difference_shown(self) -> bool | None:
        """False if the interval of the speed-up holds 1.0; None without an interval."""
        interval = self.metrics["speedup_ci"]
        return None if interval is None else not interval[0] <= 1.0 <= interval[1]


@dataclass(frozen=True)
class Table:
    """Results that may be compared. `head` is one of theirs, for the title; `baseline` is its label here, if any.

    `dialects` are those in which acceptance lengths were asked for: each row's metrics hold them. `decode` turns ids
    of the model into text, for callers that show tokens; None where its tokenizer is not at hand.
    """

    head: Result
    baseline: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    dialects: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] | None = None


def compare(
    results: Sequence[LoadedResult],
    baseline: str | LoadedResult | None = None,
    *,
    by_category: bool = False,
    dialects: Sequence[str] = (),
    limits: Mapping[str, float] | None = None,
) -> list[Table]:
    """One table for each group of `results` that may be compared.

    `baseline` is a label, looked up in each group, or a result. By default it is the first `-b` of the run that a group
    comes from, else (several runs with different ones, older files) the group's first autoregressive result.
    A result of another machine is used too, and every row compared with it is flagged `hardware_mismatch`.
    `dialects` are names of `dialects.DIALECTS`, `limits` those of `goodput.py`, for the metric `goodput`.

    Raises:
        NotComparableError: `baseline` is a result that did other work than every other result.
    """
    if isinstance(baseline, LoadedResult):
        _require_other_results(baseline, results)
    groups: dict[str, list[LoadedResult]] = {}
    for result in results:
        groups.setdefault(workload(result.head) + machine(result.head), []).append(result)
    shown = _without_shown_baseline(list(groups.values()), baseline)
    asked = tuple(dialects), limits or {}
    return [_table(group, _choose(group, baseline), *asked, by_category=by_category) for group in shown]


def _without_shown_baseline(
    groups: list[list[LoadedResult]], baseline: str | LoadedResult | None
) -> list[list[LoadedResult]]:
    """`groups` without the one that is a foreign baseline alone, if it is shown in the tables of others."""
    kept = [group for group in groups if group != [baseline]]
    shown = isinstance(baseline, LoadedResult) and any(_has_same_work(baseline, group) for group in kept)
    return kept if shown else groups


def _require_other_results(baseline: LoadedResult, results: Sequence[LoadedResult]) -> None:
    """Raises if `baseline` did other work than all others; the message says what differs from the one most like it."""
    others = [result for result in results if result is not baseline]
    if not others or _has_same_work(baseline, others):
        return
    like = min(others, key=lambda result: len(differences(baseline.head, result.head)))
    count = "" if len(others) == 1 else f", and no less from the other {len(others) - 1}"
    raise NotComparableError(
        f"--baseline {baseline.file}: differs from {like.file} in {'; '.join(differences(baseline.head, like.head))}"
        f"{count}. Name a result of the same suite, model, dtype and decoding."
    )


def find_baseline(word: str, results: Sequence[LoadedResult]) -> str | LoadedResult:
    """What `--baseline WORD` means: a label that some result has, else a result file, read if it is none of them.

    Raises:
        InputError: it is neither.
    """
    labels = {result.label for result in results}
    if word in labels:
        return word
    path = Path(word)
    if not os.path.isfile(path):
        raise InputError(
            f"--baseline {word}: no result has that label and no file that name{did_you_mean(word, labels)}"
        )
    for result in results:
        if real_path(Path(result.file)) == real_path(path):
            return result
    return read_results([path])[0]


def _has_same_work(baseline: LoadedResult, others: Sequence[LoadedResult]) -> bool:
    return any(workload(baseline.head) == workload(result.head) for result in others)


def _choose(group: Sequence[LoadedResult], baseline: str | LoadedResult | None) -> LoadedResult | None:
    """The group's baseline, if it has one."""
    if isinstance(baseline, LoadedResult):
        return baseline if _has_same_work(baseline, group) else None
    if baseline is None:
        recorded = {result.head.baseline for result in group}
        if len(recorded) == 1 and (of_run := [result for result in group if result.label in recorded]):
            return of_run[0]
        plain = (result for result in group if result.head.backend.kind == "autoregressive")
        return next(plain, _plain_server(group))
    return next((result for result in group if result.label == baseline), None)


def _plain_server(group: Sequence[LoadedResult]) -> LoadedResult | None:
    """Of servers, some of which draft, the first that does not, or else the first of which that is unknown."""
    servers = [result for result in group if result.is_served]
    if not any(result.drafts for result in servers):
        return None
    return min((each for each in servers if not each.drafts), key=lambda each: each.drafts is None, default=None)


def _table(
    group: list[LoadedResult],
    baseline: LoadedResult | None,
    dialects: tuple[str, ...],
    limits: Mapping[str, float],
    *,
    by_category: bool,
) -> Table:
    ordered = _in_order_of_run(group)
    members = ordered if baseline is None else [baseline, *(result for result in ordered if result is not baseline)]
    names = _names(members)
    rows: list[Row] = []
    notes = [*([goodput_note(limits)] if limits else ()), *_naming_notes(members, names, baseline)]
    pairings: list[Pair | None] = []
    for result, name in zip(members, names, strict=True):
        pairing = None if baseline is None or result is baseline else pair(baseline, result)
        pairings.append(pairing)
        notes += _run_notes(result, name, pairing)
    for category in _categories(members) if by_category else [None]:
        found = [
            _row(result, name, category, pairing, dialects, limits, is_baseline=result is baseline)
            for result, name, pairing in zip(members, names, pairings, strict=True)
            if category is None or category in result.by_category
        ]
        rows += _mark_best(_without_other_model(found) if _share_another_model(members) else found)
    label = None if baseline is None else names[members.index(baseline)]
    return Table(group[0].head, label, tuple(rows), tuple(notes), dialects)


def _in_order_of_run(group: Sequence[LoadedResult]) -> list[LoadedResult]:
    """Results of one run in the order of its `-b`, so that its own table and all later ones have one order; those of
    several runs as they are."""
    orders = {tuple(result.head.labels) for result in group}
    labels = orders.pop() if len(orders) == 1 else ()
    return sorted(group, key=lambda result: labels.index(result.label) if result.label in labels else len(labels))


def _share_another_model(members: Sequence[LoadedResult]) -> bool:
    """True for several results that all run the same model elsewhere, such as a server with and without drafts."""
    models = {(each.head.backend.name, each.head.backend.other_model) for each in members}
    return len(members) > 1 and len(models) == 1 and members[0].head.backend.other_model is not None


def _without_other_model(rows: Sequence[Row]) -> list[Row]:
    """`rows` without the flag for a model that is not vanilla's: they compare with each other alone."""
    return [replace(row, flags=tuple(flag for flag in row.flags if flag.name != "other_model")) for row in rows]


def _categories(members: Sequence[LoadedResult]) -> list[str | None]:
    """Categories in the order of the files, or contexts from short to long; then None for all prompts."""
    names = dict.fromkeys(name for result in members for name in result.by_category)
    return [*sorted(names, key=length_of), None]


def _names(members: Sequence[LoadedResult]) -> list[str]:
    """Labels, numbered where several results share one."""
    shared, seen = Counter(result.label for result in members), Counter[str]()
    names = []
    for result in members:
        seen[result.label] += 1
        names.append(f"{result.label} #{seen[result.label]}" if shared[result.label] > 1 else result.label)
    return names


def _naming_notes(
    members: Sequence[LoadedResult], names: Sequence[str], baseline: LoadedResult | None
) -> Iterator[str]:
    for result, name in zip(members, names, strict=True):
        if name != result.label:
            yield f"{name} is {result.file}."
    if baseline is None:
        yield "No baseline in this table, so speed-ups stay blank; name one with --baseline LABEL or FILE."


def _run_notes(result: LoadedResult, name: str, pairing: Pair | None) -> Iterator[str]:
    overall, num_asked = result.metrics, result.head.suite.num_prompts
    if result.num_begun < num_asked:
        begun = f"{result.num_begun} of {num_asked} conversations"
        yield f"{name}: {begun}; the run was interrupted, --resume finishes it."
    if overall["num_failed"]:
        yield f"{name}: {overall['num_failed']} of {overall['num_runs'] + overall['num_failed']} runs failed."
    if overall["num_set_aside"]:
        yield (
            f"{name}: what the machine disturbed was measured again (--remeasure): {overall['num_set_aside']} "
            "measurements do not count; of each request the least disturbed one does."
        )
    if pairing is not None and pairing.num_dropped:
        paired = f"{len(pairing.keys)} runs pair with the baseline's"
        yield f"{name}: {paired}; {pairing.num_dropped} without a partner are omitted from the speed-up."


def _row(
    result: LoadedResult,
    name: str,
    category: str | None,
    pairing: Pair | None,
    dialects: Sequence[str],
    limits: Mapping[str, float],
    *,
    is_baseline: bool,
) -> Row:
    own = result if category is None else result.part(category)
    measured = own.metrics
    part = pairing if pairing is None or category is None else pairing.part(category)
    needed = part.break_even() if part else (None, None)
    value, interval = part.speedup() if part else (1.0 if is_baseline else None, None)
    devices = None if result.known_devices is None else result.head.backend.num_devices
    compared = {
        "speedup": value,
        "speedup_ci": interval and list(interval),
        "speedup_spread": part.spread() if part and interval else None,
        "speedup_per_device": value / devices if value is not None and devices else None,
        "speedup_per_device_ci": [bound / devices for bound in interval] if interval and devices else None,
        "break_even_length": needed[0],
        "break_even_length_ci": needed[1] and list(needed[1]),
        "num_paired": len(part.keys) if part else measured["num_runs"] if is_baseline else None,
        "num_paired_prompts": part.num_prompts if part else measured["num_prompts"] if is_baseline else None,
        "num_dropped": pairing.num_dropped if pairing and category is None else None,
    }
    compared |= {metric: measured[metric] for metric in map(metric_name, dialects)}
    compared |= {"goodput": goodput(own.runs, limits)} if limits else {}
    flags = [*result.flags, *(_pair_flags(pairing) if pairing else ())]
    if part and part.keys and not _are_few(flags):
        flags += few_prompts(part.num_timed_prompts, "with a speed to compare with the baseline's")
    if value and interval and interval_is_noisy(value, interval) and all(flag.name != "noisy" for flag in flags):
        flags.append(noisy("the speed-up", value, interval))
    metrics = ChainMap(compared, cast("dict[str, Any]", measured))  # a copy would work out every metric
    outputs = part.outputs() if part and _ids_compare(part) else None
    return Row(name, result.file, category, result.head, metrics, outputs, tuple(flags), is_baseline, own, part)


def _ids_compare(pairing: Pair) -> bool:
    """True if equal outputs may be expected: greedy, on the same machine, with verdicts that are the model's own. Texts
    are compared where neither of the two knows ids."""
    head = pairing.candidate.head
    forced = head.drafter is not None and head.drafter.id.startswith("forced")
    return (
        head.decoding.temperature == 0
        and pairing.same_machine
        and not forced
        and (pairing.knows_ids or pairing.knows_texts)
    )


def _pair_flags(pairing: Pair) -> Iterator[Flag]:
    """Flags that need two results."""
    base, new = pairing.heads
    if not pairing.same_machine:
        yield make_flag(
            "hardware_mismatch", "the baseline was measured on another machine, other devices or other software"
        )
    elif (
        pairing.baseline.is_served
        and pairing.candidate.is_served
        and (base.environment != new.environment or "imported_from" in base.environment)
    ):  # a run measures its machine once, so that the environments of its results are equal
        yield make_flag(
            "apart", "it did not take turns with the baseline, so that what changed in between counts as well"
        )
    if len({base.model.template_sha256, new.model.template_sha256} - {None}) > 1:
        yield make_flag("template_mismatch", "its chat template is not the baseline's")
    elif pairing.first_prompts_differ:
        yield make_flag("prompt_mismatch", "its prompts are not the baseline's")
    own = not new.backend.lossy and new.backend.other_model is None
    against_vanilla = base.backend.kind == "autoregressive" and own and new.divergence is None
    if against_vanilla and _ids_compare(pairing):
        outputs = pairing.outputs()
        if outputs.num_identical < outputs.num_compared:
            yield diverged(outputs.num_compared - outputs.num_identical, outputs.num_compared, classified=False)


def _are_few(flags: Sequence[Flag]) -> bool:
    return any(flag.name == "few_prompts" for flag in flags)


def _mark_best(rows: Sequence[Row]) -> list[Row]:
    """Marks the largest speed-up whose interval lies above 1, unless it is disqualified or of few prompts. Often there
    is none."""
    fit = [row for row in rows if row.difference_shown and not (row.disqualified or _are_few(row.flags))]
    best = max(fit, key=lambda row: row.metrics["speedup"], default=None)
    if best is None or best.metrics["speedup"] <= 1:
        return list(rows)
    return [replace(row, best=row is best) for row in rows]
