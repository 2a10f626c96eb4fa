"""What a reader must know of a projection: what stands for what, and what casts doubt on the results behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spdbench.console import counted
from spdbench.judge.comparison.pairing import pair
from spdbench.judge.metrics.flags import DISQUALIFYING
from spdbench.judge.projection.costs import Costs
from spdbench.judge.projection.recorded import Recorded
from spdbench.judge.projection.sources import labels

if TYPE_CHECKING:
    from spdbench.judge.projection.project import PipelineRow, Setting

REPLICAS = (
    "n replicas of what runs on one device take n requests at once, each as fast as there, so its speed-up `a device` "
    "is theirs too. One request alone leaves all but one idle, so replicas are not listed for it"
)


def notes(recorded: Recorded, rows: Sequence[PipelineRow], costs: Costs, setting: Setting) -> list[str]:
    """Doubts first, each in one sentence."""
    found = [*_flagged(recorded), *_warned(recorded), *_incomplete(recorded), REPLICAS, *costs.notes]
    if setting.concurrency == 1 and costs.layer_s(2) is not None:
        found.append(
            "--concurrency N also shows all ways to decode, replicas among them, under 1 to N requests at once"
        )
    return [*found, *_stand_ins(recorded, rows)]


def _flagged(recorded: Recorded) -> Iterator[str]:
    """Flags that disqualify a result, such as that of a synthetic drafter; once for all results of which one reason
    is true."""
    found: dict[str, list[str]] = {}
    for result, label in labels(recorded.all).items():
        for flag in result.flags:
            if flag.name in DISQUALIFYING:
                found.setdefault(f"{flag.reason} ({flag.name})", []).append(label)
    yield from (f"{', '.join(names)}: {reason}" for reason, names in found.items())


def _warned(recorded: Recorded) -> Iterator[str]:
    """All flags that disqualify nothing, such as that of a busy machine, in one note: they say how far to trust the
    results from which everything here follows."""
    found: dict[str, list[str]] = {}
    for result, label in labels(recorded.all).items():
        for name in {flag.name: None for flag in result.flags if flag.name not in DISQUALIFYING}:
            found.setdefault(name, []).append(label)
    if found:
        shown = "; ".join(f"{name} ({', '.join(names)})" for name, names in found.items())
        yield f"the results carry warnings, which `spdbench compare` explains: {shown}"


def _incomplete(recorded: Recorded) -> Iterator[str]:
    """Requests that failed, or that vanilla did not answer as well."""
    names, vanilla = labels(recorded.all), recorded.vanilla
    for result, label in names.items():
        if failed := int(result.runs.failed.sum()):
            yield f"{label}: {failed} of {counted(len(result.runs.keys), 'request')} failed and are omitted"
    for result, label in names.items():
        if vanilla is None or result is vanilla:
            continue
        pairing, answered = pair(vanilla, result), len(result.runs.answered)
        failed_here = {*result.runs.keys} - {*result.runs.answered}
        alone = answered - len(pairing.keys)
        missing = len({*vanilla.runs.answered} - {*pairing.keys} - failed_here)
        if alone or missing:
            yield (
                f"{label}: not paired with {names[vanilla]}: {alone} of {counted(answered, 'request')} have no partner "
                f"of the same prompt there, and {missing} of {names[vanilla]}'s none here, so the speed-up compares "
                "different prompts. Measure both in one `spdbench run`"
            )
        elif not pairing.same_machine:
            yield f"{label}: was measured on another machine, other devices or other software than {names[vanilla]}"


def _stand_ins(recorded: Recorded, rows: Sequence[PipelineRow]) -> Iterator[str]:
    """Results that stand for numbers of stages which were not recorded, and results that stand for nothing."""
    if far := [row for row in rows if row.recorded_stages != row.num_stages]:
        shown = ", ".join(dict.fromkeys(str(row.recorded_stages) for row in far))
        yield (
            f"verdicts of a drafter for {shown} stages stand for "
            f"{', '.join(dict.fromkeys(row.label for row in far))}: a drafter for these drafts differently. Add a "
            "result of that many stages to replace them"
        )
    used = {row.source for row in rows}
    for result, label in labels(recorded.all).items():
        if result in recorded.pipelines and result.file not in used:
            yield (
                f"{label}: is not shown: it has {result.head.backend.num_stages} stages, and another result of "
                f"{result.head.backend.name} is nearer to each number in --stages"
            )
        elif label != result.label and (result in recorded.rounds or any(_is_called(row, label) for row in rows)):
            yield f"{label}: is {result.file}, the label being that of another result too"
    yield from (
        f"{other.label}: is not shown ({other.file}): plain decoding is that of {recorded.first.file}"
        for other in recorded.unused
    )


def _is_called(row: PipelineRow, label: str) -> bool:
    return row.label.startswith(f"{label} x")
