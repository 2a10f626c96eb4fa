"""Anchors, row types and the rows of each cycle, against the paper's rules."""

from __future__ import annotations

import pytest

from spdbench.models.partition import split_evenly
from spdbench_backends.spd.plan import DeepestRows, FeaturePlan, NominalRows, default_anchors

STAGES = split_evenly(30, 3)
# in_flight[s] is the position in stage s; an example: n = 3, prompt of 5, the draft at 7 wrong.
CYCLES = [[5, -1, -1], [6, 5, -1], [7, 6, 5], [8, 7, 6], [7, -1, -1], [8, 7, -1], [9, 8, 7]]
REJECTED_IN = 4


@pytest.mark.parametrize(
    ("layers", "stages", "anchors"),
    [(32, 4, (0, 8, 24, 31, 32)), (30, 3, (0, 10, 29, 30)), (30, 2, (0, 15, 30)), (30, 1, (0, 30)), (6, 2, (0, 3, 6))],
)
def test_default_anchors(layers: int, stages: int, anchors: tuple[int, ...]) -> None:
    assert default_anchors(layers, stages) == anchors
    FeaturePlan(anchors, split_evenly(layers, stages))


def test_row_types_follow_the_layers_done() -> None:
    plan = FeaturePlan((0, 10, 29, 30), STAGES)
    assert [plan.row_type(depth) for depth in range(4)] == [0, 1, 1, 3]  # type 2 is in the file and never used


def test_uneven_stages_count_their_own_layers() -> None:
    plan = FeaturePlan((0, 4, 6), (range(4), range(4, 6)))
    assert [plan.row_type(depth) for depth in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("anchors", "why"),
    [
        ((), "begin with 0"),
        ((1, 2), "begin with 0"),
        ((0, 5, 5), "increase"),
        ((0, 31), "beyond"),
        ((0, 1, 2, 3, 4), "too many"),
    ],
)
def test_anchors_that_cannot_be(anchors: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FeaturePlan(anchors, STAGES)


def walk(rows: DeepestRows | NominalRows) -> tuple[int, list[list[str]]]:
    """Rows of the prompt, then of every cycle, as `position@depth`."""
    prompt = len(rows.start(5))
    seen = []
    for number, in_flight in enumerate(CYCLES, start=1):
        seen.append([f"{row.position}@{row.depth}" for row in rows.next(in_flight, in_flight[0])])
        if number == REJECTED_IN:
            rows.rollback(7)
    return prompt, seen


def test_nominal_rows_are_those_of_the_reference() -> None:
    prompt, seen = walk(NominalRows(FeaturePlan((0, 10, 29, 30), STAGES)))
    assert prompt == 3
    assert seen == [
        ["3@2", "4@1", "5@0"],
        ["4@2", "5@1", "6@0"],
        ["5@2", "6@1", "7@0"],
        ["5@3", "6@2", "7@1", "8@0"],
        ["5@2", "6@1", "7@0"],
        ["6@2", "7@1", "8@0"],
        ["7@2", "8@1", "9@0"],
    ]


def test_deepest_rows_compute_a_completed_row_once() -> None:
    prompt, seen = walk(DeepestRows(FeaturePlan((0, 10, 29, 30), STAGES)))
    assert prompt == 5
    assert seen == [
        ["5@0"],
        ["5@1", "6@0"],
        ["5@2", "6@1", "7@0"],
        ["5@3", "6@2", "7@1", "8@0"],
        ["6@3", "7@0"],
        ["7@1", "8@0"],
        ["7@2", "8@1", "9@0"],
    ]


def test_a_prompt_shorter_than_the_pipeline_has_no_negative_rows() -> None:
    plan = FeaturePlan((0, 10), STAGES)
    rows = NominalRows(plan)
    assert [row.position for row in rows.start(1)] == []
    assert [row.position for row in rows.next([1, -1, -1], 1)] == [0, 1]
    assert [row.position for row in DeepestRows(plan).start(1)] == [0]
