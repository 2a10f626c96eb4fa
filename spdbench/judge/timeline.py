"""One request step by step: what became of each drafted token, what each lane did, and which token each stage held.

From a run's steps, the drafted tokens (`run --keep-drafts`) and the spans (`run --trace`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from spdbench.judge.metrics.bubble import at_work
from spdbench.judge.results.kept import DraftColumns
from spdbench.judge.results.schema import BackendRecord, Run, Steps
from spdbench.types import Span

CycleOutcome = Literal["prefill", "accepted", "rejected", "filling", "decoded"]
"""What a step gave: `filling` is a pipeline's cycle without a verdict, `decoded` a token without drafts."""


Fate = Literal["accepted", "rejected", "dropped", "own"]
"""Of a token: an accepted draft, a rejected one, one dropped without a verdict, the target's own."""


class StepTokens(NamedTuple):
    """The ids of one step: drafts that the answer holds, drafts that got a verdict and were rejected, drafts that got
    none, and ids of the target's own. `position` is the index of the step's first id in the answer."""

    position: int
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    dropped: tuple[int, ...]
    own: tuple[int, ...]


def step_tokens(run: Run) -> list[StepTokens]:
    """What became of the drafts of each step; without kept drafts, `rejected` and `dropped` are empty.

    Raises:
        ValueError: the drafts are not those of the steps.
    """
    steps, found, done = run.steps, [], 0
    kept = run.drafted_tokens or DraftColumns(ids=[[]] * len(steps.t_ns), parents=[[]] * len(steps.t_ns))
    if len(kept.ids) != len(steps.t_ns):
        raise ValueError(f"drafted_tokens: {len(kept.ids)} steps, and the run has {len(steps.t_ns)}")
    for number, (ids, parents) in enumerate(zip(kept.ids, kept.parents, strict=True)):
        new = tuple(run.output_ids[done : done + steps.emitted[number]])
        accepted = new[: steps.accepted[number]]
        path = _path(ids, parents, accepted)
        judged = steps.judged[number] > steps.accepted[number]
        last = path[-1] if path else -1
        rejected = [node for node, parent in enumerate(parents) if judged and parent == last]
        dropped = set(range(len(ids))) - {*path, *rejected}
        found.append(
            StepTokens(
                done,
                accepted,
                tuple(ids[node] for node in rejected),
                tuple(ids[node] for node in sorted(dropped)),
                new[len(accepted) :],
            )
        )
        done += len(new)
    return found


def _path(ids: Sequence[int], parents: Sequence[int], accepted: Sequence[int]) -> list[int]:
    """The nodes of the accepted drafts; those of a step whose drafts are unknown are none."""
    path: list[int] = []
    for token in accepted if ids else ():
        at = path[-1] if path else -1
        node = next((node for node, parent in enumerate(parents) if parent == at and ids[node] == token), None)
        if node is None:
            raise ValueError(f"drafted_tokens: no draft of the accepted token {token}")
        path.append(node)
    return path


def verdict(steps: Steps, number: int, backend: BackendRecord) -> CycleOutcome:
    """What step `number` gave. A pipeline's token without a draft before it flushes the pipeline like a rejection."""
    if number == 0:
        return "prefill"
    if backend.kind == "pipeline" and not steps.emitted[number]:
        return "filling"
    if steps.judged[number] > steps.accepted[number]:
        return "rejected"
    if steps.accepted[number]:
        return "accepted"
    return "rejected" if backend.kind == "pipeline" else "decoded"


def rejection_to_show(run: Run, backend: BackendRecord) -> int | None:
    """The first step that rejects a draft after one that accepted some, else the first that rejects one; None
    without any."""
    steps = run.steps
    found = [
        number
        for number in range(1, len(steps.t_ns))
        if steps.judged[number] and verdict(steps, number, backend) == "rejected"
    ]
    return next((number for number in found if steps.accepted[number - 1]), found[0] if found else None)


class StageToken(NamedTuple):
    """A token in a stage, and what became of it."""

    token_id: int
    fate: Fate


