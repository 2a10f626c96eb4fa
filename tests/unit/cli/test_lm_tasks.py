"""lm-eval's code tasks in our sandbox, and its scores as we keep them."""

from __future__ import annotations

import pytest

from spdbench.cli.evaluate.lm_tasks import CodeEval, input_error_in, scores_of
from spdbench.errors import InputError
from spdbench.judge.results.evaluation import EvalScore

GOOD, BAD = "def f():\n    return 1", "def f():\n    return 2"


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    tests, answers = ["assert f() == 1"] * 2, [[GOOD, BAD], [BAD, BAD]]
    scores, verdicts = CodeEval(allowed=True).compute(tests, answers, k=[1, 2, 5])
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert [said["passed"] for _, said in verdicts[0]] == [True, False]


def test_code_is_not_run_unless_it_is_allowed() -> None:
    with pytest.raises(InputError, match="--allow-code-execution"):
        CodeEval(allowed=False).compute(["assert True"], [["pass"]])


def test_evaluate_hands_out_the_sandbox_and_all_else_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")
    from spdbench.cli.evaluate.lm_tasks import run_code_in_sandbox

    monkeypatch.setattr(evaluate, "load", lambda path, *_: f"theirs {path}")
    assert run_code_in_sandbox(allowed=False) == ""
    assert run_code_in_sandbox(allowed=True).startswith("guaranteed by the system")
    assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load("exact_match") == "theirs exact_match"


def test_scores_are_kept_with_their_errors() -> None:
    flat = {"alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,a": 1, "f1_stderr,a": "N/A"}
    assert scores_of(flat) == {
        "acc,none": EvalScore(value=0.5, stderr=0.1),
        "f1,a": EvalScore(value=1.0, stderr=None),
    }


def test_our_message_is_found_below_others() -> None:
    ours, theirs = InputError("ours"), ImportError("theirs")
    theirs.__cause__ = ours
    assert input_error_in(theirs) is ours
    assert input_error_in(ValueError("theirs")) is None
