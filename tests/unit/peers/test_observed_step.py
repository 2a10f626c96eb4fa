"""The step of a round, from the drafts that it was fed and the ids that it emitted."""

from __future__ import annotations

import pytest

from spdbench_backends.local import observed_step


@pytest.mark.parametrize(
    ("ids", "drafts", "judged", "accepted"),
    [
        ((5,), (), 0, 0),
        ((5, 6, 7), (5, 6), 2, 2),
        ((5, 9), (5, 6), 2, 1),
        ((9,), (5, 6), 1, 0),
        ((5, 6), (5, 6, 7), 2, 2),  # cut after the second: the verdict on the third is unknown
        ((5, 6), (5, 6), 2, 2),  # cut in front of the bonus
    ],
)
def test_ids_that_equal_drafts_are_accepted(
    ids: tuple[int, ...], drafts: tuple[int, ...], judged: int, accepted: int
) -> None:
    step = observed_step(ids, drafts, 3)
    assert (step.token_ids, step.drafted, step.judged, step.accepted) == (ids, len(drafts), judged, accepted)
    assert step.forwards == 3.0
