"""Results in, tables of rows out: what may stand together, against which baseline, and what casts doubt on it.

One table for each (suite, model, dtype, decoding, environment), the baseline taken within it. How tables look is
`render/`'s business; which runs pair is `pairing.py`'s.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from spdbench.errors import InputError, NotComparableError, did_you_mean
from spdbench.judge.comparison.pairing import Entry, Outputs, Pairing, Speedup, pair, read_entries
from spdbench.judge.comparison.workload import differences, machine, same_machine, workload
from spdbench.judge.metrics.dialects import metric_name
from spdbench.judge.metrics.flags import disqualifies, diverged, interval_is_noisy, noisy
from spdbench.judge.results.schema import Flag, Result


@dataclass(frozen=True)
class Row:
    """One label of a table, over all its prompts or one `category` of them.

    `label` is unique in the table. `metrics` has METRICS.md's names, `speedup` among them. `outputs` is None where
    ids are not compared: no baseline, sampling, forced verdicts.
    """

    label: str
    file: str
    category: str | None
    head: Result
    metrics: Mapping[str, Any]
    speedup: Speedup | None
    outputs: Outputs | None
    flags: tuple[Flag, ...]
    is_baseline: bool
    best: bool = False

    @property
    def disqualified(self) -> bool:
        return disqualifies(self.flags)


@dataclass(frozen=True)
class Table:
    """Results that may stand together. `head` is one of theirs, for the title; `baseline` is its label here, if any.

    `dialects` are those in which acceptance lengths were asked for: each row's metrics hold them.
    """

    head: Result
    baseline: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    dialects: tuple[str, ...] = ()


def compare(
    entries: Sequence[Entry],
    baseline: str | Entry | None = None,
    *,
    by_category: bool = False,
    dialects: Sequence[str] = (),
) -> list[Table]:
    """One table for each group of `entries` that may stand together.

    `baseline` is a label, looked up in each group, or an entry; by default the first autoregressive result of a group.
    An entry measured on another machine still serves, and every row judged by it is flagged `hardware_mismatch`.
    `dialects` are names of `dialects.DIALECTS`.

    Raises:
        NotComparableError: `baseline` is an entry that did other work than every other entry.
    """
    if isinstance(baseline, Entry):
        _require_company(baseline, entries)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(workload(entry.head) + machine(entry.head), []).append(entry)
    tables = [
        _table(group, _choose(group, baseline), by_category) for group in _with_company(groups.values(), baseline)
    ]
    return [_in_dialects(table, tuple(dialects)) for table in tables] if dialects else tables


def _in_dialects(table: Table, dialects: tuple[str, ...]) -> Table:
    """The same table with acceptance lengths in `dialects` among its rows' metrics."""
    names = [metric_name(dialect) for dialect in dialects]
    rows = []
    for row in table.rows:
        told = {name: row.metrics[name] for name in names}
        rows.append(replace(row, metrics=ChainMap(told, cast("dict[str, Any]", row.metrics))))
    return replace(table, rows=tuple(rows), dialects=dialects)


def _with_company(groups: Iterable[list[Entry]], baseline: str | Entry | None) -> list[list[Entry]]:
    """`groups` without the one that is a foreign baseline alone, if it is shown in the tables of others."""
    kept = [group for group in groups if group != [baseline]]
    shown = isinstance(baseline, Entry) and any(_serves(baseline, group) for group in kept)
    return kept if shown else list(groups)


def _require_company(baseline: Entry, entries: Sequence[Entry]) -> None:
    """Raises if `baseline` can serve none of the others; the message tells what differs from the one most like it."""
    others = [entry for entry in entries if entry is not baseline]
    if not others or _serves(baseline, others):
        return
    like = min(others, key=lambda entry: len(differences(baseline.head, entry.head)))
    count = "" if len(others) == 1 else f", and no less from the other {len(others) - 1}"
    raise NotComparableError(
        f"--baseline {baseline.file}: differs from {like.file} in {'; '.join(differences(baseline.head, like.head))}"
        f"{count}. Name a result of the same suite, model, dtype and decoding."
    )


