"""The points of a sweep: what differs, what nothing beats, where it pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdbench.judge.metrics.flags import make_flag
from spdbench.judge.sweeps import (
    SweepRow,
    axes_of,
    best_of,
    break_evens,
    costs_of,
    frontier_of,
    numeric_axis,
    series_of,
)
from tests.unit.judge.swept import DRAFTERS, STAGES, swept, with_speedups

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


def test_a_disqualified_row_is_the_best_only_if_all_are() -> None:
    fair, other = with_speedups((1.1, 1.5))
    doubtful = SweepRow(other.settings, replace(other.row, flags=(make_flag("synthetic_drafter", "it is one"),)))
    warned = SweepRow(other.settings, replace(other.row, flags=(make_flag("few_prompts", "only one"),)))
    assert best_of([fair, doubtful]) is fair
    assert best_of([doubtful]) is doubtful
    assert best_of([fair, warned]) is warned


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
    (at,) = two.crossings
    assert at == pytest.approx(0.2 + 0.3 * (1 - low) / (high - low))
    assert not two.pays_first
    assert two.words == f"spd, spd.stages=2: pays from drafters {at:.3g} (measured: 0.2 to 0.9)"


def test_what_never_or_always_pays_is_said_so() -> None:
    [worst] = break_evens(swept([2], ["oracle:0.2"]), DRAFTERS)
    [best] = break_evens(swept([2], ["oracle:0.9"]), DRAFTERS)
    assert (worst.crossings, best.crossings) == ((), ())
    assert worst.words == "spd: never pays at drafters 0.2"
    assert best.words == "spd: always pays at drafters 0.9"


@pytest.mark.parametrize(
    ("speedups", "crossings", "words"),
    [
        ((0.5, 1.5, 0.5, 1.5), (1.5, 2.5, 3.5), "pays from n 1.5 to 2.5 and from n 3.5 (measured: 1 to 4)"),
        ((1.5, 0.5, 1.5, 0.5), (1.5, 2.5, 3.5), "pays up to n 1.5 and from n 2.5 to 3.5 (measured: 1 to 4)"),
        ((1.5, 1.5, 0.5, 0.5), (2.5,), "pays up to n 2.5 (measured: 1 to 4)"),
        ((0.5, 1.0, 0.5, 1.0), (), "never pays at n 1 to 4"),
        ((1.5, 1.1, 1.2, 1.1), (), "always pays at n 1 to 4"),
    ],
)
def test_every_crossing_is_named(speedups: tuple[float, ...], crossings: tuple[float, ...], words: str) -> None:
    [found] = break_evens(with_speedups(speedups), "n")
    assert found.crossings == pytest.approx(crossings)
    assert found.words == f"spd: {words}"


def test_synthetic_drafters_of_two_kinds_are_two_series() -> None:
    rows = [*with_speedups((0.5, 1.5)), *with_speedups((1.5, 0.5))]
    rows = [
        SweepRow({"drafters": f"{kind}:0.{at}"}, row.row)
        for row, kind, at in zip(rows, ("oracle", "oracle", "forced", "forced"), (1, 2, 1, 2), strict=True)
    ]
    assert [each.words for each in break_evens(rows, "drafters")] == [
        "spd, oracle: pays from drafters 0.15 (measured: 0.1 to 0.2)",
        "spd, forced: pays up to drafters 0.15 (measured: 0.1 to 0.2)",
    ]
