"""The sentences around a comparison: what it concludes, what was omitted, each flag with its remedy; and, on request,
what the columns mean. For terminal, Markdown, LaTeX."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import ceil

from spdbench.console import counted
from spdbench.judge.comparison.compare import Table
from spdbench.judge.conclusion import EFFECT, Conclusion, conclusions
from spdbench.judge.metrics.definitions import CAUSES
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.projection.project import OwnDevices
from spdbench.render.columns import device_name, harmless, share

SHOWS_NONE = "no difference shown"
"""Of an interval that holds 1."""
MAX_LABELS = 6
"""The labels that a flag's line names."""
METHODS = {
    "spd": "speculative pipeline decoding: the model's layers in n stages that work on n tokens at once",
    "ppsd": "PPSD, a pipeline whose first stage's output drafts",
}
DOUBT_WORDS = {
    "apart": "measured apart",
    "busy_machine": "busy machine",
    "degenerate": "looping answers",
    "few_prompts": "few prompts",
    "no_template": "no chat template",
    "slow_baseline": "slow baseline",
}
"""A flag in a verdict, where its name is not plain words."""
DOUBTS_OF_SLOWER = frozenset({"busy_machine"})
"""What also makes a verdict provisional that a label does not pay: a method of several processes suffers more from
other programs than plain decoding."""
COUNT_NOTE = "prompts are conversations; answers are their turns and repeats; 'same outputs' counts answers."
INTERVAL_NOTE = (
    "speed-up: decode tokens/s over {baseline}'s on the same prompts and repeats, with its 95 % interval "
    "(paired bootstrap over prompts); one that holds 1.0 shows no difference."
)
POWER_NOTE = (
    "prompts needed to detect a 5 % speed-up: with the spread measured here, as many prompts show a speed-up of 1.05 "
    "four times in five."
)
OWN_DEVICES_NOTE = (
    "with a device for each stage and the drafter: what `spdbench project` simulates from these results, each "
    "device as fast as {baseline}'s; 'at most' where no time of drafts or messages was recorded. Its interval is over "
    "prompts alone."
)
IDEAL_NOTE = (
    "ideal: the speed-up if drafting, messages and waiting cost nothing and every cycle took as long as the heaviest "
    "stage; without a pipeline it is tau."
)
ENERGY_NOTE = (
    "J/tok: what {counters} counted from before each request to after it, for each new token; what idled or ran at "
    "the same time on these devices is included."
)
SCORE_NOTE = (
    "score: the mean over the answers that have one ({counts}), with its 95 % interval; not part of any speed-up."
)
DIALECT_NOTE = (
    "N: all new tokens, prefill's among them; decode tokens: N - 1; micro: totals over totals; macro: the mean over "
    "requests."
)
BUBBLE_NOTE = "bubble: the share of decode time in which the lanes that hold the target computed nothing of it."


def verdicts(table: Table) -> list[str]:
    """A sentence for each label."""
    return [sentence(each) for each in conclusions(table)]


def sentence(found: Conclusion) -> str:
    """`eagle: 1.24x [1.13, 1.37], pays`."""
    parts = [_answer(found) + _provisional(found)]
    if found.own_devices is not None and found.outcome == "slower":
        parts[0] += f": {found.own_devices.num_stages} stages share {num_devices(found.num_devices)}"
    if found.own_devices is not None and found.outcome != "pays":
        parts.append(_with_own_devices(found.own_devices))
    if found.speedup_per_device is not None:
        parts.append(f"{found.speedup_per_device:.2f}x for each of {found.num_devices} devices")
    if found.disqualified_by and found.outcome != "baseline":
        parts.append(f"disqualified by {', '.join(found.disqualified_by)}")
    return harmless(f"{found.label}: {'; '.join(parts)}")


def _answer(found: Conclusion) -> str:
    rate = "no tokens" if found.tokens_per_s is None else f"{found.tokens_per_s:.1f} tok/s"
    if found.outcome == "baseline":
        of_all = found.devices_of_all
        return f"{rate}, the baseline" + ("" if of_all is None else f"; every method ran on {num_devices(of_all)}")
    if found.outcome == "no baseline":
        return f"{rate}, and no baseline to compare with"
    if found.outcome == "no pair":
        return f"{rate}, and no answer to a prompt that the baseline answered"
    if found.interval is None:
        return f"{found.speedup:.2f}x over one prompt, which shows no interval"
    measured = f"{found.speedup:.2f}x [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
    if found.outcome == SHOWS_NONE:
        return _no_difference(found, measured)
    if found.own_devices is not None and found.outcome == "slower":
        return f"{measured}, does not pay here"
    return measured if found.disqualified_by else f"{measured}, {'pays' if found.outcome == 'pays' else 'does not pay'}"


