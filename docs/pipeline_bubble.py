"""The picture of a pipeline's bubble: what three lanes do in a few cycles, and each idle piece by its cause.

The cycles come from the schedule, the times of the parts are made up. The causes are drawn here and counted by
`spdbench.judge.metrics.bubble`; the picture is refused where the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Protocol

from docs.pipeline_svg import WIDTH, box, label, svg, swatches
from spdbench.judge.metrics.bubble import lane_time, read_spans
from spdbench.pipeline.schedule import Batch, Node
from spdbench.types import Span

LAYERS = (4, 6, 5)
"""Made-up times of the stages' work."""
DRAFT, LATE_DRAFT, LATE_CYCLE = 3, 8, 3
"""The drafter's time; in one cycle it is late."""
VERIFY, HOST = 1, 1
LABELS, ROW, TOP = 58, 30, 28
LETTERS = {"fill": "F", "verify": "V", "late": "D", "imbalance": "I", "host": "H"}
NAMES = {"known": "useful", "drop": "wasted", "fill": "F fill", "verify": "V verify", "late": "D draft"}
NAMES |= {"imbalance": "I imbalance", "host": "H host"}
FIELDS = {"known": "useful", "drop": "wasted", "late": "draft"}

Piece = tuple[int, int, int, str]
"""Lane, start, end, and what it is, as a class of the picture."""


class CycleFrame(Protocol):
    """What the simulation gives of a cycle."""

    @property
    def stages(self) -> tuple[Batch, ...]: ...
    @property
    def verdict(self) -> str: ...
    @property
    def dropped(self) -> Batch: ...


def pieces_and_spans(frames: Sequence[CycleFrame]) -> tuple[list[Piece], list[Span], list[int]]:
    """What is drawn, the spans that a backend would give, and the ends of the cycles, from 0 on."""
    lost = {node.id for frame in frames for node in frame.dropped}
    pieces, spans, ends = [], [], [0]
    num_lanes = len(LAYERS)
    for number, frame in enumerate(frames):
        start = ends[-1]
        draft = start + (LATE_DRAFT if number + 1 == LATE_CYCLE else DRAFT)
        work = [start + LAYERS[lane] for lane in range(num_lanes) if frame.stages[lane]]
        done = max(draft, *work)
        verdict = done + (VERIFY if frame.verdict != "none" else 0)
        end = verdict + HOST
        spans += [Span(num_lanes, "draft", start, draft, 0, True), Span(num_lanes, "host", verdict, end, 0, True)]
        if verdict > done:
            spans.append(Span(num_lanes, "verify", done, verdict, 0, True))
        for lane in range(num_lanes):
            if not frame.stages[lane]:
                pieces.append((lane, start, end, "fill"))
                continue
            node: Node = frame.stages[lane][0]
            ready = start + LAYERS[lane]
            kept = node.id not in lost
            spans.append(Span(lane, "target", start, ready, node.position, kept))
            waits = max(ready, draft), max(ready, draft, *work)
            found = [(start, ready, "known" if kept else "drop"), (ready, waits[0], "late")]
            found += [(*waits, "imbalance"), (done, verdict, "verify"), (verdict, end, "host")]
            pieces += [(lane, *each) for each in found if each[1] > each[0]]
        ends.append(end)
    return pieces, spans, ends


def bubble_picture(frames: Sequence[CycleFrame]) -> str:
    """The lanes over time, and below them the share of each cause."""
    pieces, spans, ends = pieces_and_spans(frames)
    counted = asdict(lane_time(read_spans(spans, len(LAYERS)), ends))
    total = sum(counted.values())
    for kind in NAMES:
        drawn = sum(end - start for _, start, end, what in pieces if what == kind)
        if drawn != counted[FIELDS.get(kind, kind)]:
            raise ValueError(f"{kind}: {drawn} drawn, {counted[FIELDS.get(kind, kind)]} counted")
    scale = (WIDTH - LABELS - 8) / ends[-1]
    parts = [label(6, 18, "time", "muted")]
    parts += [label(6, TOP + lane * (ROW + 4) + 19, f"stage {lane}", "muted") for lane in range(len(LAYERS))]
    for number, (start, end) in enumerate(pairwise(ends)):
        middle = LABELS + scale * (start + end) / 2
        parts.append(label(middle, 18, str(number + 1), "muted", middle=True))
    for lane, start, end, kind in pieces:
        x, y, width = LABELS + scale * start, TOP + lane * (ROW + 4), scale * (end - start) - 0.6
        parts.append(box(x, y, width, ROW, kind))
        if kind in LETTERS and width >= 9:
            parts.append(label(x + width / 2, y + 19, LETTERS[kind], middle=True, small=True))
    entries = [(kind, f"{name} {counted[FIELDS.get(kind, kind)] / total:.0%}") for kind, name in NAMES.items()]
    keys, below = swatches(TOP + len(LAYERS) * (ROW + 4) + 8, entries)
    bubble = 1 - (counted["useful"] + counted["wasted"]) / total
    words = f"bubble: {bubble:.0%}, all that is neither useful nor wasted"
    title = "What three stages do with the time of seven cycles"
    what = f"{'; '.join(text for _, text in entries)}. {words}."
    return svg(title, what, below + 26, [*parts, *keys, label(6, below + 14, words)])
