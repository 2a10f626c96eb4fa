"""Verdicts on labels: what belongs together, what decides, what is never a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdbench.judge.gate.calibration import Calibration, Threshold, slowdown, work_of
from spdbench.judge.gate.verdict import EXIT_CODES, GateVerdict, verdict_of, worst
from spdbench.judge.results.schema import Divergence
from tests.builders import MS, failed_run, make_run, vanilla_steps
from tests.unit.judge.gate.gates import drafted_runs, eagle, finding, judged, of, only, plain, plain_runs


def test_a_result_against_itself_passes_every_gate() -> None:
    run = [plain(), eagle()]
    found = judged(run, run, by_category=True)
    assert verdict_of(found) == "pass"
    assert {each.metric for each in of(found, "eagle").findings} >= {"num_steps", "acceptance_length", "speedup"}


@settings(max_examples=20)
@given(st.lists(st.integers(5, 40), min_size=2, max_size=8), st.integers(5, 40))
def test_any_result_against_itself_passes_every_gate(step_ms: list[int], plain_ms: int) -> None:
    count = len(step_ms)
    run = [
        plain(plain_runs(count, step_ns=plain_ms * MS)),
        eagle(drafted_runs(count, step_ns=lambda i: step_ms[i] * MS)),
    ]
    assert verdict_of(judged(run, run)) == "pass"


# The baseline's result of the same label and work


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"suite": "gsm8k"}, "suite (quick v1, not gsm8k v1)"),
        ({"dtype": "bfloat16"}, "dtype (float32, not bfloat16)"),
        ({"temperature": 0.7}, "decoding (temperature 0.0, not 0.7)"),
    ],
)
@pytest.mark.parametrize("gate", ["exact", "timing"])
def test_other_work_is_not_comparable(other: dict[str, Any], words: str, gate: str) -> None:
    found = only(judged(eagle(), eagle(**other), gate))
    assert found.verdict == "not comparable"
    assert words in found.findings[0].reason


def test_another_model_is_not_comparable() -> None:
    old = eagle()
    other = old.head.model.model_copy(update={"id": "other", "sha256": "o" * 64})
    found = only(judged(eagle(), replace(old, head=old.head.model_copy(update={"model": other}))))
    assert found.verdict == "not comparable"
    assert "model (smollm2, not other)" in found.findings[0].reason


def test_label_of_another_kind_is_not_comparable() -> None:
    found = only(judged(eagle(label="mine"), plain(label="mine"), "exact"))
    assert found.verdict == "not comparable"
    assert "kind draft_verify now, and was one of kind autoregressive" in found.findings[0].reason


def test_label_that_the_baseline_lacks_is_not_comparable() -> None:
    found = judged([plain(), eagle()], plain(), "exact")
    assert [each.verdict for each in found] == ["pass", "not comparable"]
    assert "the baseline has no label 'eagle', only vanilla" in of(found, "eagle").findings[0].reason


def test_label_that_the_new_results_lack_is_not_comparable() -> None:
    found = judged(plain(), [plain(), eagle()], "exact")
    assert of(found, "eagle").verdict == "not comparable"
    assert of(found, "eagle").file is None


def test_baselines_of_work_that_nobody_did_are_not_missed() -> None:
    assert verdict_of(judged(eagle(), [eagle(), plain(dtype="bfloat16")], "exact")) == "pass"


def test_of_several_baselines_the_newest_says_what_ids_and_steps_should_be() -> None:
    other = eagle(drafted_runs(chunks=lambda _: (1, 5, 4)), file="a.json", created="2026-06-02T12:00:00+00:00")
    found = only(judged(eagle(), [eagle(file="b.json", created="2026-06-01T12:00:00+00:00"), other], "exact"))
    assert found.against == "a.json"
    assert found.verdict == "regression"


def test_label_that_several_baselines_have_is_missing_once() -> None:
    found = judged(plain(), [plain(), eagle(file="a.json"), eagle(file="b.json")], "exact")
    assert [each.label for each in found] == ["vanilla", "eagle"]


def test_several_new_results_of_one_label_are_all_judged() -> None:
    wrong = drafted_runs(ids=lambda i: [7] * 10 if i == 3 else None)
    found = judged([eagle(file="1.json"), eagle(wrong, file="2.json")], eagle(), "exact")
    assert [each.verdict for each in found] == ["pass", "regression"]


def test_what_changed_beside_the_numbers_is_noted() -> None:
    new = eagle(options={"depth": 5}, chosen={"tree": "chain"})
    notes = only(judged(new, eagle(options={"depth": 4}, chosen={"tree": "static"}), "exact")).notes
    assert notes == (
        "option depth is 5 now and was 4",
        "it chose tree chain for itself, and static before; set what it is to use with -o",
    )


# Prompts


@pytest.mark.parametrize("gate", ["exact", "timing"])
@pytest.mark.parametrize(("new", "old"), [(9, 10), (10, 9)])
def test_prompt_missing_on_either_side_is_not_comparable(new: int, old: int, gate: str) -> None:
    found = only(judged(eagle(drafted_runs(new)), eagle(drafted_runs(old)), gate))
    assert finding(found, "paired_runs").verdict == "not comparable"
    assert "such as p9" in finding(found, "paired_runs").reason
    assert found.verdict == "not comparable"


def test_runs_that_were_both_interrupted_are_not_comparable() -> None:
    found = only(judged(eagle(num_prompts=40), eagle(num_prompts=40), "exact"))
    assert found.verdict == "not comparable"
    assert "10 of the 40 conversations" in finding(found, "paired_runs").reason
    assert "--resume" in finding(found, "paired_runs").reason


def test_failed_prompt_is_a_regression_in_every_gate() -> None:
    failed = [*drafted_runs(9), failed_run("p9", "writing")]
    for gate in ("exact", "timing", "all"):
        found = only(judged(eagle(failed), eagle(), gate))
        assert found.verdict == "regression"
        assert finding(found, "failed_runs").reason == "1 of 10 runs failed; p9: RuntimeError: out of memory"


def test_prompt_that_failed_in_the_baseline_only_is_not_comparable() -> None:
    found = only(judged(eagle(), eagle([*drafted_runs(9), failed_run("p9", "writing")]), "exact"))
    assert found.verdict == "not comparable"


def test_nothing_but_failures_is_a_regression() -> None:
    assert verdict_of(judged(eagle([failed_run()]), eagle(drafted_runs(1)))) == "regression"


def test_result_without_any_run_is_not_comparable() -> None:
    for new, old in ((eagle([]), eagle()), (eagle(), eagle([])), (eagle([]), eagle([]))):
        assert verdict_of(judged(new, old)) == "not comparable"


def test_another_prompt_under_the_same_name_is_not_comparable() -> None:
    other = [make_run(prompt=f"p{i}", prompt_sha256="0" * 64) for i in range(10)]
    found = only(judged(plain(other), plain(plain_runs()), "exact"))
    assert found.verdict == "not comparable"


def two_turns(context: str | None = None) -> list[Any]:
    later = [make_run(vanilla_steps(10), prompt=f"p{i}", turn=1, prompt_sha256=context) for i in range(10)]
    return [*plain_runs(), *later]


def test_later_turn_in_another_context_is_excused_where_ids_may_differ_only() -> None:
    for dtype, verdict in (("bfloat16", "pass"), ("float32", "not comparable")):
        new, old = plain(two_turns("0" * 64), dtype=dtype), plain(two_turns(), dtype=dtype)
        found = only(judged(new, old, "exact"))
        assert found.verdict == verdict
    assert "10 runs with another prompt" in finding(found, "paired_runs").reason


# Exit codes


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([], 0),
        (["pass", "improved"], 0),
        (["pass", "inconclusive"], 3),
        (["inconclusive", "not comparable"], 4),
        (["inconclusive", "not comparable", "regression"], 1),
    ],
)
def test_the_worst_verdict_gives_the_exit_code(verdicts: list[GateVerdict], code: int) -> None:
    assert EXIT_CODES[worst(verdicts)] == code


def test_categories_inform_and_do_not_decide() -> None:
    slow = drafted_runs(20, step_ns=lambda i: (22 if i % 2 else 18) * MS)
    run = [plain(plain_runs(20)), eagle(slow)]
    found = judged(run, [plain(plain_runs(20)), eagle(drafted_runs(20))], "timing", by_category=True)
    assert finding(of(found, "eagle"), "speedup", "writing").verdict == "regression"
    assert finding(of(found, "eagle"), "speedup", "math").verdict == "improved"
    assert finding(of(found, "eagle"), "speedup").verdict == "pass"
    assert verdict_of(found) == "pass"


def test_what_a_result_has_lost_beside_its_numbers_is_noted() -> None:
    compared = Divergence(identical=10, ties=0, near_ties=0, real=0, unclassified=0)
    notes = only(judged(eagle(lossy=True), eagle(divergence=compared), "exact")).notes
    assert "it is lossy now" in notes[0]
    assert "did not compare its outputs with plain decoding's" in notes[1]


# What may be lost


def calibration(fingerprint: str = "machine-a", *, max_slowdown: float = 0.08) -> Calibration:
    words = {"suite": "quick", "label": "eagle", "model": "smollm2", "dtype": "float32", "work": work_of(eagle().head)}
    found = Threshold(metric="speedup", num_runs=5, spread=0.01, max_slowdown=max_slowdown, **words)
    return Calibration(schema="spdbench.calibration/1", created="now", fingerprint=fingerprint, thresholds=[found])


def allowed(**limits: Any) -> tuple[float | None, tuple[str, ...]]:
    run = [plain(), eagle()]
    found = of(judged(run, run, "timing", **limits), "eagle")
    return finding(found, "speedup").allowed, found.notes


def test_given_slowdown_wins_over_the_calibration_and_that_over_the_default() -> None:
    share, notes = allowed()
    assert share == 0.05
    assert "5% is allowed by default, as there is no calibration.json" in notes[0]
    assert allowed(calibration=calibration()) == (slowdown(0.01, 5, 1, 1), ())
    assert allowed(calibration=calibration(), max_slowdown=0.02) == (0.02, ())


def test_a_calibration_that_allows_almost_everything_is_noted() -> None:
    [note] = allowed(calibration=calibration(max_slowdown=0.86))[1]
    assert note.startswith("calibration.json takes a slowdown of one run by up to 86% for noise")
    assert allowed(calibration=calibration(max_slowdown=0.86), max_slowdown=0.02) == (0.02, ())


def test_calibration_of_other_decoding_is_not_used() -> None:
    """Greedy and sampled decoding of one label differ in noise."""
    run = [plain(temperature=1.0), eagle(temperature=1.0)]
    found = of(judged(run, run, "timing", calibration=calibration()), "eagle")
    assert finding(found, "speedup").allowed == 0.05
    assert "holds nothing for a result like this one" in found.notes[0]


@pytest.mark.parametrize(("num_answers", "used"), [(None, True), (10, True), (11, False)])
def test_calibration_of_longer_runs_is_not_used(num_answers: int | None, *, used: bool) -> None:
    longer = calibration()
    [threshold] = longer.thresholds
    thresholds = [threshold.model_copy(update={"num_answers": num_answers})]
    share, notes = allowed(calibration=longer.model_copy(update={"thresholds": thresholds}))
    assert (share != 0.05) == (notes == ()) == used


def test_plain_decoding_that_only_informs_needs_no_calibration() -> None:
    run = [plain(), eagle()]
    assert of(judged(run, run, "timing"), "vanilla").notes == ()


def test_calibration_of_another_machine_is_not_used_and_that_is_said() -> None:
    slowdown, notes = allowed(calibration=calibration("machine-b"))
    assert slowdown == 0.05
    assert "of another machine" in notes[0]
