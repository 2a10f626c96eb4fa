"""Bubble ratio, its parts and cycle efficiency over many runs, by decode time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.metrics.definitions import CAUSES
from spdbench.judge.results.lanes import BubbleParts, CyclesByFill, FullCycles
from spdbench.judge.results.schema import Run, read_result
from spdbench.judge.results.table import PARTS
from tests.builders import MS, chunk_steps, failed_run, make_backend, make_result, make_run, summarise, write_result

LANE_METRICS = {"bubble_ratio", *PARTS, "cycle_efficiency", "control_s_per_cycle", "draft_slack_s", "cycles_by_fill"}
FIXTURES = Path(__file__).parents[3] / "fixtures" / "results"


def parts(**shares: float) -> BubbleParts:
    return BubbleParts(**(dict.fromkeys(PARTS, 0.0) | shares))


def run(step_ms: int = 10, cycles: FullCycles | None = None, *, prompt: str = "p0", **shares: float) -> Run:
    """Two rounds of `step_ms` each, so a decode time of twice that."""
    steps = chunk_steps([1, 4, 4], step_ns=step_ms * MS)
    category = "code" if step_ms > 10 else "math"
    return make_run(steps, prompt=prompt, category=category, bubble=parts(**shares), full_cycles=cycles)


def overall(*runs: Run) -> dict[str, Any]:
    return summarise(runs, make_backend("draft_verify"), None).overall


def test_the_causes_are_in_the_order_in_which_they_are_charged() -> None:
    assert CAUSES == ("fill", "verify", "draft", "imbalance", "host", "unattributed")


def test_runs_weigh_by_their_decode_time_and_the_mean_stands_beside_it() -> None:
    found = overall(run(10, useful=0.8, draft=0.2), run(30, prompt="p1", useful=0.4, wasted=0.1, draft=0.5))
    assert found["bubble_ratio"] == pytest.approx((0.2 * 20 + 0.5 * 60) / 80)
    assert found["bubble_ratio_macro"] == pytest.approx(0.35)
    assert found["wasted"] == pytest.approx(0.1 * 60 / 80)
    assert found["draft"] == pytest.approx(found["bubble_ratio"])
    assert found["useful"] + found["wasted"] + found["bubble_ratio"] == pytest.approx(1, abs=1e-12)
    low, high = found["bubble_ratio_ci"]
    assert low == pytest.approx(0.2)
    assert high == pytest.approx(0.5)


def test_categories_have_their_own() -> None:
    runs = [run(10, useful=0.8, draft=0.2), run(30, prompt="p1", useful=0.5, host=0.5)]
    by_category = summarise(runs, make_backend("draft_verify"), None).by_category
    assert by_category["math"]["bubble_ratio"] == pytest.approx(0.2)
    assert by_category["code"]["host"] == pytest.approx(0.5)


def test_runs_without_spans_do_not_count() -> None:
    bare = make_run(chunk_steps([1, 4, 4]), prompt="p9")
    assert overall(run(useful=0.8, draft=0.2), bare, failed_run("p8"))["bubble_ratio"] == pytest.approx(0.2)


def test_no_spans_give_nulls_not_zeros() -> None:
    found = overall(make_run(chunk_steps([1, 4, 4])), make_run(chunk_steps([1, 4]), prompt="p1"))
    assert {name for name in LANE_METRICS if found[name] is None} == LANE_METRICS
    assert found["bubble_ratio_macro"] is None
    assert found["bubble_ratio_ci"] is None


def test_cycle_efficiency_is_stage_time_over_wall_time_and_the_rest_is_control() -> None:
    found = overall(
        run(10, FullCycles(num=10, stage_s=0.8, wall_s=1.0), useful=1.0),
        run(10, FullCycles(num=30, stage_s=1.5, wall_s=3.0), prompt="p1", useful=1.0),
        run(10, prompt="p2", useful=1.0),
    )
    assert found["cycle_efficiency"] == pytest.approx(2.3 / 4)
    assert found["control_s_per_cycle"] == pytest.approx(1.7 / 40)
    assert overall(run(useful=1.0))["cycle_efficiency"] is None


def by_fill(num: list[int], wall_s: list[float], drafts: list[int], slack_s: list[float]) -> CyclesByFill:
    return CyclesByFill(num=num, wall_s=wall_s, stage_s=wall_s, drafts=drafts, slack_s=slack_s)


def test_cycles_by_fill_add_up_over_runs_and_the_slack_is_that_of_full_cycles() -> None:
    fills = [
        by_fill([0, 2, 6], [0.0, 0.2, 0.9], [0, 2, 4], [0.0, 9.0, 0.02]),
        by_fill([1, 3, 10], [0.1, 0.3, 1.1], [0, 3, 6], [0.0, 9.0, -0.07]),
    ]
    runs = [run(useful=1.0, prompt=f"p{at}").model_copy(update={"cycles_by_fill": f}) for at, f in enumerate(fills)]
    found = overall(*runs, run(useful=1.0, prompt="older"))
    assert found["cycles_by_fill"] == [1, 5, 16]
    assert found["cycle_s_by_fill"] == pytest.approx([0.1, 0.5, 2.0])
    assert found["draft_slack_s"] == pytest.approx(-0.05 / 10)
    assert found["draft_slack_s_macro"] == pytest.approx((0.02 / 4 - 0.07 / 6) / 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1], [0.1, 0.2], [0], [0.0]), "columns of different length"),
        (([], [], [], []), "columns of different length, or empty"),
        (([1], [0.1], [2], [0.0]), "more drafts than cycles"),
    ],
)
def test_cycles_by_fill_that_cannot_be_are_refused(columns: tuple[Any, Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_fill(*columns)


@pytest.mark.parametrize(("share", "flagged"), [(0.10, False), (0.11, True)])
def test_more_than_a_tenth_unattributed_is_flagged_and_disqualifies(share: float, flagged: bool) -> None:
    runs = [run(prompt=f"p{index}", useful=1 - share, unattributed=share) for index in range(8)]
    names = [flag.name for flag in make_result(runs, make_backend("draft_verify")).flags]
    assert ("unattributed" in names) is flagged


def test_an_old_file_with_parts_and_without_cycles_has_its_bubble_ratio() -> None:
    result = read_result(FIXTURES / "eagle_with_failure.json")
    found = summarise(result.runs, result.backend, None).overall
    assert found["bubble_ratio"] == pytest.approx(0.4)
    assert found["wasted"] == pytest.approx(0.1)
    assert found["cycle_efficiency"] is None


def test_figures_come_back_from_the_file_unchanged(tmp_path: Path) -> None:
    result = make_result([run(10, FullCycles(num=3, stage_s=0.1, wall_s=0.3), useful=0.7, fill=0.3)])
    assert read_result(write_result(result, tmp_path / "a.json")) == result


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"useful": 0.9}, "the shares add up to 0.9, not to 1"),
        ({"useful": 1.5, "host": -0.5}, "less than or equal to 1"),
        ({"useful": float("nan")}, "finite number"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(**shares)
