"""Histories: a run is judged against those before it, a lasting change is found once, machines are told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.judge.gate.calibration import Calibration, calibrate
from spdbench.judge.gate.history import MAX_BASELINES, History, history
from spdbench.judge.loaded import load
from spdbench.judge.results.schema import Result
from tests.builders import failed_run
from tests.unit.judge.gate.histories import NUM_RUNS, PLANTED, history_results, same_code, verdicts


def loaded(found: Mapping[str, Result]) -> list[Any]:
    return [load(result, file) for file, result in found.items()]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(loaded(same_code()))


def made(calibration: Calibration | None, speed: Callable[[int], float], num_runs: int = 8, **more: Any) -> History:
    return history(loaded(history_results(num_runs, speed, **more)), calibration)


@pytest.mark.parametrize("seed", range(3))
def test_planted_regression_is_the_only_one(calibration: Calibration, seed: int) -> None:
    found = history(loaded(history_results(seed=seed)), calibration)
    assert len(found.runs) == NUM_RUNS
    expected = ["first", *["pass"] * (NUM_RUNS - 1)]
    assert verdicts(found.of("vanilla")) == expected
    expected[PLANTED] = "regression"
    assert verdicts(found.of("eagle")) == expected


def test_without_a_calibration_it_is_found_as_well() -> None:
    found = history(loaded(history_results()), None)
    assert [at for at, verdict in enumerate(verdicts(found.of("eagle"))) if verdict == "regression"] == [PLANTED]


def test_a_passing_slowdown_is_a_regression_and_then_an_improvement(calibration: Calibration) -> None:
    found = made(calibration, lambda number: 0.8 if number == 4 else 1.0)
    assert verdicts(found.of("eagle")) == ["first", *["pass"] * 3, "regression", "improved", "pass", "pass"]


def test_slow_drift_adds_up_until_it_is_found(calibration: Calibration) -> None:
    found = verdicts(made(calibration, lambda number: 0.985**number, 16).of("eagle"))
    assert "regression" in found
    assert found.index("regression") > 2


def test_order_is_of_time_whatever_the_files_are_called(calibration: Calibration) -> None:
    results = history_results()
    turned = dict(zip(results, reversed(results.values()), strict=True))
    found = history(loaded(turned), calibration)
    starts = [run.started for run in found.runs]
    assert starts == sorted(starts)
    assert verdicts(found.of("eagle")).index("regression") == PLANTED


def test_times_of_other_zones_are_ordered_as_instants() -> None:
    early, late = history_results(2, lambda _: 1.0, seed=1), history_results(1, lambda _: 1.0, seed=2)
    files = loaded(
        {"b.json": late["quick__draft__smollm2__00.json"], "a.json": early["quick__draft__smollm2__01.json"]}
    )
    moved = [
        load(each.head.model_copy(update={"created": created}), each.file)
        for each, created in zip(files, ["2026-06-02T01:00:00+05:00", "2026-06-01T21:00:00"], strict=True)
    ]
    assert [run.started for run in history(moved, None).runs] == [
        datetime(2026, 6, 1, 20, tzinfo=UTC),
        datetime(2026, 6, 1, 21, tzinfo=UTC),
    ]


def test_change_of_machine_is_a_break_and_no_regression(calibration: Calibration) -> None:
    other = "77ff2c3d4e5f6071"
    found = made(
        calibration,
        lambda number: 0.5 if number >= 4 else 1.0,
        machine=lambda number: other if number >= 4 else calibration.fingerprint,
    )
    assert [run.is_new_machine for run in found.runs] == [number == 4 for number in range(8)]
    assert verdicts(found.of("eagle"))[4] == "first"
    assert "regression" not in verdicts(found.of("eagle"))


def test_runs_back_on_a_machine_are_judged_against_its_own(calibration: Calibration) -> None:
    found = made(
        calibration,
        lambda number: {1: 0.5, 3: 0.8}.get(number, 1.0),
        4,
        machine=lambda number: "77ff2c3d4e5f6071" if number == 1 else calibration.fingerprint,
    )
    assert verdicts(found.of("eagle")) == ["first", "first", "pass", "regression"]


def test_band_is_the_calibrated_one_about_the_mean_of_the_baseline(calibration: Calibration) -> None:
    points = [point for _, point in made(calibration, lambda _: 1.0, 10).of("eagle")]
    assert points[0].speedup_band is None
    [threshold] = [each for each in calibration.thresholds if each.metric == "speedup"]
    for at, point in enumerate(points[1:], start=1):
        band = point.speedup_band
        assert band is not None
        assert band.is_calibrated
        kept = 1 - threshold.slowdown(1, min(at, MAX_BASELINES))
        assert band.floor == pytest.approx(band.baseline * kept)
        assert band.ceiling == pytest.approx(band.baseline / kept)
        assert point.speedup is not None
        assert band.floor < point.speedup < band.ceiling
    before = [point.speedup for point in points[:MAX_BASELINES]]
    assert points[-1].speedup_band is not None
    assert points[-1].speedup_band.baseline == pytest.approx(sum(filter(None, before)) / MAX_BASELINES, rel=1e-3)


def test_band_without_a_calibration_is_the_default(calibration: Calibration) -> None:
    elsewhere = made(calibration, lambda _: 1.0, machine=lambda _: "another")
    for found in (made(None, lambda _: 1.0), elsewhere):
        band = found.of("eagle")[-1][1].speedup_band
        assert band is not None
        assert not band.is_calibrated
        assert band.floor == pytest.approx(0.95 * band.baseline)


def test_incomplete_and_failed_runs_are_part_of_no_baseline(calibration: Calibration) -> None:
    results = history_results(6, lambda _: 1.0)
    drafts = [name for name in results if "draft" in name]
    cut = results[drafts[1]]
    results[drafts[1]] = cut.model_copy(update={"runs": cut.runs[:4]})
    broken = results[drafts[2]]
    results[drafts[2]] = broken.model_copy(update={"runs": [*broken.runs[:-1], failed_run("p9", "writing")]})
    found = history(loaded(results), calibration)
    assert verdicts(found.of("eagle")) == ["first", "not comparable", "regression", "pass", "pass", "pass"]
    against = [point.judgement.against for _, point in found.of("eagle")]
    assert not {drafts[1], drafts[2]} & set(against)


def test_fewer_prompts_are_a_history_of_their_own(calibration: Calibration) -> None:
    results = history_results(6, lambda number: 0.8 if number >= 4 else 1.0)
    for name in (name for name in results if name.endswith("03.json")):
        short = results[name]
        suite = short.suite.model_copy(update={"num_prompts": 4})
        results[name] = short.model_copy(update={"runs": short.runs[:4], "suite": suite})
    found = verdicts(history(loaded(results), calibration).of("eagle"))
    assert found == ["first", "pass", "pass", "first", "regression", "pass"]


def test_one_run_is_the_first_of_each_label() -> None:
    found = made(None, lambda _: 1.0, 1)
    assert [point.verdict for point in found.runs[0].points] == ["first", "first"]
    assert found.runs[0].points[1].speedup is not None


def test_a_first_run_with_a_failure_is_no_first() -> None:
    results = history_results(1)
    name = next(name for name in results if "draft" in name)
    results[name] = results[name].model_copy(update={"runs": [*results[name].runs[:-1], failed_run("p9", "writing")]})
    assert verdicts(history(loaded(results), None).of("eagle")) == ["regression"]


@pytest.mark.parametrize(
    ("more", "why"),
    [({"suite": "other"}, "suite (quick v1, not other v1)"), ({"dtype": "bfloat16"}, "dtype (float32, not bfloat16)")],
)
def test_other_work_is_refused_with_what_differs(more: dict[str, Any], why: str) -> None:
    one, other = history_results(1), history_results(1, **more)
    files = loaded({"a.json": next(iter(one.values())), "b.json": next(iter(other.values()))})
    with pytest.raises(InputError, match=r"a\.json and b\.json did different work") as caught:
        history(files, None)
    assert why in str(caught.value)


@pytest.mark.parametrize("created", ["", "yesterday", "0001-01-01T00:00:00+14:00"])
def test_a_result_without_a_time_is_refused(created: str) -> None:
    name, result = next(iter(history_results(1).items()))
    with pytest.raises(InputError, match=r"created: .* is no time"):
        history([load(result.model_copy(update={"created": created}), name)], None)
