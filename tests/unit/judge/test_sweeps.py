"""The points of a sweep: what differs, what nothing beats, where it pays."""

from __future__ import annotations

import pytest

from spdbench.judge.sweeps import axes_of, best_of, break_evens, costs_of, frontier_of, numeric_axis, series_of
from tests.unit.judge.swept import DRAFTERS, STAGES, swept

ROWS = swept()


def test_the_axes_are_the_settings_that_differ_by_their_number_of_values() -> None:
    assert axes_of(ROWS) == [DRAFTERS, STAGES]
    assert axes_of(swept([2])) == [DRAFTERS]
    assert axes_of(ROWS[:1]) == []
    assert numeric_axis(ROWS) == DRAFTERS
    assert numeric_axis(ROWS[:1]) is None


def test_values_are_numbers_where_they_hold_one() -> None:
    assert [row.number(DRAFTERS) for row in ROWS[:3]] == [0.2, 0.5, 0.9]
    assert ROWS[0].number(STAGES) == 2
    assert ROWS[0].number("model") is None


def test_the_best_row_has_the_highest_speedup() -> None:
    best = best_of(ROWS)
    assert best is not None
    assert best.settings == {STAGES: 3, DRAFTERS: "oracle:0.9"}
    assert best_of([]) is None


def test_a_series_is_a_label_with_its_other_settings() -> None:
    assert series_of(ROWS[0], ROWS, DRAFTERS) == "spd, spd.stages=2"
    assert series_of(ROWS[0], swept([2]), DRAFTERS) == "spd"


def test_no_other_row_is_better_in_both_than_one_on_the_frontier() -> None:
    front, costs = frontier_of(ROWS), {id(row): costs_of(row) for row in ROWS}
    assert [row.settings for row in front] == [
        {STAGES: 3, DRAFTERS: "oracle:0.9"},  # the fastest, on three devices
        {STAGES: 2, DRAFTERS: "oracle:0.9"},
    ]
    for row in front:
        token_s, device_s = costs[id(row)]
        assert token_s is not None
        assert device_s is not None
        others = [each for each in costs.values() if each != (token_s, device_s)]
        assert not any((one or 0) <= token_s and (two or 0) <= device_s for one, two in others)


def test_break_even_lies_between_the_points_on_both_sides_of_one() -> None:
    """Two stages and a verdict every 60 ms: 8 of 9 cycles give a token at 0.9; at 0.2 a token takes almost two."""
    found = {each.series: each for each in break_evens(ROWS, DRAFTERS)}
    two = found["spd, spd.stages=2"]
    low, high = (
        next(r.speedup for r in ROWS if r.settings == {STAGES: 2, DRAFTERS: d}) for d in ("oracle:0.2", "oracle:0.5")
    )
    assert low is not None
    assert high is not None
    assert low < 1 < high
    assert two.at == pytest.approx(0.2 + 0.3 * (1 - low) / (high - low))
    assert two.pays_above
    assert two.words == f"spd, spd.stages=2: pays from drafters {two.at:.3g}"


def test_what_never_or_always_pays_is_said_so() -> None:
    [worst] = break_evens(swept([2], ["oracle:0.2"]), DRAFTERS)
    [best] = break_evens(swept([2], ["oracle:0.9"]), DRAFTERS)
    assert (worst.at, best.at) == (None, None)
    assert worst.words == "spd: does not pay at any drafters measured"
    assert best.words == "spd: pays at any drafters measured"
