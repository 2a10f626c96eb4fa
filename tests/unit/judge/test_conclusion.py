"""What a comparison concludes of each label: does it pay, how many prompts would show more, what if it had devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spdbench.judge.comparison.compare import compare
from spdbench.judge.conclusion import Conclusion, conclusions
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.metrics import stats
from spdbench.judge.projection.costs import RecordedCosts
from spdbench.judge.projection.project import Setting, project
from spdbench.judge.projection.recorded import sort_results
from spdbench.judge.results.lanes import PartTime, PartTimes
from spdbench.judge.results.schema import Result, Run, RunKey
from spdbench.types import BackendKind
from tests.builders import MS, ORACLE, make_backend, make_result, make_run, vanilla_steps
from tests.unit.judge.projection.projected import BUSY, PARTS, eagle_result, pipeline_result, vanilla_result

Sides = tuple[list[RunKey], NDArray[np.float64], NDArray[np.float64]]


def result(kind: BackendKind, runs: Sequence[Run], drafter: Any = None, **backend: Any) -> LoadedResult:
    made = make_result(list(runs), make_backend(kind, **backend), drafter=drafter)
    return load(made, f"{made.backend.label}.json")


def vanilla(num: int = 10, *step_ms: float) -> LoadedResult:
    steps = step_ms or (20,)
    return result("autoregressive", [decode(f"p{i}", steps[i % len(steps)]) for i in range(num)])


def decode(prompt: str, step_ms: float) -> Run:
    return make_run(vanilla_steps(9, step_ns=round(step_ms * MS)), prompt=prompt)


def other(*step_ms: float, num: int = 10, **more: Any) -> LoadedResult:
    """Plain decoding under another label, whose requests take turns at these times a token."""
    runs = [decode(f"p{i}", step_ms[i % len(step_ms)]) for i in range(num)]
    return result("autoregressive", runs, label="other", **more)


def conclude(*results: LoadedResult) -> Conclusion:
    """What is said of the last of `results`, with the first as baseline."""
    [table] = compare(results, results[0])
    return conclusions(table)[-1]


def test_a_speedup_pays_if_its_interval_lies_above_one_and_not_if_below() -> None:
    assert conclude(vanilla(), other(10, 11)).outcome == "pays"
    assert conclude(vanilla(), other(40, 41)).outcome == "slower"
    assert conclude(vanilla(), other(18, 22)).outcome == "no difference shown"


def test_the_baseline_and_a_label_that_pairs_with_nothing_have_no_speedup_to_speak_of() -> None:
    [table] = compare([vanilla(), other(10)], "vanilla")
    base = conclusions(table)[0]
    assert (base.outcome, base.num_prompts) == ("baseline", 10)
    assert base.tokens_per_s == pytest.approx(50)
    stranger = result("autoregressive", [decode("elsewhere", 10)], label="other")
    assert conclude(vanilla(), stranger).outcome == "no pair"
    [table] = compare([spd()])
    assert conclusions(table)[0].outcome == "no baseline"


def test_one_prompt_has_a_speedup_without_interval() -> None:
    found = conclude(vanilla(1), other(10, num=1))
    assert (found.outcome, found.interval) == ("no interval", None)
    assert found.speedup == pytest.approx(2.0)


def test_flags_disqualify_and_raise_doubts() -> None:
    few = conclude(vanilla(4), other(10, num=4, lossy=True))
    assert (few.disqualified_by, few.doubts) == (("lossy",), ("few_prompts",))
    assert conclude(vanilla(), other(10)).doubts == ()


def test_several_devices_have_their_share_of_the_speedup() -> None:
    assert conclude(vanilla(), other(10)).speedup_per_device is None
    assert conclude(vanilla(), other(10, num_devices=4)).speedup_per_device == pytest.approx(0.5)


# How many prompts would show 5 %


def sides(rng: np.random.Generator, num: int, *, sigma: float, speedup: float = 1.0) -> Sides:
    """Runs of a speed-up whose prompts differ by `sigma` on the log scale, with that mean, and in length as well."""
    tokens = rng.integers(20, 60, num).astype(float)
    seconds = tokens * np.exp(rng.normal(-np.log(speedup) - sigma**2 / 2, sigma, num))
    return [(f"p{i}", 0, 0) for i in range(num)], np.stack([tokens] * 2, axis=1), np.stack([tokens, seconds], axis=1)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.15])
def test_as_many_prompts_as_it_says_show_the_difference_four_times_in_five(sigma: float) -> None:
    rng = np.random.default_rng(3)
    spread = stats.spread_of_log_ratio(*sides(rng, 2000, sigma=sigma))
    assert spread is not None
    num = stats.prompts_to_show(0.05, spread)
    found = [
        stats.ratio_interval(*sides(rng, num, sigma=sigma, speedup=1.05), resamples=400, seed=1) for _ in range(400)
    ]
    shown = np.mean([interval is not None and interval[0] > 1 for interval in found])
    assert shown == pytest.approx(stats.POWER, abs=0.08)


def test_the_spread_does_not_depend_on_how_many_were_measured() -> None:
    rng = np.random.default_rng(5)
    squares = [
        np.mean([(stats.spread_of_log_ratio(*sides(rng, num, sigma=0.1)) or 0) ** 2 for _ in range(2000 // num)])
        for num in (4, 20, 100)
    ]
    assert max(squares) / min(squares) < 1.25


def test_the_spread_is_the_error_that_resampling_finds() -> None:
    keys, first, second = sides(np.random.default_rng(7), 60, sigma=0.2)
    spread = stats.spread_of_log_ratio(keys, first, second)
    interval = stats.ratio_interval(keys, first, second)
    assert spread is not None
    assert interval is not None
    assert np.log(interval[1] / interval[0]) / 4 == pytest.approx(spread / np.sqrt(60), rel=0.1)


def test_repeats_of_a_prompt_are_one_conversation_and_one_has_no_spread() -> None:
    rows = np.array([[10.0, 1.0], [10.0, 3.0]])
    assert stats.spread_of_log_ratio([("a", 0, 0), ("a", 0, 1)], rows, rows) is None
    assert stats.spread_of_log_ratio([("a", 0, 0), ("b", 0, 0)], rows, rows) == 0
    assert stats.spread_of_log_ratio([("a", 0, 0), ("b", 0, 0)], rows * 0, rows) is None


def test_twice_the_spread_takes_four_times_the_prompts() -> None:
    assert stats.prompts_to_show(0.05, 0.4) / stats.prompts_to_show(0.05, 0.2) == pytest.approx(4, rel=0.05)
    assert stats.prompts_to_show(0.05, 0.0) == 2


def test_the_number_of_prompts_is_given_only_where_no_difference_is_shown() -> None:
    assert conclude(vanilla(), other(10, 11)).num_prompts_to_show is None
    found = conclude(vanilla(), other(18, 22)).num_prompts_to_show
    assert found is not None
    assert 10 < found < 100


# If each stage and the drafter had a device


def spd(parts: PartTimes | None = PARTS, **more: Any) -> LoadedResult:
    """Three stages on one device, with recorded times of their parts."""
    return load(pipeline_result(parts=parts, **more), "spd.json")


def with_runs(result: Result, **more: Any) -> LoadedResult:
    """`result` with these fields in each of its runs."""
    runs = [run.model_copy(update=more) for run in result.runs]
    return load(result.model_copy(update={"runs": runs}), f"{result.backend.label}.json")


def starved(layer_s: float, **backend: Any) -> LoadedResult:
    """Whose 300 layers took `layer_s` each, and whose drafts took 20 ms."""
    slow = {"layer": PartTime(num=300, s=300 * layer_s), "draft": PartTime(num=10, s=0.2)}
    return with_runs(pipeline_result(backend=backend), parts=PARTS.model_copy(update=slow))


def test_with_devices_a_pipeline_is_as_fast_as_its_projection_says() -> None:
    plain, rounds = load(vanilla_result(), "vanilla.json"), load(eagle_result(), "eagle.json")
    [table] = compare([plain, spd(), rounds], plain)
    found = conclusions(table)[1].own_devices
    recorded = sort_results([plain, spd(), rounds])
    [row] = project(recorded, RecordedCosts(recorded), Setting(((10, 10, 10),), own_drafter=True)).pipelines
    assert found is not None
    assert found.interval is not None
    assert (found.speedup, *found.interval) == pytest.approx((row.speedup, *(row.speedup_interval or ())))
    assert found.interval[0] < found.speedup < found.interval[1]
    assert found.num_stages == 3


def test_a_draft_is_taken_to_have_waited_as_long_as_the_layers_next_to_it() -> None:
    """Vanilla's layers take 3 ms, the pipeline's 30: a draft of 20 ms took 2."""
    plain = load(vanilla_result(), "vanilla.json")
    costs = [RecordedCosts(sort_results([plain, each])) for each in (starved(0.003), starved(0.03))]
    drafts = [each.pipeline_draft_s(each.recorded.pipelines[0], 3) for each in costs]
    assert drafts == pytest.approx([0.02, 0.002])
    assert [each.verify_s(each.recorded.pipelines[0]) for each in costs] == pytest.approx([1e-4, 1e-5])
    told = ["\n".join(each.notes) for each in costs]
    assert ["stages shared devices" in each for each in told] == [False, True]
    assert "(spd 10.0x)" in told[1]
    apart = starved(0.03, num_devices=3)
    assert RecordedCosts(sort_results([plain, apart])).pipeline_draft_s(apart, 3) == pytest.approx(0.02)


def test_without_times_of_drafts_or_messages_it_is_a_bound() -> None:
    found = conclude(load(vanilla_result(), "vanilla.json"), spd(parts=None)).own_devices
    assert found is not None
    assert found.is_bound
    synthetic = conclude(load(vanilla_result(), "vanilla.json"), spd(drafter=ORACLE)).own_devices
    assert synthetic is not None
    assert synthetic.is_bound
    timed = with_runs(pipeline_result(), bubble=BUSY.model_copy(update={"useful": 0.5, "host": 0.5}))
    measured = conclude(load(vanilla_result(), "vanilla.json"), timed).own_devices
    assert measured is not None
    assert not measured.is_bound
    assert measured.speedup < found.speedup


def test_one_prompt_gives_an_estimate_without_interval() -> None:
    alone = [each.model_copy(update={"runs": each.runs[:1]}) for each in (vanilla_result(), pipeline_result())]
    found = conclude(*(load(each, f"{each.backend.label}.json") for each in alone)).own_devices
    assert found is not None
    assert found.interval is None


def test_there_is_no_what_if_where_stages_have_devices_or_where_there_are_none() -> None:
    plain = load(vanilla_result(), "vanilla.json")
    assert conclude(plain, spd(backend={"num_devices": 3})).own_devices is None
    assert conclude(plain, load(eagle_result(), "eagle.json")).own_devices is None
    assert conclude(spd(), spd(backend={"label": "ppsd"})).own_devices is None, "the baseline is no plain decoding"


@pytest.mark.parametrize("lane_bytes", [[0, 0, 0], [60, 60]])
def test_stages_whose_bytes_are_not_those_of_their_layers_give_no_estimate(lane_bytes: list[int]) -> None:
    plain = load(vanilla_result(), "vanilla.json")
    assert conclude(plain, spd(backend={"lane_bytes": lane_bytes})).own_devices is None


def test_branches_of_stages_without_known_layers_give_no_estimate() -> None:
    plain = load(vanilla_result(), "vanilla.json")
    unknown = spd(backend={"stage_layers": [0, 0, 0], "chosen": {"max_rows": "7"}})
    assert conclude(plain, unknown).own_devices is None


def test_a_method_without_steps_next_to_it_leaves_the_estimate() -> None:
    plain, failed = load(vanilla_result(), "vanilla.json"), eagle_result()
    runs = [run.model_copy(update={"finish_reason": "error", "error": "it broke"}) for run in failed.runs]
    [table] = compare([plain, spd(), load(failed.model_copy(update={"runs": runs}), "eagle.json")], plain)
    assert conclusions(table)[1].own_devices is not None


def test_the_estimate_is_over_the_prompts_that_pair() -> None:
    fewer = vanilla_result()
    plain = load(fewer.model_copy(update={"runs": fewer.runs[:2]}), "vanilla.json")
    both = pipeline_result()
    only = load(both.model_copy(update={"runs": both.runs[:2]}), "spd.json")
    found, alone = conclude(plain, spd()).own_devices, conclude(plain, only).own_devices
    assert found is not None
    assert alone is not None
    assert found.speedup == pytest.approx(alone.speedup, rel=0.02)  # the third prompt's parts still count
