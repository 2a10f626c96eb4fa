"""The timing gate: the speed-up of a run over its own plain decoding, by size and interval."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.judge.gate.calibration import MIN_RUNS, calibrate
from spdbench.judge.gate.timing import decide
from spdbench.judge.gate.verdict import GateVerdict
from spdbench.judge.loaded import LoadedResult
from tests.builders import MS, make_load
from tests.unit.judge.gate.gates import drafted_runs, eagle, finding, judged, of, only, plain, plain_runs


def run(plain_ms: float = 20, eagle_ms: float = 20, num_prompts: int = 10, **more: Any) -> list[LoadedResult]:
    """One run of two labels."""
    return [
        plain(plain_runs(num_prompts, step_ns=round(plain_ms * MS)), **more),
        eagle(drafted_runs(num_prompts, step_ns=lambda _: round(eagle_ms * MS)), **more),
    ]


CALIBRATED = calibrate([each for _ in range(MIN_RUNS) for each in run()])
"""For both labels, of a machine without noise."""


def speedup(new: list[LoadedResult], old: list[LoadedResult], **limits: float) -> GateVerdict:
    return finding(of(judged(new, old, "timing", **limits), "eagle"), "speedup").verdict


@pytest.mark.parametrize(
    ("change", "interval", "verdict"),
    [
        (0.90, (0.85, 0.97), "regression"),
        (0.94, (0.90, 1.00), "inconclusive"),
        (0.96, (0.91, 0.99), "pass"),
        (0.96, (0.90, 1.03), "inconclusive"),
        (1.00, (0.91, 1.10), "pass"),
        (1.04, (1.01, 1.07), "pass"),
        (1.06, (0.99, 1.12), "pass"),
        (1.06, (1.02, 1.12), "improved"),
        (1.20, (0.80, 1.60), "inconclusive"),
        (1.00, None, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_the_table_of_decisions(
    change: float | None, interval: tuple[float, float] | None, verdict: GateVerdict
) -> None:
    assert decide(change, interval, 0.05)[0] == verdict


@given(st.floats(0.3, 3), st.floats(0, 0.7), st.floats(0, 0.7), st.floats(0, 0.3))
def test_swapped_sides_mirror_regression_and_improvement(change: float, down: float, up: float, share: float) -> None:
    low, high = change * (1 - down), change * (1 + up)
    there, back = decide(change, (low, high), share)[0], decide(1 / change, (1 / high, 1 / low), share)[0]
    edge = 1e-9
    if min(abs(change - (1 - share)), abs(change * (1 - share) - 1), abs(low - 1), abs(high - 1)) < edge:
        return
    assert (there == "regression") == (back == "improved")
    assert (there == "improved") == (back == "regression")


@given(st.floats(0.5, 1), st.floats(0, 0.5), st.floats(0.01, 0.3))
def test_a_faster_result_is_never_a_regression(slower: float, width: float, share: float) -> None:
    change = 1 / slower
    assert decide(change, (change - width, change + width), share)[0] != "regression"


def test_slower_than_allowed_is_a_regression_and_the_other_way_round_an_improvement() -> None:
    assert speedup(run(eagle_ms=22), run()) == "regression"
    assert speedup(run(), run(eagle_ms=22)) == "improved"
    assert speedup(run(eagle_ms=22), run(), max_slowdown=0.2) == "pass"


def test_a_machine_that_slows_all_alike_has_slowed_nothing() -> None:
    found = judged(run(30, 30), run(), "timing")
    eagles = of(found, "eagle")
    assert finding(eagles, "speedup").verdict == "pass"
    assert finding(eagles, "decode_tokens_per_s").verdict == "regression"
    assert not finding(eagles, "decode_tokens_per_s").decides
    assert [each.verdict for each in found] == ["pass", "pass"]


@pytest.mark.parametrize("factor", [3, 1 / 3])
def test_machine_in_another_state_gives_no_word_of_a_difference(factor: float) -> None:
    for eagle_ms in (25, 16):
        found = finding(of(judged(run(20 * factor, eagle_ms * factor), run(), "timing"), "eagle"), "speedup")
        assert found.verdict == "inconclusive"
        assert "plain decoding itself" in found.reason
    assert speedup(run(20 * factor, 20 * factor), run()) == "pass"


def test_the_speedups_are_shown_with_their_change_and_interval() -> None:
    found = finding(of(judged(run(eagle_ms=25), run(), "timing"), "eagle"), "speedup")
    assert found.before == pytest.approx(3.0)
    assert found.now == pytest.approx(2.4)
    assert found.change == pytest.approx(0.8)
    assert found.interval == pytest.approx((0.8, 0.8))


def test_noise_between_prompts_is_inconclusive() -> None:
    noisy = [plain(), eagle(drafted_runs(step_ns=lambda i: (14 + 17 * (i % 2)) * MS))]
    assert speedup(noisy, run()) == "inconclusive"


def test_one_conversation_is_inconclusive() -> None:
    assert speedup(run(num_prompts=1), run(num_prompts=1)) == "inconclusive"


# Machines


@pytest.mark.parametrize("machine", ["machine-b", None])
def test_another_machine_is_not_comparable(machine: str | None) -> None:
    for found in judged(run(machine=machine), run(), "timing"):
        assert found.verdict == "not comparable"
        assert "--gate exact" in found.findings[-1].reason


def test_other_devices_are_not_comparable() -> None:
    assert only(judged(eagle(devices=["cuda:0"]), eagle(), "timing")).verdict == "not comparable"


# Several baselines


def test_speed_is_held_against_all_baselines_together() -> None:
    """One of them was lucky; beside both together the new run is as fast as ever."""
    lucky, usual = (begun(f"2026-06-0{n}T12:00:00+00:00", n, eagle_ms=ms) for n, ms in ((2, 18.5), (1, 21)))
    new = begun("2026-06-03T12:00:00+00:00", 3, eagle_ms=20)
    assert of(judged(new, lucky, "timing"), "eagle").verdict == "regression"
    found = of(judged(new, [*lucky, *usual], "timing"), "eagle")
    assert found.verdict == "pass"
    assert finding(found, "speedup").before == pytest.approx(60 / (18.5 + 21) * 2)
    assert "2 results" in found.notes[0]


def test_new_results_of_a_label_count_together() -> None:
    """One of them was unlucky; together they are as fast as ever."""
    unlucky, usual = (begun(f"2026-06-0{n}T12:00:00+00:00", n, eagle_ms=ms) for n, ms in ((2, 21.5), (3, 19)))
    assert of(judged(unlucky, run(), "timing"), "eagle").verdict == "regression"
    found = judged([*unlucky, *usual], run(), "timing")
    older, newest = (each for each in found if each.label == "eagle")
    assert "speedup" not in {each.metric for each in older.findings}
    assert "together" in older.notes[0]
    assert newest.verdict == older.verdict == "pass"
    assert finding(newest, "speedup").now == pytest.approx(60 / (21.5 + 19) * 2)
    assert "2 new results" in newest.notes[0]


@pytest.mark.parametrize("other", [{"machine": "b"}, {"num_prompts": 8}])
def test_baselines_of_other_machines_or_without_all_prompts_are_left_out(other: dict[str, Any]) -> None:
    found = of(
        judged(run(), [*run(), *run(eagle_ms=5, created="2026-01-01T00:00:00+00:00", **other)], "timing"), "eagle"
    )
    assert finding(found, "speedup").verdict == "pass"


def test_where_only_an_incomplete_baseline_is_of_this_machine_speed_is_not_comparable() -> None:
    older = run(num_prompts=8, created="2026-01-01T00:00:00+00:00")
    found = of(judged(run(), [*run(machine="b"), *older], "timing"), "eagle")
    assert finding(found, "speedup").verdict == "not comparable"
    assert "all the prompts" in finding(found, "speedup").reason


def test_a_baseline_with_a_prompt_too_many_counts_as_well() -> None:
    more = run(num_prompts=11, created="2026-01-01T00:00:00+00:00")
    assert "2 results" in of(judged(run(), [*run(), *more], "timing"), "eagle").notes[0]


def test_a_short_new_result_hides_no_regression_of_whole_ones() -> None:
    slow = begun("2026-06-01T12:00:00+00:00", eagle_ms=26)
    short = run(num_prompts=1, created="2026-06-02T12:00:00+00:00")
    found = judged([*slow, *short], run(), "timing")
    assert "regression" in {each.verdict for each in found}


def machines() -> list[LoadedResult]:
    """A run on each of two machines, of which the second decodes plainly in half the time."""
    return [
        *run(machine="a", created="2026-06-02T12:00:00+00:00"),
        *run(machine="b", created="2026-06-01T12:00:00+00:00", plain_ms=10),
    ]


@pytest.mark.parametrize("first", [0, 2])
def test_new_results_of_several_machines_are_judged_machine_by_machine(first: int) -> None:
    """Together their speed-ups would be of no machine."""
    new, old = machines(), machines()
    found = judged([*new[first:], *new[:first]], old, "timing")
    assert [each.verdict for each in found] == ["pass"] * 4
    assert len([each for each in found for one in each.findings if one.metric == "speedup"]) == 2


@pytest.mark.parametrize("known", [0, 1])
def test_a_new_result_of_a_machine_without_baseline_is_not_comparable_beside_one_with(known: int) -> None:
    new = machines()
    found = judged(new, new[2 * known : 2 * known + 2], "timing")
    words = [each.verdict for each in found]
    assert words[2 * known : 2 * known + 2] == ["pass", "pass"]
    assert words.count("not comparable") == 2


def test_a_new_result_without_plain_decoding_beside_others_with_it_is_judged_by_itself() -> None:
    usual = begun("2026-06-01T12:00:00+00:00")
    slow = begun("2026-06-02T12:00:00+00:00", 2.0, eagle_ms=29)[1]
    paired, lone = (each for each in judged([*usual, slow], run(), "timing") if each.label == "eagle")
    assert paired.verdict == "pass"
    assert finding(paired, "speedup").verdict == "pass"
    assert lone.verdict == finding(lone, "decode_tokens_per_s").verdict == "inconclusive"
    assert "so tokens/s decide" in lone.notes[0]


# Which plain decoding


def begun(at: str, bandwidth: float = 1.0, **times: Any) -> list[LoadedResult]:
    environment = {"fingerprint": "machine-a", "read_bandwidth_bytes_per_s": bandwidth * 30e9}
    return run(**times, created=at, environment=environment)


def test_each_result_is_held_against_the_plain_decoding_of_its_own_run() -> None:
    """The second run's machine was half as fast: by the first one's plain decoding eagle would look slow."""
    new = [*begun("2026-06-01T12:00:00+00:00"), *begun("2026-06-01T12:05:00+00:00", 2.0, plain_ms=40, eagle_ms=40)]
    found = judged(new, run(), "timing")
    assert [each.verdict for each in found] == ["pass"] * 4


def test_where_environments_are_equal_the_plain_decoding_begun_at_the_same_time_counts() -> None:
    new = [*begun("2026-06-01T12:00:01+00:00"), *begun("2026-06-01T12:05:00+00:00", plain_ms=40, eagle_ms=40)]
    assert [each.verdict for each in judged(new, run(), "timing")] == ["pass"] * 4


def test_without_plain_decoding_on_both_sides_tokens_per_s_decide_and_that_is_said() -> None:
    for new, old in ((run(eagle_ms=25)[1:], run()[1:]), (run(eagle_ms=25)[1:], run())):
        found = of(judged(new, old, "timing", calibration=CALIBRATED), "eagle")
        assert found.verdict == "regression"
        assert [each.metric for each in found.findings if each.verdict == "regression"] == ["decode_tokens_per_s"]
        assert "so tokens/s decide" in found.notes[0]


@pytest.mark.parametrize("limits", [{}, {"max_slowdown": 0.05}])
@pytest.mark.parametrize("ms", [10, 14, 30, 60])
def test_without_a_calibration_tokens_per_s_alone_decide_nothing(ms: float, limits: dict[str, float]) -> None:
    """The machine may have become faster or slower, and nothing shows whether it has."""
    found = of(judged(run(eagle_ms=ms)[1:], run()[1:], "timing", **limits), "eagle")
    assert found.verdict == "inconclusive"
    assert "--calibrate" in finding(found, "decode_tokens_per_s").reason
    assert of(judged(run()[1:], run()[1:], "timing", **limits), "eagle").verdict == "pass"


@pytest.mark.parametrize(("bandwidth", "verdict"), [(0.6, "inconclusive"), (1.0, "regression"), (1.7, "regression")])
def test_calibrated_tokens_per_s_are_no_regression_where_memory_became_slower_as_well(
    bandwidth: float, verdict: GateVerdict
) -> None:
    new = begun("2026-06-02T12:00:00+00:00", bandwidth, eagle_ms=29)[1:]
    old = begun("2026-06-01T12:00:00+00:00")[1:]
    assert only(judged(new, old, "timing", calibration=CALIBRATED)).verdict == verdict


def test_a_slowdown_that_starts_of_the_same_code_may_show_is_inconclusive_by_default() -> None:
    """Its interval lies below 1, and would reach 1 - s if it were twice as wide."""
    new = [plain(), eagle(drafted_runs(step_ns=lambda i: (20 + i % 5) * MS))]
    found = finding(of(judged(new, run(), "timing"), "eagle"), "speedup")
    assert found.verdict == "inconclusive"
    assert "--calibrate" in found.reason
    assert speedup(new, run(), max_slowdown=0.05) == "regression"


@pytest.mark.parametrize(
    ("was", "is_now", "verdict"),
    [(0.0, 0.5, "inconclusive"), (0.5, 0.0, "inconclusive"), (None, 0.5, "inconclusive"), (0.3, 0.32, "regression")],
)
def test_a_machine_that_others_kept_busy_gives_no_word_of_a_difference(
    was: float | None, is_now: float, verdict: GateVerdict
) -> None:
    def side(share: float | None, eagle_ms: float) -> list[LoadedResult]:
        load = None if share is None else make_load(share, who=["make"])
        drafted = drafted_runs(step_ns=lambda _: round(eagle_ms * MS), machine=load)
        return [plain(plain_runs(machine=load)), eagle(drafted)]

    found = of(judged(side(is_now, 26), side(was, 20), "timing"), "eagle")
    assert finding(found, "speedup").verdict == verdict
    if is_now > 0.05:
        assert any(note.startswith("busy_machine: other processes (make) took") for note in found.notes)


def test_plain_decoding_that_others_are_held_against_only_informs_and_alone_it_decides() -> None:
    slow = run(plain_ms=30)
    assert of(judged(slow, run(), "timing"), "vanilla").verdict == "pass"
    assert only(judged(slow[:1], run()[:1], "timing", calibration=CALIBRATED)).verdict == "regression"


def test_other_plain_decoding_is_held_against_vanilla() -> None:
    def side(ms: int) -> list[LoadedResult]:
        return [plain(plain_runs(step_ns=ms * MS), label="another", name="other"), plain()]

    found = judged(side(25), side(20), "timing")
    assert finding(of(found, "another"), "speedup").verdict == "regression"
    assert of(found, "vanilla").verdict == "pass"