def _provisional(found: Conclusion) -> str:
    """` (provisional: busy machine)`. A verdict against a label depends on few of the doubts."""
    if found.disqualified_by or found.outcome not in ("pays", "slower"):
        return ""
    return provisional(found.doubts if found.outcome == "pays" else set(found.doubts) & DOUBTS_OF_SLOWER)


def provisional(doubts: Collection[str]) -> str:
    """` (provisional: busy machine)`; nothing without doubts."""
    return f" (provisional: {', '.join(DOUBT_WORDS.get(name, name) for name in doubts)})" if doubts else ""


def _with_own_devices(own: OwnDevices) -> str:
    """`with a device for each stage and the drafter: about 1.05x [1.02, 1.08] (estimate), would pay`."""
    at = "at most" if own.is_bound else "about"
    estimate = f"with a device for each stage and the drafter: {at} {own.speedup:.2f}x"
    if own.interval is None:
        return f"{estimate} (estimate over one prompt)"
    low, high = own.interval
    verdict = ("could pay" if own.is_bound else "would pay") if low > 1 else "still no gain" if high < 1 else SHOWS_NONE
    return f"{estimate} [{low:.2f}, {high:.2f}] (estimate), {verdict}"


def num_devices(number: int) -> str:
    """`one device`, `2 devices`."""
    return "one device" if number == 1 else f"{number} devices"


def _no_difference(found: Conclusion, measured: str) -> str:
    """With how many prompts a difference of `EFFECT` would show, or that there were enough."""
    needed = found.num_prompts_to_show
    effect = f"detect a {100 * EFFECT:.0f} % speed-up"
    if needed is None:
        return f"{measured}, {SHOWS_NONE} at {found.num_prompts} prompts"
    if needed <= found.num_prompts:
        return f"{measured}, {SHOWS_NONE}; {found.num_prompts} prompts are enough to {effect}"
    return f"{measured}, {SHOWS_NONE}; about {_rounded(needed)} prompts needed to {effect}"


def _rounded(number: int) -> int:
    """`number` rounded up to two digits, of which the second is 0 or 5: it is an estimate."""
    unit = 5 * 10 ** (len(str(number)) - 2)
    return number if number < 10 else ceil(number / unit) * unit


def notes(table: Table) -> list[str]:
    """The lines below a table: the dialect asked for, what was omitted, what differs, each flag with its remedy."""
    found = [*_dialect_notes(table), *table.notes, *_divergence_notes(table), *_flag_lines(table)]
    return list(map(harmless, found))


def details(table: Table) -> list[str]:
    """How to read the columns, what bubbles are made of, and why each flag was raised."""
    found = []
    compared = [each for each in conclusions(table) if each.interval is not None]
    found += methods(table)
    if any(row.metrics["num_runs"] > row.metrics["num_prompts"] for row in table.rows):
        found.append(COUNT_NOTE)
    if compared:
        found.append(INTERVAL_NOTE.format(baseline=table.baseline))
    if any(each.num_prompts_to_show for each in compared):
        found.append(POWER_NOTE)
    if any(each.own_devices for each in compared):
        found.append(OWN_DEVICES_NOTE.format(baseline=table.baseline))
    if len(table.dialects) < 2 and any(row.head.backend.kind == "pipeline" for row in table.rows):
        found.append(IDEAL_NOTE)
    if any(row.metrics["energy_j_per_token"] is not None for row in table.rows):
        counters = device_name(table.head.environment.get("energy")) or "the machine"
        found.append(ENERGY_NOTE.format(counters=counters))
    found += [
        *_score_notes(table),
        *_bubble_notes(table),
        *_cycle_notes(table),
        *_fill_notes(table),
        *_flag_reasons(table),
    ]
    return list(map(harmless, found))


def methods(table: Table) -> list[str]:
    """What the names of methods stand for, where they do not say it."""
    names = dict.fromkeys(row.head.backend.name for row in table.rows)
    return [f"{name}: {METHODS[name]}." for name in names if name in METHODS]


def _score_notes(table: Table) -> Iterator[str]:
    """How many answers the scores are means of."""
    rows = [row for row in table.rows if row.category is None and row.metrics["score"] is not None]
    counts = {row.label: f"{row.metrics['num_scored']} of {row.metrics['num_runs']}" for row in rows}
    if counts:
        distinct = set(counts.values())
        words = "; ".join(f"{label}: {count}" for label, count in counts.items())
        yield SCORE_NOTE.format(counts=distinct.pop() if len(distinct) == 1 else words)