def stage_tokens(run: Run, backend: BackendRecord) -> list[tuple[StageToken | None, ...]]:
    """Which token each stage of a pipeline holds in each cycle, the first one after prefill first; None: no token.

    After prefill and after each flush the target's own token enters stage 0, then a draft a cycle, and all move one
    stage a cycle (`pipeline/schedule.py`). Needs kept drafts. Where several branches are in flight, it is the one whose
    drafts are accepted.
    """
    steps, tokens, lanes = run.steps, step_tokens(run), backend.num_stages
    cycles: list[tuple[StageToken | None, ...]] = []
    start = 1
    while start < len(steps.t_ns):
        ends = range(start, len(steps.t_ns))
        end = next((n for n in ends if verdict(steps, n, backend) == "rejected"), len(steps.t_ns) - 1)
        chain = [StageToken(token, "own") for token in tokens[start - 1].own[-1:]]
        chain += [StageToken(token, "accepted") for step in tokens[start : end + 1] for token in step.accepted]
        chain += [StageToken(token, "rejected") for token in tokens[end].rejected[:1]]
        chain += [StageToken(token, "dropped") for token in tokens[end].dropped]
        for cycle in range(end + 1 - start):
            places = (cycle - stage for stage in range(lanes))
            cycles.append(tuple(chain[at] if 0 <= at < len(chain) else None for at in places))
        start = end + 1
    return cycles


@dataclass(frozen=True)
class LaneSpan:
    """A span with its cycle (for rounds: its round), counted from 0, and its token where that is known."""

    span: Span
    cycle: int
    token_id: int | None


def lane_spans(run: Run) -> list[LaneSpan]:
    """All of a run's spans, in their order. The token of discarded work is known where drafts are kept."""
    if run.spans is None:
        return []
    ends, tokens = run.steps.t_ns, step_tokens(run)
    last = len(tokens) - 1  # it drops what is in flight, and the answer's last token, which needs no more work
    flushes = [number for number, step in enumerate(tokens) if step.rejected or step.dropped or number == last]
    found = []
    for span in run.spans.spans():
        cycle = span.cycle if span.cycle >= 0 else bisect_right(ends, span.start_ns) - 1
        index, token_id = span.position - run.num_prompt_tokens, None
        # A node is in stage s in the s-th cycle after the one in which it entered. One that stage 0 begins before the
        # verdict enters in the cycle after the flush that drops it, whose number as a cycle is its step's.
        flush = bisect_left(flushes, cycle - span.lane)
        if span.kept:
            token_id = run.output_ids[index] if 0 <= index < len(run.output_ids) else None
        elif flush < len(flushes):
            step = tokens[flushes[flush]]
            chain, place = (*step.accepted, *step.rejected, *step.dropped), index - step.position
            token_id = chain[place] if 0 <= place < len(chain) else None
        found.append(LaneSpan(span, cycle, token_id))
    return found


def pipe_fill(run: Run, backend: BackendRecord) -> list[int]:
    """How many lanes of a pipeline hold a token in each cycle: by the work in their spans (metrics.md, `fill`), else by
    the drafts; empty without both."""
    if run.spans is not None and run.spans.lane:
        work = [each for each in lane_spans(run) if each.span.kind == "target"]
        spans = np.array([(each.span.lane, each.span.position, each.cycle) for each in work], np.int64).reshape(-1, 3)
        shape = 1 + int(spans[:, 0].max(initial=0)), 1 + max(len(run.steps.t_ns), int(spans[:, 2].max(initial=0)))
        fill: list[int] = at_work(spans[:, 0], spans[:, 1], spans[:, 2], shape).sum(axis=0).tolist()
        return fill[: len(run.steps.t_ns) - 1]
    if run.drafted_tokens is None:
        return []
    return [sum(token is not None for token in stages) for stages in stage_tokens(run, backend)]


def acceptance(steps: Steps) -> list[float | None]:
    """The share of verdicts so far that accepted a draft, after each step; None before the first verdict."""
    totals = zip(accumulate(steps.accepted), accumulate(steps.judged), strict=True)
    return [accepted / judged if judged else None for accepted, judged in totals]
