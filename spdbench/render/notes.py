"""The notes below a comparison: how to read it, what was left out, each flag once. For terminal, Markdown, LaTeX."""

from __future__ import annotations

from collections.abc import Iterator

from spdbench.judge.comparison.compare import Table
from spdbench.judge.metrics.definitions import CAUSES
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.render.columns import by_category, device_name, share

INTERVAL_NOTE = (
    "speed-up: decode tokens/s over {baseline}'s on the same prompts and repeats, with its 95 % interval "
    "(paired bootstrap over prompts); one that holds 1.0 shows no difference."
)
IDEAL_NOTE = "ideal: the speed-up if drafting, messages and waiting cost nothing."
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
CYCLE_NOTE = (
    "cycles in which every stage was at work: the share of them that the slowest stage's work took, over 100 % where "
    "stages ran ahead of the verdict."
)


def notes(table: Table) -> list[str]:
    """The notes below a table."""
    found = list(_dialect_notes(table))
    if table.baseline is not None and any(not row.is_baseline for row in table.rows):
        found.append(INTERVAL_NOTE.format(baseline=table.baseline))
    if len(table.dialects) < 2 and any(row.head.backend.kind == "pipeline" for row in table.rows):
        found.append(IDEAL_NOTE)
    if any(row.metrics["energy_j_per_token"] is not None for row in table.rows):
        counters = device_name(table.head.environment.get("energy")) or "the machine"
        found.append(ENERGY_NOTE.format(counters=counters))
    found += _score_notes(table)
    best = [
        f"{row.label} ({row.category or 'all'})" if by_category(table) else row.label for row in table.rows if row.best
    ]
    if best:
        found.append(f"best: {', '.join(best)}.")
    return [*found, *_bubble_notes(table), *table.notes, *_divergence_notes(table), *_flag_notes(table)]


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
    cycles = [
        f"{row.label}: {share(row.metrics['cycle_efficiency'])}, "
        f"and {row.metrics['control_s_per_cycle'] * 1e3:.2f} ms a cycle besides"
        for row in table.rows
        if row.category is None and row.metrics["cycle_efficiency"] is not None
    ]
    if cycles:
        yield f"{CYCLE_NOTE} {'; '.join(cycles)}."


def _divergence_notes(table: Table) -> Iterator[str]:
    """What the first differences were, where the file says it."""
    for label, row in {row.label: row for row in table.rows}.items():
        classes = row.head.divergence.model_dump() if row.head.divergence else {}
        if sum(classes.values()) > classes.get("identical", 0):
            words = [f"{count} {name.replace('_', ' ')}" for name, count in classes.items() if count]
            yield f"{label}, outputs against vanilla's: {', '.join(words)}."


def _flag_notes(table: Table) -> Iterator[str]:
    labels: dict[str, dict[str, list[str]]] = {}
    remedies: dict[str, str] = {}
    for row in table.rows:
        for flag in row.flags:
            named = labels.setdefault(flag.name, {}).setdefault(flag.reason, [])
            if row.category is None:
                named.append(row.label)
            remedies.setdefault(flag.name, flag.remedy)
    for name, by_reason in labels.items():
        reasons = "; ".join(f"{', '.join(who)}: {reason}" for reason, who in by_reason.items() if who)
        weight = "disqualifies" if name in DISQUALIFYING else "warning"
        if reasons:
            yield f"{name} ({weight}): {reasons}. {remedies[name]}."