def _dialect_notes(table: Table) -> Iterator[str]:
    """In which dialects acceptance lengths are given, and by which rules."""
    if len(table.dialects) == 1:
        [name] = table.dialects
        yield f"tau as {name} prints it: {DIALECTS[name].rule}."
    elif table.dialects:
        names: dict[str, list[str]] = {}
        for name in table.dialects:
            names.setdefault(DIALECTS[name].rule, []).append(name)
        rules = "; ".join(f"{', '.join(who)}: {rule}" for rule, who in names.items())
        yield f"acceptance length in each dialect. {rules}."
    if table.dialects:
        yield DIALECT_NOTE


def _bubble_notes(table: Table) -> Iterator[str]:
    """What each row's bubble is made of, largest first, and what work its lanes wasted."""
    parts = []
    for row in table.rows:
        metrics = row.metrics
        if row.category is None and metrics["bubble_ratio"] is not None:
            causes = sorted((name for name in CAUSES if metrics[name]), key=lambda name: -round(metrics[name], 3))
            words = [f"{name} {share(metrics[name])}" for name in causes]
            wasted = [f"and wasted {share(metrics['wasted'])}"] * (metrics["wasted"] > 0)
            parts.append(f"{row.label}: {', '.join([*words, *wasted]) or 'none'}")
    if parts:
        yield f"{BUBBLE_NOTE} {'; '.join(parts)}."


def _cycle_notes(table: Table) -> Iterator[str]:
    """What cycles with a full pipe were spent on."""
    for row in table.rows:
        efficiency, besides_s = row.metrics["cycle_efficiency"], row.metrics["control_s_per_cycle"]
        if row.category is not None or efficiency is None:
            continue
        found = "stages ran ahead of the verdict, so that nothing was spent besides the slowest stage's work"
        if besides_s > 0:
            took = f"the slowest stage's work took {share(efficiency)} of the time"
            found = f"{took}, and {besides_s * 1e3:.2f} ms a cycle were spent besides"
        yield f"{row.label}, cycles with all stages at work: {found}."


def _fill_notes(table: Table) -> Iterator[str]:
    """Cycles by how many stages were at work, and whether the drafter holds the pipeline up."""
    for row in table.rows:
        cycles, seconds, slack_s = (
            row.metrics[name] for name in ("cycles_by_fill", "cycle_s_by_fill", "draft_slack_s")
        )
        if row.category is not None or not cycles or not sum(cycles):
            continue
        parts = [
            f"{counted(stages, 'stage')} {share(num / sum(cycles))} ({wall_s / num * 1e3:.2f} ms each)"
            for stages, (num, wall_s) in enumerate(zip(cycles, seconds, strict=True))
            if num
        ]
        found = f"{row.label}, cycles by stages at work: {', '.join(parts)}"
        if slack_s is not None:
            than = "less" if slack_s >= 0 else "more"
            found += f"; with all of them, drafting took {abs(slack_s) * 1e3:.2f} ms {than} than the slowest stage"
        yield f"{found}."


def _divergence_notes(table: Table) -> Iterator[str]:
    """What the first differences were, where the file says it."""
    for label, row in {row.label: row for row in table.rows}.items():
        classes = row.head.divergence.counts if row.head.divergence else {}
        if sum(classes.values()) > classes.get("identical", 0):
            words = [f"{count} {_kind(name, count)}" for name, count in classes.items() if count]
            whose = "vanilla's" if row.head.backend.other_model is None else "the first server's"
            yield f"{label}, outputs against {whose}: {', '.join(words)}."


def _kind(name: str, count: int) -> str:
    """`near tie`, of the class `near_ties`."""
    return (name.removesuffix("s") if count == 1 else name).replace("_", " ")


def _flag_lines(table: Table) -> Iterator[str]:
    """`noisy (spd, eagle): add prompts.` for each flag, with the remedy of the first label that raised it."""
    raised: dict[str, dict[str, str]] = {}
    rows = [row for row in table.rows if row.category is None]
    for row in rows:
        for flag in row.flags:
            raised.setdefault(flag.name, {}).setdefault(row.label, flag.remedy)
    for name, remedies in raised.items():
        who, remedy = list(remedies), next(iter(remedies.values()))
        names, more = ", ".join(who[:MAX_LABELS]), len(who) - MAX_LABELS
        words = "all" if len(who) == len(rows) > 1 else f"{names} and {more} more" if more > 0 else names
        yield f"{name} ({words}): {remedy[:1].lower()}{remedy[1:]}."


def _flag_reasons(table: Table) -> Iterator[str]:
    labels: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for flag in row.flags:
            named = labels.setdefault(flag.name, {}).setdefault(flag.reason, [])
            if row.category is None:
                named.append(row.label)
    for name, by_reason in labels.items():
        reasons = "; ".join(f"{', '.join(who)}: {reason}" for reason, who in by_reason.items() if who)
        if reasons:
            yield f"{name} ({'disqualifies' if name in DISQUALIFYING else 'warning'}): {reasons}."