def find_baseline(word: str, entries: Sequence[Entry]) -> str | Entry:
    """What `--baseline WORD` means: a label that some entry has, else a result file, read if it is not an entry yet.

    Raises:
        InputError: it is neither.
    """
    labels = {entry.label for entry in entries}
    if word in labels:
        return word
    path = Path(word)
    if not path.is_file():
        raise InputError(
            f"--baseline {word}: no result has that label and no file that name{did_you_mean(word, labels)}"
        )
    for entry in entries:
        if Path(entry.file).resolve() == path.resolve():
            return entry
    return read_entries([path])[0]


def _serves(baseline: Entry, others: Sequence[Entry]) -> bool:
    return any(workload(baseline.head) == workload(entry.head) for entry in others)


def _choose(group: Sequence[Entry], baseline: str | Entry | None) -> Entry | None:
    """The group's baseline, if it has one."""
    if isinstance(baseline, Entry):
        return baseline if _serves(baseline, group) else None
    if baseline is None:
        return next((entry for entry in group if entry.head.backend.kind == "autoregressive"), None)
    return next((entry for entry in group if entry.label == baseline), None)


def _table(group: list[Entry], baseline: Entry | None, by_category: bool) -> Table:
    members = group if baseline is None or baseline in group else [baseline, *group]
    names = _names(members)
    rows: list[Row] = []
    notes = list(_naming_notes(members, names, baseline))
    pairings: list[Pairing | None] = []
    for entry, name in zip(members, names, strict=True):
        pairing = None if baseline is None or entry is baseline else pair(baseline, entry)
        pairings.append(pairing)
        notes += _run_notes(entry, name, pairing)
    for category in _categories(members) if by_category else [None]:
        found = [
            _row(entry, name, category, pairing, is_baseline=entry is baseline)
            for entry, name, pairing in zip(members, names, pairings, strict=True)
            if category is None or category in entry.head.summary.by_category
        ]
        rows += _mark_best(found)
    label = None if baseline is None else names[members.index(baseline)]
    return Table(group[0].head, label, tuple(rows), tuple(notes))


def _categories(members: Sequence[Entry]) -> list[str | None]:
    """Categories in the order of the files, then None for all prompts."""
    return [*dict.fromkeys(name for entry in members for name in entry.head.summary.by_category), None]


def _names(members: Sequence[Entry]) -> list[str]:
    """Labels, numbered where several results share one."""
    shared, seen = Counter(entry.label for entry in members), Counter[str]()
    names = []
    for entry in members:
        seen[entry.label] += 1
        names.append(f"{entry.label} #{seen[entry.label]}" if shared[entry.label] > 1 else entry.label)
    return names


def _naming_notes(members: Sequence[Entry], names: Sequence[str], baseline: Entry | None) -> Iterator[str]:
    for entry, name in zip(members, names, strict=True):
        if name != entry.label:
            yield f"{name} is {entry.file}."
    if baseline is None:
        yield "No baseline in this table, so speed-ups stay blank; name one with --baseline LABEL or FILE."


def _run_notes(entry: Entry, name: str, pairing: Pairing | None) -> Iterator[str]:
    overall, num_asked = entry.head.summary.overall, entry.head.suite.num_prompts
    if entry.num_begun < num_asked:
        begun = f"{entry.num_begun} of {num_asked} conversations"
        yield f"{name}: {begun}; the run was interrupted, --resume finishes it."
    if overall["num_failed"]:
        yield f"{name}: {overall['num_failed']} of {overall['num_runs'] + overall['num_failed']} runs failed."
    if pairing is not None and pairing.num_dropped:
        paired = f"{len(pairing.keys)} runs pair with the baseline's"
        yield f"{name}: {paired}; {pairing.num_dropped} without a partner are left out of the speed-up."


