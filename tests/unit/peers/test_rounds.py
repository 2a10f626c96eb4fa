"""What a round was, told by the drafts it was fed and the ids that came of it."""

from __future__ import annotations

import pytest

from spdbench_backends.rounds import verdict


@pytest.mark.parametrize(
    ("ids", "drafts", "judged", "accepted"),
    [
        ((5,), (), 0, 0),
        ((5, 6, 7), (5, 6), 2, 2),
        ((5, 9), (5, 6), 2, 1),
        ((9,), (5, 6), 1, 0),
        ((5, 6), (5, 6, 7), 2, 2),  # cut behind the second: of the third nothing is known
        ((5, 6), (5, 6), 2, 2),  # cut in front of the bonus
    ],
)
def test_verdict(ids: tuple[int, ...], drafts: tuple[int, ...], judged: int, accepted: int) -> None:
    step = verdict(ids, drafts, 3)
    assert (step.token_ids, step.drafted, step.judged, step.accepted) == (ids, len(drafts), judged, accepted)
    assert step.forwards == 3.0
