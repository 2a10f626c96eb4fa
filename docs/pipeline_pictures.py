"""Draws the pictures of `how-pipelines-work.md`: the pure schedule, simulated, as SVG.

    python -m docs.pipeline_pictures

Each picture has a background of its own and follows the browser's light or dark scheme. Its text can be read at 360 px.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from docs.pipeline_bubble import bubble_picture
from docs.pipeline_svg import WIDTH, box, label, line, svg, swatches
from spdbench.pipeline.schedule import Batch, Node, PipelineSchedule

IMAGES = Path(__file__).parent / "images"
LABELS = 58
"""Width of the column with the names of rows."""
ROW, GAP, TOP = 30, 4, 28
HALF = ROW / 2 - 1

Drafter = Callable[[PipelineSchedule, int], Sequence[tuple[Node, int]]]
"""Schedule and number of the cycle -> drafts: parent and token. A token is right if it is 0."""


@dataclass(frozen=True)
class Frame:
    """One cycle: what the stages hold, its verdict on a draft (`yes`, `no`; `none` without one), what it dropped."""

    stages: tuple[Batch, ...]
    verdict: str
    root: Node
    dropped: Batch


def simulate(num_stages: int, num_cycles: int, drafter: Drafter) -> list[Frame]:
    """The cycles of a sequence whose right token is 0 at every position."""
    schedule = PipelineSchedule(num_stages)
    schedule.start(0, 1)
    frames = []
    for number in range(1, num_cycles + 1):
        cycle = schedule.cycle()
        schedule.draft(drafter(schedule, number))
        right = next((child for child in schedule.children() if child.token_id == 0), None)
        if cycle.completing is None:
            change, verdict = schedule.fill(), "none"
        elif right is not None:
            change, verdict = schedule.accept(right), "yes"
        else:
            verdict = "no" if schedule.children() else "none"
            change = schedule.restart(0)
        frames.append(Frame(cycle.stages, verdict, cycle.root, change.dropped))
    return frames


def chain(wrong: Sequence[int] = ()) -> Drafter:
    """One draft a cycle, after the newest token; wrong at its first try for the positions `wrong`."""
    left = set(wrong)

    def draft(schedule: PipelineSchedule, _number: int) -> list[tuple[Node, int]]:
        newest = schedule.cycle().newest
        if newest is None:
            return []
        is_wrong = newest.position + 1 in left
        left.discard(newest.position + 1)
        return [(newest, int(is_wrong))]

    return draft


def nothing(_schedule: PipelineSchedule, _number: int) -> list[tuple[Node, int]]:
    return []


def two_choices(schedule: PipelineSchedule, number: int) -> list[tuple[Node, int]]:
    """A second choice in the second cycle, which is the right one; later drafts follow both."""
    entered = schedule.cycle().stages[0]
    if number == 1:
        return [(entered[0], 1), (entered[0], 0)]
    return [(node, 0) for node in entered]


def second_thought(schedule: PipelineSchedule, number: int) -> list[tuple[Node, int]]:
    """A wrong first draft; in the third cycle the drafter reads deeper rows and adds the right one as a branch."""
    cycle = schedule.cycle()
    newest, root = cycle.newest, cycle.root
    if number == 1 or newest is None:
        return [(root, 1)]
    if number == 3:
        return [(root, 0)]
    return [(newest, 0)]


def grid(title: str, frames: Sequence[Frame], *, explains: Sequence[str]) -> str:
    """Stages by cycles; each cell has the positions of its tokens."""
    num_stages = len(frames[0].stages)
    dropped = {node.id for frame in frames for node in frame.dropped}
    column = (WIDTH - LABELS - 8) / len(frames)
    rows = [f"stage {stage}" for stage in range(num_stages)] + ["verdict"]
    parts = [label(6, 18, "cycle", "muted")]
    parts += [label(6, TOP + row * (ROW + GAP) + 19, name, "muted") for row, name in enumerate(rows)]
    for number, frame in enumerate(frames):
        left = LABELS + number * column
        parts.append(label(left + column / 2 - 1, 18, str(number + 1), "muted", middle=True))
        for stage, batch in enumerate(frame.stages):
            parts += _cell(left, TOP + stage * (ROW + GAP), column - 3, batch, frame.root, dropped)
        kind = {"yes": "good", "no": "bad", "none": "muted"}[frame.verdict]
        word = "-" if frame.verdict == "none" else frame.verdict
        parts.append(label(left + column / 2 - 1, TOP + num_stages * (ROW + GAP) + 19, word, kind, middle=True))
    y: float = TOP + len(rows) * (ROW + GAP) + 8
    has_drafts = any(node.id != frame.root.id for frame in frames for batch in frame.stages for node in batch)
    names = [("known", "known to be right")] + [("draft", "draft, accepted later")] * has_drafts
    names += [("drop", "draft, dropped later")] * bool(dropped)
    keys, y = swatches(y, names)
    words = [label(6, y + 14 + 16 * number, text) for number, text in enumerate(explains)]
    return svg(title, " ".join(explains), y + 16 * len(explains) + 12, [*parts, *keys, *words])


def _cell(x: float, y: float, width: float, batch: Batch, root: Node, dropped: set[int]) -> list[str]:
    """A stage in a cycle: one token, or two above each other."""
    if not batch:
        return [box(x, y, width, ROW, "empty")]
    height = ROW if len(batch) == 1 else HALF
    parts = []
    for row, node in enumerate(batch):
        kind = "known" if node.id == root.id else "drop" if node.id in dropped else "draft"
        top = y + row * (HALF + 2)
        middle = top + height / 2
        parts.append(box(x, top, width, height, kind))
        parts.append(label(x + width / 2, middle + 4.5, str(node.position), f"on-{kind}", middle=True))
        if kind == "drop":
            parts.append(line(x + width / 2 - 9, middle, x + width / 2 + 9, middle))
    return parts


def layouts() -> str:
    """Which device does what, in four layouts of a pipeline of three stages."""
    shown = [
        ("usual: drafter on its own", ["layers", "layers", "layers, head"], "drafter"),
        ("drafting=first_stage", ["layers, drafter", "layers", "layers, head"], None),
        ("head=drafter", ["layers", "layers", "layers"], "drafter, head"),
        ("head=split", ["layers", "layers", "layers, ½ head"], "drafter, ½ head"),
    ]
    parts, y, width = [], 8.0, (WIDTH - 12) / 4
    for name, stages, drafter in shown:
        parts.append(label(6, y + 12, name))
        for number, words in enumerate([*stages, drafter]):
            x = 6 + number * width
            if words is None:
                continue
            kind = "draft" if number == len(stages) else "known"
            parts.append(box(x, y + 20, width - 4, 46, kind))
            device = f"device {number}"
            lines = [device, *words.split(", ")]
            for row, text in enumerate(lines):
                at = y + 43 + 13 * row - 6.5 * (len(lines) - 1) + 4
                parts.append(label(x + width / 2 - 2, at, text, f"on-{kind}", middle=True, small=True))
        y += 80
    what = "Four layouts of three stages: which device holds layers, drafter and output head."
    return svg("Layouts of a pipeline", what, y, parts)


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    return {
        "pipeline-token.svg": grid(
            "A token's way through four stages, without drafts",
            simulate(4, 8, nothing),
            explains=["One token takes four cycles.", "Three of four stages are empty all the time."],
        ),
        "pipeline-fill.svg": grid(
            "The pipe fills with drafts, and all of them are accepted",
            simulate(4, 9, chain()),
            explains=["Cycles 1 to 3 fill the pipe.", "From cycle 4 on each cycle gives a verdict and a token."],
        ),
        "pipeline-rejection.svg": grid(
            "A rejection: flush and refill",
            simulate(4, 9, chain([3])),
            explains=[
                "Cycle 5: the draft for position 3 is wrong. All behind it",
                "is dropped, and the target's own token enters stage 0.",
                "Cycles 6 to 8 fill the pipe again: 3 cycles lost.",
            ],
        ),
        "pipeline-branches.svg": grid(
            "Two drafts for one position: a rejection without a flush",
            simulate(3, 7, two_choices),
            explains=[
                "Two drafts for position 2 enter in cycle 2, in one batch.",
                "Cycle 3: the second one is right. Its branch goes on,",
                "the other one is dropped. The pipe stays full.",
            ],
        ),
        "pipeline-redraft.svg": grid(
            "Drafting again from deeper rows",
            simulate(4, 8, second_thought),
            explains=[
                "Cycle 3: the drafter sees position 1 in stage 2, and adds",
                "another draft for position 2, which enters in cycle 4.",
                "Cycle 4: it was right. The branch entered 2 cycles late,",
                "so that 2 cycles are lost, in place of 3 of a flush.",
            ],
        ),
        "pipeline-layouts.svg": layouts(),
        "pipeline-bubble.svg": bubble_picture(simulate(3, 7, chain([3]))),
    }


def main() -> None:
    for name, picture in pictures().items():
        (IMAGES / name).write_text(picture, encoding="utf-8")
        print(f"Wrote {escape(str(IMAGES / name))}")


if __name__ == "__main__":
    main()
