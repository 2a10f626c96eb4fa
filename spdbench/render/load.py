"""A comparison under several loads in words: a sentence for each label and level, columns, and notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from spdbench.judge.comparison.compare import Row
from spdbench.judge.comparison.load import Level, Load, LoadConclusion
from spdbench.judge.comparison.pairing import concurrency
from spdbench.judge.metrics.stats import Interval
from spdbench.render.columns import ACCEPTANCE, EMPTY, GOODPUT, LABEL, SPEEDUP, TAU, Column, harmless
from spdbench.render.notes import notes, provisional

NOTE = (
    "at once: users who each ask again as soon as an answer is there; total: new tokens/s of the server, tok/s: of one "
    "request after its first token; TTFT and ITL: median / 95th percentile; tau: tokens a round; break-even: the "
    "tau from which it would pay."
)

WORDS: Mapping[str, str] = {"slower": "does not pay"}


def sentences(found: LoadConclusion) -> list[str]:
    """What is concluded of a label, then what was measured at each level."""
    measured = (f"  {_measured(each, with_words=not found.disqualified_by)}" for each in found.levels)
    return [harmless(f"{found.label}: {_verdict(found)}"), *map(harmless, measured)]


def _verdict(found: LoadConclusion) -> str:
    first, last = found.levels[0].at_once, found.levels[-1].at_once
    if found.disqualified_by:
        return f"disqualified by {', '.join(found.disqualified_by)}"
    doubts = provisional(found.doubts)
    if found.pays_up_to is None:
        text = _does_not_pay(found)
    elif found.pays_up_to == last:
        return f"pays at every load measured, up to {last} requests at once{doubts}"
    else:
        text = f"pays up to {found.pays_up_to} {_requests(found.pays_up_to)} at once{doubts}"
    if found.break_even is None:
        return text
    low, high = found.break_even_interval
    ends = f"{f'{low:.1f}' if low else f'below {first}'}, {f'{high:.1f}' if high else f'above {last}'}"
    return f"{text}; break-even at about {found.break_even:.1f} [{ends}]"


def _does_not_pay(found: LoadConclusion) -> str:
    """Of a label that is not shown to pay at the lowest level."""
    outcomes = {level.outcome for level in found.levels}
    first = found.levels[0]
    if len(found.levels) > 1 and outcomes == {"slower"}:
        return "does not pay at any level measured"
    words = WORDS.get(first.outcome, first.outcome)
    return f"{words} at {first.at_once} {_requests(first.at_once)} at once"


def _requests(number: int) -> str:
    return "request" if number == 1 else "requests"


def _measured(level: Level, *, with_words: bool) -> str:
    words = [WORDS.get(level.outcome, level.outcome)] if with_words or level.speedup is None else []
    speedup = [] if level.speedup is None else [_with_interval(level.speedup, level.interval, "x")]
    text = f"at {level.at_once}: {', '.join(speedup + words)}"
    if level.acceptance is None:
        return text
    tau = f"; tau {_with_interval(level.acceptance, level.acceptance_interval)}"
    needs = "" if level.needed is None else f", break-even {_with_interval(level.needed, level.needed_interval)}"
    return text + tau + needs


def _with_interval(value: float, interval: Interval | None, unit: str = "") -> str:
    return f"{value:.2f}{unit}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def load_notes(load: Load) -> list[str]:
    """The notes of all levels; one that not all have says of which it is."""
    of_level = {level: notes(table) for level, table in zip(load.levels, load.tables, strict=True)}
    found = [harmless(NOTE)]
    for line in dict.fromkeys(line for lines in of_level.values() for line in lines):
        levels = [level for level, lines in of_level.items() if line in lines]
        found.append(line if len(levels) == len(of_level) else f"at {', '.join(map(str, levels))}: {line}")
    return found


def _milliseconds(*names: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        values = [row.metrics.get(name) for name in names]
        return EMPTY if None in values else " / ".join(f"{1000 * (value or 0.0):.0f}" for value in values)

    return cell


def _rate(name: str) -> Callable[[Row], str]:
    return lambda row: EMPTY if row.metrics[name] is None else f"{row.metrics[name]:.1f}"


COLUMNS: Sequence[Column] = (
    LABEL,
    Column("at\nonce", lambda row: str(concurrency(row.head))),
    SPEEDUP,
    Column("total\ntok/s", _rate("throughput_tokens_per_s")),
    Column("tok/s", _rate("decode_tokens_per_s")),
    Column("TTFT\nms", _milliseconds("ttft_p50_s", "ttft_p95_s"), leave_out=1),
    Column("ITL\nms", _milliseconds("itl_p50_s", "itl_p95_s"), leave_out=3),
    GOODPUT,
    TAU,
    ACCEPTANCE,
)


def columns_of(load: Load) -> Iterator[Column]:
    """The columns that say anything."""
    return (column for column in COLUMNS if set(column.cells(load.table)) != {EMPTY})
