"""The parts of a pipeline from the spans of its requests, with the times that they took one by one."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.projection.recorded import start_seconds
from spdbench.judge.projection.simulation import Parts, Scatter, as_factors
from spdbench.types import Span


class Traced(NamedTuple):
    """The spans of a request, and its decode window on their clock."""

    spans: Sequence[Span]
    first_ns: int
    last_ns: int


def parts_of(traced: Sequence[Traced], counts: Sequence[int], *, reads_states: bool) -> Parts:
    """The parts of a pipeline with `counts` layers a stage, from the spans of its requests. What comes of dropped
    tokens does not count: most of it was cut short. A message took the time that a lane waited right before its
    work."""
    found: dict[tuple[str, int], list[float]] = {}
    for spans, first_ns, last_ns in traced:
        found.setdefault(("control", 0), []).extend(_control_seconds(spans, first_ns, last_ns))
        inside = [each for each in spans if each.kept and first_ns <= each.start_ns and each.end_ns <= last_ns]
        begins = {(each.lane, each.start_ns) for each in inside if each.kind == "target"}
        for span in inside:
            seconds = (span.end_ns - span.start_ns) / 1e9
            if span.kind != "host":
                found.setdefault((span.kind, span.lane), []).append(seconds)
            elif (span.lane, span.end_ns) in begins:
                found.setdefault(("message", 0), []).append(seconds)
    num, own = len(counts), len(counts) - 1
    drafting = next((lane for kind, lane in found if kind == "draft"), num)
    stages = [found["target", lane] for lane in range(num)]
    drafts, messages = found.get(("draft", drafting), [0.0]), found.get(("message", 0), [0.0])
    last_head, drafters_head = (fmean(found.get(("head", lane), [0.0])) for lane in (own, drafting))
    layer_s = sum(map(fmean, stages)) / sum(counts)
    return Parts(
        stages=tuple(map(fmean, stages)),
        head_s=last_head + drafters_head,
        draft_s=fmean(drafts),
        verify_s=fmean(found.get(("verify", num + 1), [0.0])),
        host_s=fmean(found["control", 0]),
        message_s=fmean(messages),
        devices=(*range(num), drafting),
        drafters_head=drafters_head / ((last_head + drafters_head) or 1.0),
        abort_s=layer_s / 2 if drafting else 0.0,
        reads_states=reads_states,
        scatter=Scatter(
            stages=tuple(factor for stage in stages for factor in as_factors(stage)),
            drafts=as_factors(drafts),
            messages=as_factors(messages),
        ),
    )


def _control_seconds(spans: Sequence[Span], first_ns: int, last_ns: int) -> Iterator[float]:
    """What the controller took before each draft: since its last draft or verdict, or since the last of the stages was
    done where it had to wait for that."""
    ends = sorted(each.end_ns for each in spans if each.kind != "host")
    for draft in (each for each in spans if each.kind == "draft" and first_ns <= each.start_ns <= last_ns):
        if at := bisect(ends, draft.start_ns):
            yield (draft.start_ns - max(ends[at - 1], first_ns)) / 1e9


def traced_parts(result: LoadedResult) -> Parts:
    """The parts of a result that holds spans."""
    drafter, counts = result.head.drafter, [count for count in result.head.backend.stage_layers if count]
    traced = [
        Traced(run.spans.spans(), run.steps.t_ns[0], run.steps.t_ns[-1]) for run in result.detailed_runs() if run.spans
    ]
    parts = parts_of(traced, counts, reads_states=drafter is not None and not drafter.synthetic)
    return replace(parts, start_s=start_seconds(result))