def _row(entry: Entry, name: str, category: str | None, pairing: Pairing | None, *, is_baseline: bool) -> Row:
    summary = entry.head.summary
    measured = summary.overall if category is None else summary.by_category[category]
    speedup = Speedup(1.0, None, measured["num_runs"]) if is_baseline else None
    outputs = None
    if pairing is not None:
        speedup = pairing.speedup(category)
        outputs = pairing.outputs(category) if _ids_compare(pairing) else None
    compared = _speedup_metrics(speedup, entry.head.backend.num_devices)
    if "devices" in entry.head.backend.unknown:
        compared |= dict.fromkeys(("speedup_per_device", "speedup_per_device_ci"))
    compared["num_dropped"] = pairing.num_dropped if pairing and category is None else None
    flags = [*entry.head.flags, *(_pair_flags(pairing) if pairing else ())]
    if speedup and interval_is_noisy(speedup.value, speedup.interval) and all(flag.name != "noisy" for flag in flags):
        flags.append(noisy("the speed-up", speedup.value or 0.0, speedup.interval or ()))
    metrics = ChainMap(compared, measured)  # a copy would work out every metric
    return Row(name, entry.file, category, entry.head, metrics, speedup, outputs, tuple(flags), is_baseline)


def _speedup_metrics(speedup: Speedup | None, num_devices: int) -> dict[str, Any]:
    """`speedup` and `speedup_per_device` with their intervals; None without a baseline."""
    value = speedup.value if speedup else None
    interval = speedup.interval if speedup else None
    return {
        "speedup": value,
        "speedup_ci": None if interval is None else list(interval),
        "speedup_per_device": None if value is None else value / num_devices,
        "speedup_per_device_ci": None if interval is None else [bound / num_devices for bound in interval],
        "num_paired": speedup.num_paired if speedup else None,
    }


def _same_machine(pairing: Pairing) -> bool:
    """True if both are of one machine, and of one kind of its devices as far as an engine tells them."""
    heads = [pairing.baseline.head, pairing.candidate.head]
    told = [head.backend for head in heads if "devices" not in head.backend.unknown]
    kinds = {frozenset(name.partition(":")[0] for name in backend.devices) for backend in told}
    return same_machine(*heads) and len(kinds) <= 1


def _ids_compare(pairing: Pairing) -> bool:
    """True if equal ids may be expected: greedy, on the same machine, with verdicts that are the model's own."""
    head = pairing.candidate.head
    forced = head.drafter is not None and head.drafter.id.startswith("forced")
    known = all("ids" not in entry.head.backend.unknown for entry in (pairing.baseline, pairing.candidate))
    return head.decoding.temperature == 0 and _same_machine(pairing) and not forced and known


def _pair_flags(pairing: Pairing) -> Iterator[Flag]:
    """Flags that it takes two results to see."""
    base, mine = pairing.baseline.head, pairing.candidate.head
    if not _same_machine(pairing):
        yield Flag(
            name="hardware_mismatch",
            reason="the baseline was measured on another machine, other devices or other software",
            remedy="Measure both on the same machine, best in one `spdbench run`",
        )
    templates = {base.model.template_sha256, mine.model.template_sha256} - {None}
    if len(templates) > 1:
        yield Flag(
            name="template_mismatch",
            reason="its chat template is not the baseline's",
            remedy="Use the same model files for both",
        )
    elif pairing.first_prompts_differ:
        yield Flag(
            name="prompt_mismatch",
            reason="its prompts are not the baseline's",
            remedy="Run both with the same suite, --data and --limit, best in one `spdbench run`",
        )
    own = not mine.backend.lossy and mine.backend.other_model is None
    against_vanilla = base.backend.kind == "autoregressive" and own and mine.divergence is None
    if against_vanilla and _ids_compare(pairing):
        outputs = pairing.outputs()
        if outputs.num_identical < outputs.num_compared:
            yield diverged(outputs.num_compared - outputs.num_identical, outputs.num_compared, classified=False)


def _mark_best(rows: Sequence[Row]) -> list[Row]:
    """Marks the largest speed-up whose interval lies above 1, unless disqualified. Often there is none."""
    fit = [row for row in rows if row.speedup and row.speedup.difference_shown and not row.disqualified]
    best = max(fit, key=lambda row: row.metrics["speedup"], default=None)
    if best is None or best.metrics["speedup"] <= 1:
        return list(rows)
    return [replace(row, best=row is best) for row in rows]
